"""Losses on the embedding of images: contrast without labels, and a discriminator of styles."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsam.data.restyle import random_net, restyled
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import swapped_parameters
from pfedsam.training.alignment_settings import Adversary, WarmUp
from pfedsam.training.distillation import TeacherLogits
from pfedsam.training.dropped import dropped

#: Convolutions of a random net, and channels between two of them.
LAYERS, CHANNELS = 4, 2
Autocast = Callable[[], AbstractContextManager[object]]


class Contrast:
    """The loss of a warm-up without labels, see `WarmUp`.

    Args:
        network: what is trained.
        settings: of the phase.
        base: tensors of the SAM that no federation has trained.
        draw: number of the round and of the phase in it; they seed what is dropped.
        autocast: gives the context of the network's passes.
    """

    def __init__(
        self,
        network: SegmentAnything,
        settings: WarmUp,
        base: Mapping[str, Tensor],
        draw: tuple[int, int],
        autocast: Autocast,
    ) -> None:
        self.network, self.settings, self.autocast, self._draw = network, settings, autocast, draw
        self._of_base = TeacherLogits(lambda features, _: self._base(features, base))
        #: Items with their embeddings, the newest last.
        self._others: deque[tuple[int, Tensor]] = deque(maxlen=settings.dictionary)

    def __call__(self, features: Tensor, items: Sequence[int], step: int) -> Tensor:
        """The loss of a batch.

        Args:
            features: of the trunk, `(B, ...)`.
            items: index of each image in the data set.
            step: of the phase.
        """
        first, second = (
            self._embedded(dropped(features, self.settings.dropout, (*self._draw, step, view))) for view in (0, 1)
        )
        base = self._of_base(features, items).float()
        apart = (2 - (first * base).sum(1) - (second * base).sum(1)) / 2
        loss = contrast(first, second, items, list(self._others), self.settings.temperature)
        self._others.extend(zip(items, second.detach(), strict=True))
        return loss + self.settings.alignment * apart.mean()

    def _embedded(self, features: Tensor) -> Tensor:
        with self.network.prompted(None), self.network.uncounted(), self.autocast():
            embedding = self.network.encode(features)
        return F.normalize(embedding.float().mean((-2, -1)), dim=1)

    def _base(self, features: Tensor, base: Mapping[str, Tensor]) -> Tensor:
        training = self.network.training
        with self.network.experts(False), swapped_parameters(self.network, base):
            self.network.eval()
            embedded = self._embedded(features)
        self.network.train(training)
        return embedded


def contrast(
    first: Tensor, second: Tensor, items: Sequence[int], others: Sequence[tuple[int, Tensor]], temperature: float
) -> Tensor:
    """InfoNCE: each first view is to find its second among those of other images.

    Args:
        first: `(B, D)`, of length 1.
        second: `(B, D)`, of length 1.
        items: which image each is of.
        others: items and embeddings `(D,)` of earlier batches; those of the same image are no others.
        temperature: tau.

    Returns:
        the mean of `-log(exp(a b / tau) / sum exp(a c / tau))`; 0 where there is no other image.
    """
    known = torch.stack([*second.detach(), *(one for _, one in others)])
    owners = torch.tensor([*items, *(item for item, _ in others)], device=first.device)
    same = torch.tensor(list(items), device=first.device)[:, None] == owners
    negatives = (first @ known.T / temperature).masked_fill(same, float("-inf"))
    positive = (first * second).sum(1, keepdim=True) / temperature
    return (torch.cat([positive, negatives], 1).logsumexp(1) - positive[:, 0]).mean()


class StyleAdversary:
    """A discriminator of styles for one phase, see `Adversary`.

    Args:
        network: whose encoder is to hide the style.
        settings: of the phase.
        draw: number of the round and of the phase in it; they seed the discriminator and the random nets.
        autocast: gives the context of the network's passes.
    """

    def __init__(
        self, network: SegmentAnything, settings: Adversary, draw: tuple[int, int], autocast: Autocast
    ) -> None:
        self.network, self.settings, self.autocast, self._draw = network, settings, autocast, draw
        self._told: nn.Module | None = None
        self._optimizer: Any = None

    def __call__(self, features: Tensor, images: Tensor, step: int) -> Tensor:
        """Loss of the discriminator on a batch; its gradient reaches the encoder reversed.

        Args:
            features: of the trunk, `(B, ...)`.
            images: `(B, 3, H, W)` in [0, 1], of which restyled ones are made.
            step: of the phase.
        """
        random = np.random.RandomState(np.random.SeedSequence([*self._draw, step]).generate_state(4))
        other = torch.stack([self._restyled(image, random) for image in images])
        with self.network.prompted(None), self.network.uncounted(), self.autocast():
            both = torch.cat([self.network.encode(features), self.network.encode(self.network.trunk(other))])
        statistics = torch.cat([both.float().mean((-2, -1)), both.float().std((-2, -1))], 1)
        told = self._discriminator(statistics)(Reversed.apply(statistics, self.settings.weight))[:, 0]
        restyled_or_not = torch.arange(len(told), device=told.device) >= len(images)
        return F.binary_cross_entropy_with_logits(told, restyled_or_not.float())

    def step(self) -> None:
        """After the backward pass: the discriminator learns."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _restyled(self, image: Tensor, random: np.random.RandomState) -> Tensor:
        strength = float(random.uniform())
        return restyled(image.cpu(), [random_net(random, LAYERS, CHANNELS)], strength).to(image.device)

    def _discriminator(self, statistics: Tensor) -> nn.Module:
        if self._told is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence(self._draw).generate_state(1)[0]))
                layers = nn.Linear(statistics.shape[1], self.settings.hidden), nn.Linear(self.settings.hidden, 1)
            self._told = nn.Sequential(layers[0], nn.ReLU(), layers[1]).to(statistics.device)
            self._optimizer = torch.optim.AdamW(self._told.parameters(), lr=self.settings.learning_rate)
        return self._told


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is multiplied by minus a weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        """The same values."""
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """Minus the weight times the gradient."""
        return -ctx.weight * gradients[0], None
