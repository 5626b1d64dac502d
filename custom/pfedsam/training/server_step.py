"""The server's step in the direction of the mean of the updates, with momentum, see `ServerStep`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_safetensors, write_atomically
from pfedsam.training.beside_rounds import beside_round
from pfedsam.training.judgement import State
from pfedsam.training.server_settings import ServerStep

#: Folder of them beside the rounds.
STEPS = "server_step"


class ServerSteps:
    """The steps of one federation.

    Args:
        settings: of the strategy.

    Attributes:
        way: v, by the names of the shared tensors, in double precision; empty before the first round.
    """

    def __init__(self, settings: ServerStep) -> None:
        self.settings = settings
        self.way: dict[str, Tensor] = {}

    def next(self, change: State) -> dict[str, Tensor]:
        """What is added to theta, in double precision.

        Args:
            change: the mean of the round's updates, by the names of the shared tensors.
        """
        before = self.way or {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in change.items()}
        self.way = {name: self.settings.momentum * before[name] + tensor.double() for name, tensor in change.items()}
        return {name: self.settings.rate * tensor for name, tensor in self.way.items()}

    def save(self, folder: Path, done: int) -> None:
        """Keep v; before the global model is written, which says that the round is done."""
        from safetensors.torch import save

        write_atomically(beside_round(folder, STEPS, done), save(self.way))

    def load(self, folder: Path, done: int) -> None:
        """Go on after so many rounds.

        Raises:
            PFedSAMError: E33 if v was not kept.
        """
        path = beside_round(folder, STEPS, done)
        if not path.exists():
            raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, f"{path} is not there.", "Begin the run anew.")
        self.way, _ = read_safetensors(path)


def begun_steps(settings: ServerStep | None, folder: Path, done: int) -> ServerSteps | None:
    """The server's steps after so many rounds; None for the plain mean.

    Args:
        settings: of the strategy.
        folder: of the rounds.
        done: number of rounds behind the global model.

    Raises:
        PFedSAMError: E33 if what they depend on was not kept.
    """
    if settings is None:
        return None
    steps = ServerSteps(settings)
    if done:
        steps.load(folder, done)
    return steps
