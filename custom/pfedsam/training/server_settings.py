"""What the server does with the mean of a round's updates: settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pfedsam.training.extra_losses import Number, Part, Settings


class ServerStep(Settings):
    """The server goes on in the direction of earlier rounds (FedAvgM: Hsu et al., arXiv 1909.06335).

    `v <- momentum * v + change`, then `theta <- theta + rate * v`, change the mean of the updates as the rule has it.
    The mean of sites that each make few steps is a small step; with momentum m it becomes up to `1 / (1 - m)` times as
    long where rounds agree, and hardly longer where they do not.

    Attributes:
        momentum: m; 0 forgets earlier rounds.
        rate: of the server (FedOpt: Reddi et al., arXiv 2003.00295); with momentum 0 and rate 1 it is the plain mean.
    """

    momentum: Part = 0.0
    rate: Annotated[Number, Field(gt=0, le=10)] = 1.0
