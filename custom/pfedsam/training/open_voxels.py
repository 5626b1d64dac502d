"""What a phase learns from voxels of which no label says what they are: pseudo-labels, see `PseudoLabels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsam.data.known import known_loss, share_open
from pfedsam.data.labels import OPEN
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.prompts import boxes_of
from pfedsam.parameters import swapped_parameters
from pfedsam.training.distillation import TeacherLogits, foreground
from pfedsam.training.dropped import dropped
from pfedsam.training.extra_losses import PseudoLabels

#: Entropies of a batch of which a quantile is taken.
_MOST = 1 << 20


class OpenVoxels:
    """Teachers of one phase, and the loss on what they say.

    Args:
        network: the student; the teachers share all tensors with it but those that the phase trains.
        settings: of the phase.
        trained: the parameters that the phase trains, by name, as they are when it starts.
        loss: of the bundle.
        exclusive: softmax over the channels instead of a sigmoid of each.
        draw: number of the round and of the phase in it; they seed what is dropped.
        base: tensors of the SAM that no federation has trained, for `refine`.
        autocast: gives the context of the network's passes.

    Attributes:
        labelled: share of the open voxels that got a pseudo-label, of each batch that has open voxels.
    """

    def __init__(
        self,
        network: SegmentAnything,
        settings: PseudoLabels,
        trained: Mapping[str, nn.Parameter],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        exclusive: bool,
        draw: tuple[int, int],
        base: Mapping[str, Tensor],
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self.network, self.settings, self.loss, self.exclusive = network, settings, loss, exclusive
        self.base, self.autocast, self._seed = base, autocast, draw
        self.quantile = settings.quantile_in(draw[0])
        self.labelled: list[float] = []
        self._trained = dict(trained)
        self._average = {name: parameter.detach().clone() for name, parameter in trained.items()}
        start = {name: tensor.clone() for name, tensor in self._average.items()}
        self._of_round = TeacherLogits(lambda features, boxes: self._logits(features, start))
        self._of_base = TeacherLogits(self._in_boxes)
        #: Entropy that is low enough, where a class is found and where none is.
        self._enough: dict[bool, float] = {}

    def __call__(self, features: Tensor, prediction: Tensor, label: Tensor, items: Sequence[int]) -> Tensor:
        """The loss on the images of a batch that have open voxels; 0 without any.

        Args:
            features: of the trunk, `(B, ...)`.
            prediction: the student's logits `(B, C, H, W)`.
            label: `(B, C, H, W)` of 0, 1 and `OPEN`.
            items: index of each image in the data set.
        """
        chosen = (share_open(label) > 0).nonzero().flatten()
        if not len(chosen):
            return prediction.sum() * 0
        features, prediction, label = features[chosen], prediction[chosen], label[chosen]
        pseudo, weights = self._pseudo_labels(features, label, [items[int(one)] for one in chosen])
        dropped = self._student(features)
        parts = [
            weight * known_loss(self.loss, logits[None], one[None])
            for logits, one, weight in zip(dropped, pseudo, weights, strict=True)
            if weight > 0
        ]
        learnt = torch.stack(parts).mean() if parts else prediction.sum() * 0
        apart = foreground(dropped, self.exclusive) - foreground(prediction, self.exclusive)
        return self.settings.weight * learnt + self.settings.consistency * apart.square().mean()

    @torch.no_grad()
    def follow(self) -> None:
        """After a step: the average teacher follows the student."""
        for name, parameter in self._trained.items():
            self._average[name].lerp_(parameter.detach(), 1 - self.settings.decay)

    @torch.no_grad()
    def _pseudo_labels(self, features: Tensor, label: Tensor, items: Sequence[int]) -> tuple[Tensor, list[float]]:
        """Labels `(B, C, H, W)` that are open where a label knows, or the teachers do not; and each image's weight."""
        probability = self._teach(features, items)
        found = _hard(probability, self.exclusive)
        is_open = label[:, :1] == OPEN
        sure = self._sure(probability, found, is_open) & is_open
        weights = [1.0] * len(items)
        if self.settings.refine == "box":
            same, weights = self._agreed(features, found, items)
            sure &= same
        taught = torch.as_tensor(weights, device=sure.device).bool()[:, None, None, None] & sure
        self.labelled.append(float(taught.sum() / is_open.sum()))
        return torch.where(sure, found, torch.full_like(found, OPEN)), weights

    def _teach(self, features: Tensor, items: Sequence[int]) -> Tensor:
        """Mean probability of the teachers, `(B, C, H, W)`."""
        said = {
            "average": lambda: self._logits(features, self._average),
            "round": lambda: self._of_round(features, items),
        }
        logits = [said[teacher]().float() for teacher in self.settings.teachers]
        return torch.stack([one.softmax(1) if self.exclusive else one.sigmoid() for one in logits]).mean(0)

    def _sure(self, probability: Tensor, found: Tensor, is_open: Tensor) -> Tensor:
        """Where the entropy is low enough, `(B, 1, H, W)`: apart for voxels of a class and for others."""
        entropy = _entropy(probability, self.exclusive)
        of_class = (found[:, 1:] if self.exclusive else found).any(1, keepdim=True)
        sure = torch.zeros_like(of_class)
        for kind in (True, False):
            part = is_open & (of_class if kind else ~of_class)
            if not bool(part.any()):
                continue
            now = _quantile(entropy[part], self.quantile)
            decay = self.settings.threshold_decay
            self._enough[kind] = decay * self._enough.get(kind, now) + (1 - decay) * now
            sure |= part & (entropy <= self._enough[kind])
        return sure

    def _agreed(self, features: Tensor, found: Tensor, items: Sequence[int]) -> tuple[Tensor, list[float]]:
        """Where the base SAM, with the box of what the teachers found, says the same; and each image's weight."""
        classes = found[:, 1:] if self.exclusive else found
        same, dice = torch.ones_like(found[:, :1], dtype=torch.bool), torch.ones(classes.shape[:2])
        there = classes.flatten(2).any(2)
        for number in range(classes.shape[1]):
            mask = classes[:, number : number + 1]
            # an item of its own for each class, since the masks of one image are kept by it
            keys = [item * classes.shape[1] + number for item in items]
            refined = (self._of_base(features, keys, boxes_of(mask))[:, :1] > 0).to(mask.dtype)
            same &= (refined == mask) | ~there[:, number, None, None, None]
            overlap, size = (refined * mask).flatten(1).sum(1), (refined + mask).flatten(1).sum(1)
            dice[:, number] = torch.where(there[:, number], 2 * overlap / size.clamp_min(1), 1).cpu()
        weights = torch.where(there.any(1).cpu(), dice.amin(1), 0)
        return same, [weight if weight >= self.settings.agreement else 0.0 for weight in weights.tolist()]

    def _in_boxes(self, features: Tensor, boxes: Tensor | None) -> Tensor:
        return self._logits(features, self.base, boxes, experts=False).float()

    @torch.no_grad()
    def _logits(
        self, features: Tensor, tensors: Mapping[str, Tensor], boxes: Tensor | None = None, experts: bool | None = None
    ) -> Tensor:
        """The network's logits with other tensors, without dropout, without prompts but the boxes."""
        network, training = self.network, self.network.training
        on = experts is None and any(layer.enabled for layer in network.expert_layers().values())
        with swapped_parameters(network, tensors), network.prompted(boxes), network.experts(on), self.autocast():
            network.eval()
            logits = network.head(features)
        network.train(training)
        return logits

    def _student(self, features: Tensor) -> Tensor:
        """The student's logits from features of which a part is dropped: which, follows from the step alone."""
        features = dropped(features, self.settings.dropout, (*self._seed, len(self.labelled)))
        with self.network.prompted(None), self.autocast():
            return self.network.head(features).float()


def _quantile(values: Tensor, quantile: float) -> float:
    """Of the values, or of every so-manieth where there are very many: torch takes 16 million."""
    return float(values[:: -(-len(values) // _MOST)].float().quantile(quantile))


def _hard(probability: Tensor, exclusive: bool) -> Tensor:
    """What is found, 0 or 1 in each channel."""
    if exclusive:
        return F.one_hot(probability.argmax(1), probability.shape[1]).movedim(-1, 1).to(probability.dtype)
    return (probability > 0.5).to(probability.dtype)


def _entropy(probability: Tensor, exclusive: bool) -> Tensor:
    """Of each pixel, `(B, 1, H, W)`: of its classes if they are exclusive, else the mean over them."""
    p = probability.clamp(1e-6, 1 - 1e-6)
    if exclusive:
        return -(p * p.log()).sum(1, keepdim=True)
    return -(p * p.log() + (1 - p) * (1 - p).log()).mean(1, keepdim=True)
