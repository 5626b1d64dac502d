"""The tensors of a site's two models: theta as received, the site's own copy of it, and what is personal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pfedsam.errors import ErrorCode
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import (
    COPY,
    Roles,
    check_state,
    load_personal_state,
    load_shared_state,
    manifest,
    personal_state,
    shared_state,
    swapped_parameters,
)
from pfedsam.training.phase import Phase
from pfedsam.training.trainer import PhaseTrainer


class SiteTensors:
    """Keeps what is not in the network beside what is.

    Args:
        network: holds the personal tensors, and the shared ones.
        roles: of the groups.
        alone: the site may train a model by itself, see `begin_alone`.

    Attributes:
        received: theta as received; empty before the first time.
        copy: the site's own copy of the shared tensors; empty if it has none.
        unshared: the shared tensors of a network that no federation has trained; empty unless it is asked for.
    """

    def __init__(self, network: SegmentAnything, roles: Roles, alone: bool = False) -> None:
        self.network, self.roles = network, roles
        self.unshared = shared_state(network, roles) if alone else {}
        self.received: dict[str, Tensor] = {}
        self.copy: dict[str, Tensor] = {}

    def receive(self, theta: Mapping[str, np.ndarray | Tensor]) -> bool:
        """Load the global model; returns whether it is another one than before.

        Raises:
            PFedSAMError: E12 if its tensors do not fit.
        """
        load_shared_state(self.network, self.roles, theta)
        before, self.received = self.received, shared_state(self.network, self.roles)
        return any(not torch.equal(tensor, before.get(name, tensor + 1)) for name, tensor in self.received.items())

    def restore(self, personal: Mapping[str, Tensor], copy: dict[str, Tensor]) -> None:
        """Take back the personal tensors, as `personal` gave them, and the copy.

        Raises:
            PFedSAMError: E13 if they do not fit.
        """
        own = {name: tensor for name, tensor in personal.items() if not name.startswith(COPY)}
        load_personal_state(self.network, self.roles, own)
        if copy:
            shared = manifest(self.network, self.roles, "shared")
            check_state(copy, shared, code=ErrorCode.PERSONAL_STATE, what="own copy")
        self.copy = copy

    def beside(self) -> dict[str, Tensor]:
        """The tensors in the place of the shared ones in the personal model."""
        return self.copy or self.received

    def delta(self) -> dict[str, Tensor]:
        """What the shared tensors in the network are more than those that were received."""
        return {name: tensor - self.received[name] for name, tensor in shared_state(self.network, self.roles).items()}

    def personal(self) -> dict[str, Tensor]:
        """The personal tensors with the copy, whose names begin with `COPY`."""
        copies = {COPY + name: tensor for name, tensor in self.copy.items()}
        return {**personal_state(self.network, self.roles), **copies}

    def interpolate(self, alpha: float) -> None:
        """Move the personal model towards the global one: 1 leaves it as it is, 0 makes it the global one."""
        if alpha == 1:
            return
        for layer in self.network.expert_layers().values():
            layer.interpolate(alpha)
        self.copy = {name: self.received[name].lerp(own, alpha) for name, own in self.copy.items()}

    def begin_alone(self) -> None:
        """Make the personal model the one that a site begins with which is in no federation: no experts, no theta."""
        for layer in self.network.expert_layers().values():
            layer.interpolate(0)
        self.copy = dict(self.unshared)

    @contextmanager
    def nearer(self, alpha: float, with_copy: bool) -> Iterator[None]:
        """The network meanwhile as `interpolate` would make it, while a phase trains.

        Args:
            alpha: 1 for the network as it is, 0 for the global model.
            with_copy: the site's copy is in the place of the shared tensors.
        """
        layers = list(self.network.expert_layers().values())
        own = shared_state(self.network, self.roles) if with_copy else {}
        for layer in layers:
            layer.strength = alpha
        try:
            with swapped_parameters(self.network, {n: self.received[n].lerp(one, alpha) for n, one in own.items()}):
                yield
        finally:
            for layer in layers:
                layer.strength = 1.0

    @contextmanager
    def all_or_nothing(self, trainer: PhaseTrainer) -> Iterator[None]:
        """After an error or a stop inside, the personal part, copy, moments and theta are those of before.

        A round that ended in values that are not finite would spoil every round after it. The state on disk is that of
        the last whole round, and so is the one in memory.
        """
        personal, copy = personal_state(self.network, self.roles), self.copy
        # a phase makes new ones and changes none in place
        moments, theta, whole = trainer.moments(), self.received, False
        try:
            yield
            whole = not trainer.should_stop()
        finally:
            if not whole:
                load_personal_state(self.network, self.roles, personal)
                self.copy = copy
                trainer.load_moments(moments)
                if theta:
                    load_shared_state(self.network, self.roles, theta)

    @contextmanager
    def theta_of(self, phase: Phase) -> Iterator[None]:
        """A phase that trains personal tensors only does it beside theta *as received*, whatever ran before it.

        So the pair (theta, phi) that is kept is the one that was trained together, in either order of the phases. A
        phase that trains the site's copy of theta has the copy in the place of the shared tensors.
        """
        if "shared" in phase.trains or not self.received:
            yield
            return
        own = "copy" in phase.trains
        trained = shared_state(self.network, self.roles)
        load_shared_state(self.network, self.roles, self.beside() if own else self.received)
        try:
            yield
            if own:
                self.copy = shared_state(self.network, self.roles)
        finally:
            load_shared_state(self.network, self.roles, trained)
