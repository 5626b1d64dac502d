"""The soft load: a round begins between the global model and the site's own, unit by unit, see `Load`.

m and the site's own tensors are not sent. What a round sends is what its trained tensors are more than the global model
as received, so the mean of what the sites send is the mean of their models.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor

from pfedsam.data.known import known_loss
from pfedsam.parameters import load_shared_state, set_trainable, shared_state
from pfedsam.training.drift import ByUnit, State, drift, over_units, summed, unit_of
from pfedsam.training.load_settings import Load
from pfedsam.training.prediction_gap import slices_of_round
from pfedsam.training.site_tensors import SiteTensors
from pfedsam.training.trainer import PhaseTrainer

logger = logging.getLogger(__name__)


class SoftLoad:
    """Loads at a site, and keeps what its training has left as the site's copy of the shared tensors.

    Args:
        settings: of the strategy.
        trainer, tensors: of the site.
    """

    def __init__(self, settings: Load, trainer: PhaseTrainer, tensors: SiteTensors) -> None:
        self.settings, self.trainer, self.tensors = settings, trainer, tensors

    @contextmanager
    def around(self, round_number: int) -> Iterator[None]:
        """Train a round inside: it begins with the loaded tensors, and what it leaves is kept."""
        network, roles = self.trainer.network, self.tensors.roles
        load_shared_state(network, roles, self._loaded(round_number))
        yield
        self.tensors.copy = shared_state(network, roles)

    def serve(self, round_number: int) -> None:
        """After the last aggregation the site's own model is the one that a further round would begin with."""
        self.tensors.copy = self._loaded(round_number)

    def _loaded(self, round_number: int) -> dict[str, Tensor]:
        own, received = self.tensors.copy, self.tensors.received
        if not own:  # in the first round a site has nothing of its own
            return dict(received)
        shares = self._shares(own, received, round_number)
        values = torch.cat([share.flatten().float() for share in shares.values()])
        logger.info(
            "round %s: loaded %.0f %% of the global model (mean over %d units, from %.2f to %.2f)",
            round_number,
            100 * float(values.mean()),
            values.numel(),
            float(values.min()),
            float(values.max()),
        )
        return blended(own, received, shares)

    def _shares(self, own: State, received: State, round_number: int) -> ByUnit:
        """m of each unit."""
        settings = self.settings
        if settings.mode == "learned":
            return self._learned(own, received, round_number)
        drifts = drift(own, received, self.tensors.unshared)
        if settings.mode == "share":
            return {unit: torch.full_like(one, settings.share) for unit, one in drifts.items()}
        if settings.mode == "binary":
            return {unit: (one <= settings.threshold).to(one.dtype) for unit, one in drifts.items()}
        return {unit: 1 - one for unit, one in drifts.items()}

    def _learned(self, own: State, received: State, round_number: int) -> ByUnit:
        """m by steps down the loss on slices of the round's first epoch, from 1 on.

        By the chain rule the slope in m of a unit is that in its tensors times global minus own (as FedALA, arXiv
        2212.01197, for single weights). A step moves each m in proportion to its slope, the steepest by `rate`. [ours]
        """
        trainer, network = self.trainer, self.trainer.network
        shares = {unit: torch.ones_like(one) for unit, one in drift(own, received, self.tensors.unshared).items()}
        training = network.training
        network.eval()
        set_trainable(network, self.tensors.roles, {"shared"})
        try:
            with network.experts(False):
                for images, label, items in islice(slices_of_round(trainer, round_number), self.settings.steps):
                    load_shared_state(network, self.tensors.roles, blended(own, received, shares))
                    network.zero_grad(set_to_none=True)
                    known_loss(trainer.loss_function, trainer.logits(images, items), label).backward()
                    slopes = self._slopes(own, received, shares)
                    steepest = max(float(one.abs().max()) for one in slopes.values())
                    if steepest > 0:
                        step = self.settings.rate / steepest
                        shares = {unit: (m - step * slopes[unit]).clamp(0, 1) for unit, m in shares.items()}
        finally:
            network.zero_grad(set_to_none=True)
            network.train(training)
        return shares

    def _slopes(self, own: State, received: State, shares: ByUnit) -> ByUnit:
        slopes = {unit: torch.zeros_like(one) for unit, one in shares.items()}
        for name, parameter in self.trainer.network.named_parameters():
            if name in own and parameter.grad is not None:
                towards = received[name].double() - own[name].double()
                slopes[unit_of(name)] += summed(name, parameter.grad.cpu().double() * towards)
        return slopes


def blended(own: State, received: State, shares: ByUnit) -> dict[str, Tensor]:
    """`m * received + (1 - m) * own` with the m of each unit; exactly one of them where m is 1 or 0."""
    found = {}
    for name, tensor in own.items():
        share = over_units(name, shares[unit_of(name)]).to(tensor.dtype)
        between = torch.lerp(tensor, received[name], share.expand_as(tensor))
        found[name] = torch.where(share == 1, received[name], torch.where(share == 0, tensor, between))
    return found
