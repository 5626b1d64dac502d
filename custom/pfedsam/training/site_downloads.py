"""A download per site: each site trains from its own mixture of the sites' models, and not from the mean of all.

A round ends with the models `theta_k + delta_k` of the sites that took part, theta_k what site k had received. Each
site downloads `sum_k s_ik (theta_k + delta_k)`. Its row of shares s_i is not negative and sums to 1: it is a row of
weights over the sites, times what each site counts in the round (`pfedsam.training.judgement`). One hook serves all:

* equal weights for all are the mean of all, as without this module, bit for bit where all had received the same;
* groups: equal weights within a group (after SPP-FGC, arXiv 2511.10915, see `pfedsam.training.similar_sites`);
* mixtures: weights `exp(cosine / temperature)` (after APPLE, arXiv 2110.08394, whose sites learn their weights
  themselves and receive every model). [ours]

The cosines are of each site's updates, scaled to length 1 and summed with a decay (`memory`): a round with long updates
does not own it, and groups that have parted keep the evidence of it. [ours]

The global model, which is kept, validated and served to others, is the mean of all models. A site that was not there
in a round downloads that. A site sees its own download and, at the end, the global model: so a group has a model of its
own only if `least_size` sites count in it, and as many, or none, outside of it. [ours]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_safetensors, write_atomically
from pfedsam.training.aggregation import scaled
from pfedsam.training.download_settings import Downloads
from pfedsam.training.judgement import Judgement, State, judge
from pfedsam.training.similar_sites import cosines, similar_groups

#: Decimals of cosines and shares in what is told.
TOLD_DECIMALS = 3
#: Metadata of the file: what the tensors in it are.
_ABOUT = "pfedsam_downloads"


class Outcome(NamedTuple):
    """What became of a round.

    Attributes:
        change: of the global model, in double precision.
        judged: of each site's update.
        told: for the records: `sites`, and in their order the matrices `similarity` and `shares` (row i is what site i
            downloads), and `groups`, those that have a model of their own.
    """

    change: dict[str, Tensor]
    judged: list[Judgement]
    told: dict[str, Any]


class SiteDownloads:
    """The downloads of a federation, from round to round.

    Args:
        settings: of the strategy.
        rule: how updates are judged, see `pfedsam.training.judgement.judge`.
    """

    def __init__(self, settings: Downloads, rule: str) -> None:
        self.settings, self.rule = settings, rule
        self._next: tuple[int | None, Mapping[str, State]] = (None, {})
        self._memory: dict[str, Tensor] = {}

    @property
    def round_number(self) -> int | None:
        """The round that the downloads are for; None before any was done."""
        return self._next[0]

    def of(self, site: str) -> State | None:
        """What a site downloads; None for the global model. Sites of one group get the same tensors: copy them."""
        return self._next[1].get(site)

    def snapshot(self, site: str) -> tuple[int | None, State | None]:
        """The round and what the site downloads for it, of one moment: another thread may end the round meanwhile."""
        number, thetas = self._next
        return number, thetas.get(site)

    def next(
        self,
        number: int,
        theta: State,
        updates: Mapping[str, State],
        weights: Sequence[float],
        ceilings: Sequence[float | None] | None = None,
        start: State | None = None,
    ) -> Outcome:
        """End a round.

        Args:
            number: of the round, from 0.
            theta: the global model that the round began with.
            updates: delta of each site, to what that site had received.
            weights, ceilings, start: as in `pfedsam.training.aggregation.combine`.
        """
        sites, deltas = list(updates), list(updates.values())
        received = [self._next[1].get(site, theta) for site in sites]
        self._remember(updates)
        similarity = cosines([self._memory[site] for site in sites])
        found = self._found(number, similarity)
        judged = judge(
            deltas,
            weights,
            self.rule,
            ceilings,
            groups=[(group, _way(group, received, theta, start)) for group in found],
        )
        counted = [one.counted for one in judged]
        groups = _allowed(found, counted, self.settings.least_size)
        rows = self._rows(number, similarity, groups, counted)
        kept = [scaled(delta, one) for delta, one in zip(deltas, judged, strict=True)]
        change = mixed(theta, received, kept, counted)
        self._keep(number + 1, theta, received, kept, dict(zip(sites, rows, strict=True)), counted)
        told = {
            "sites": sites,
            "similarity": [[round(value, TOLD_DECIMALS) for value in row] for row in similarity.tolist()],
            "groups": [[sites[place] for place in group] for group in groups],
            "shares": [[round(value, TOLD_DECIMALS) for value in shares_of(row)] for row in rows],
        }
        return Outcome(change, judged, told)

    def skip(self, number: int) -> None:
        """End a round in which no site sent an update: all download what they had."""
        self._next = number + 1, self._next[1]

    def save(self, path: Path, model: str = "") -> None:
        """Write all that the next round depends on, atomically, for the server's own disk: it is for no site.

        Args:
            path: file to write.
            model: digest of the global model that belongs to it.
        """
        told: list[State] = []
        places = {}
        for site, theta in self._next[1].items():
            places[site] = next((i for i, one in enumerate(told) if one is theta), len(told))
            told += [theta] if places[site] == len(told) else []
        tensors = {f"{i}/{name}": tensor.contiguous() for i, one in enumerate(told) for name, tensor in one.items()}
        tensors |= {f"memory/{i}": tensor for i, tensor in enumerate(self._memory.values())}
        about = {"round": self.round_number, "model": model, "sites": places, "memory": list(self._memory)}
        about["of"] = self._of
        write_atomically(path, save(tensors, metadata={_ABOUT: json.dumps(about)}))

    def load(self, path: Path, number: int, model: str = "") -> bool:
        """Go on from what was saved, if it is for this round and this global model; whether it is.

        Raises:
            PFedSAMError: E33 if the file cannot be read.
        """
        try:
            tensors, metadata = read_safetensors(path)
            about = json.loads(metadata[_ABOUT])
            if (about["round"], about["model"], about["of"]) != (number, model, self._of):
                return False
            thetas: dict[int, dict[str, Tensor]] = {}
            for key in (key for key in tensors if not key.startswith("memory/")):
                place, _, name = key.partition("/")
                thetas.setdefault(int(place), {})[name] = tensors[key]
            own = {site: thetas[place] for site, place in about["sites"].items()}
            self._memory = {site: tensors[f"memory/{i}"] for i, site in enumerate(about["memory"])}
        except (ValueError, KeyError, TypeError) as error:
            raise PFedSAMError(
                ErrorCode.RUN_INCOMPLETE,
                f"what each site downloads cannot be read from {path} ({type(error).__name__}: {error}).",
                "Take it away: all sites then go on from the global model. Or begin anew.",
            ) from None
        self._next = number, own
        return True

    @property
    def _of(self) -> dict[str, Any]:
        """What the downloads follow from: those of a job with other settings are not gone on with."""
        return {**self.settings.model_dump(mode="json"), "rule": self.rule}

    def _remember(self, updates: Mapping[str, State]) -> None:
        for site, delta in updates.items():
            flat = torch.cat([delta[name].double().flatten() for name in sorted(delta)])
            length = float(flat.norm())
            before = self._memory.get(site, torch.zeros_like(flat))
            self._memory[site] = self.settings.memory * before + (flat / length if length else flat)

    def _found(self, number: int, similarity: Tensor) -> list[list[int]]:
        """Places of sites among which directions are judged: groups; all in the first rounds; none of mixtures."""
        if number < self.settings.warmup_rounds:
            return [list(range(len(similarity)))]
        if self.settings.kind == "mixtures":
            return []
        settings = self.settings
        return similar_groups(similarity, settings.groups, settings.most_groups, settings.least_size)

    def _rows(
        self, number: int, similarity: Tensor, groups: Sequence[Sequence[int]], counted: list[float]
    ) -> list[list[float]]:
        """For each site what each site counts in its download; see `shares_of`."""
        if self.settings.kind == "mixtures" and number >= self.settings.warmup_rounds:
            warm = [[exp(value / self.settings.temperature) for value in row] for row in (similarity - 1).tolist()]
            rows = [[weight * count for weight, count in zip(row, counted, strict=True)] for row in warm]
            # where all that is like a site counts nothing, it has the mean of all
            return [row if sum(row) > 0 else counted for row in rows]
        rows = [counted] * len(counted)
        for group in groups:
            row = [count if place in group else 0.0 for place, count in enumerate(counted)]
            for place in group:
                rows[place] = row
        return rows

    def _keep(
        self,
        number: int,
        theta: State,
        received: Sequence[State],
        deltas: Sequence[State],
        rows: Mapping[str, list[float]],
        everyone: list[float],
    ) -> None:
        made: dict[tuple[float, ...], dict[str, Tensor]] = {}
        thetas = {}
        for site, row in rows.items():
            if row == everyone or not sum(row):
                continue  # the global model, as it is sent in any case
            if tuple(row) not in made:
                change = mixed(theta, received, deltas, row)
                made[tuple(row)] = {
                    name: (tensor.double() + change[name]).to(tensor.dtype) for name, tensor in theta.items()
                }
            thetas[site] = made[tuple(row)]
        self._next = number, thetas  # as a whole: another thread may be reading


def mixed(theta: State, received: Sequence[State], deltas: Sequence[State], row: Sequence[float]) -> dict[str, Tensor]:
    """`sum_k s_k (theta_k + delta_k) - theta` in double precision, s the shares of a row.

    Args:
        theta: what the change is to.
        received: theta_k of each site; where it is `theta` itself, only its delta is added, so nothing is rounded.
        deltas: delta_k of each site.
        row: weights, not negative, not all zero.
    """
    change = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in theta.items()}
    for own, delta, share in zip(received, deltas, shares_of(row), strict=True):
        if share:
            for name, sum_ in change.items():
                moved = delta[name].double()
                if own is not theta:
                    moved = own[name].double() - theta[name].double() + moved
                sum_ += moved * share
    return change


def shares_of(row: Sequence[float]) -> list[float]:
    """A row of weights as shares, which sum to 1."""
    total = sum(row)
    return [weight / total for weight in row]


def _way(
    group: Sequence[int], received: Sequence[State], theta: State, start: State | None
) -> dict[str, Tensor] | None:
    """The way that the model of a group has come; None if its sites come from different ones, or it has come none.

    The way of the global model is that of all sites, not of a group that parts from it now.
    """
    first = received[group[0]]
    parts = first is theta and len(group) < len(received)
    if start is None or parts or any(received[place] is not first for place in group):
        return None
    return {name: tensor.double() - start[name].double() for name, tensor in first.items()}


def _allowed(found: Sequence[Sequence[int]], counted: Sequence[float], least: int) -> list[list[int]]:
    """The groups that may have a model of their own: enough sites count in it, and enough or none outside."""
    there = sum(count > 0 for count in counted)
    sizes = [sum(counted[place] > 0 for place in group) for group in found]
    kept = [(list(group), size) for group, size in zip(found, sizes, strict=True) if size >= least]
    if any(0 < there - size < least for _, size in kept):
        return []
    return [group for group, size in kept if size < there]
