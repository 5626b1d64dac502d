"""The optimiser of a phase: its groups of tensors, its learning rate, and the moments that are kept between rounds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pfedsam.parameters import group_of
from pfedsam.training.phase import Phase


def names_by_factor(phase: Phase, names: Sequence[str]) -> dict[float, list[str]]:
    """Names of tensors by the factor that the phase puts on the learning rate of their group."""
    by_factor: dict[float, list[str]] = {}
    for name in names:
        by_factor.setdefault(phase.rates.get(group_of(name), 1.0), []).append(name)
    return by_factor


def phase_optimizer(
    template: Optimizer, phase: Phase, parameters: Mapping[str, nn.Parameter], by_factor: Mapping[float, Sequence[str]]
) -> Optimizer:
    """An optimiser of the bundle's kind with the bundle's settings, but the phase's learning rate.

    Args:
        template: the bundle's optimiser.
        phase: what trains.
        parameters: all that it trains, by name.
        by_factor: see `names_by_factor`; each group of parameters keeps its factor under the key `factor`.
    """
    accepted = inspect.signature(type(template)).parameters
    defaults = {key: value for key, value in template.defaults.items() if key in accepted}
    groups = [{"params": [parameters[name] for name in names], "factor": f} for f, names in by_factor.items()]
    return type(template)(groups, **{**defaults, "lr": phase.learning_rate})


def learning_rate(phase: Phase, round_number: int, step: int, steps: int) -> float:
    """The learning rate of a step: decay by round, warm-up over the first rounds, annealing in the phase.

    Warm-up is a linear rise from a tenth over the steps of the phase in its first `warmup_rounds` rounds.

    Args:
        phase: of which the rate is.
        round_number: of the federation, counted from 0.
        step: of the phase, counted from 1.
        steps: of the whole phase.
    """
    rate = phase.learning_rate * phase.decay**round_number / (1 + phase.inverse_time_decay * round_number)
    if round_number < phase.warmup_rounds:
        done = (round_number * steps + step) / (phase.warmup_rounds * steps)
        rate *= 0.1 + 0.9 * min(1.0, done)
    if phase.anneal == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    return rate


class Moments:
    """An optimiser's moments of single tensors, kept while the optimiser itself is made anew for every phase."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def flat(self) -> dict[str, Tensor]:
        """What is kept, as `<tensor>#<moment>`."""
        return {f"{name}#{key}": value for name, state in self._kept.items() for key, value in state.items()}

    def load(self, moments: Mapping[str, Tensor]) -> None:
        """Keep what `flat` gave, and nothing else."""
        self._kept = {}
        for name, value in moments.items():
            tensor, key = name.split("#")
            self._kept.setdefault(tensor, {})[key] = value

    def keep(self, optimizer: Optimizer, names: Sequence[str]) -> None:
        """Keep copies of the moments of an optimiser that trains these tensors, in this order, and no others."""
        state = optimizer.state_dict()["state"]
        self._kept = {
            name: {key: torch.as_tensor(value).detach().cpu().clone() for key, value in state[i].items()}
            for i, name in enumerate(names)
            if i in state
        }

    def restore(self, optimizer: Optimizer, names: Sequence[str]) -> None:
        """Give an optimiser that trains these tensors the moments that are kept, if they are kept of all of them."""
        if self._kept and all(name in self._kept for name in names):
            # copies: the optimiser works in place, and a phase that fails must not change what is kept
            state = {i: {k: v.clone() for k, v in self._kept[name].items()} for i, name in enumerate(names)}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
