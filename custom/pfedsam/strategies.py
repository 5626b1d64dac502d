"""The catalogue of strategies: one file each in `jobs/strategies`, and the ablations as patches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfedsam.bundles import checked_overrides, folder
from pfedsam.errors import PFedSAMError
from pfedsam.training.phases import Strategy

ABLATIONS = "ablations"


class StrategyFile(BaseModel):
    """A strategy with what it needs of the network, and how its sites come together.

    Attributes:
        description: one sentence for tables and `pfedsam compare --list`.
        kind: `federated`: the sites' shared tensors are averaged; `local`: every site trains alone; `ensemble`: as
            local, and the sites' models vote; `pooled`: one site that holds all data. Only the first needs a server.
        strategy: roles and phases.
        overrides: listed ids of the bundle's configuration, for example the number of experts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str
    kind: Literal["federated", "local", "ensemble", "pooled"] = "federated"
    strategy: dict[str, Any]
    overrides: dict[str, Any] = Field(default_factory=dict)

    def checked(self) -> Strategy:
        """The strategy (E16 or E18 if it or the overrides are impossible)."""
        checked_overrides(self.overrides)
        return Strategy.of(self.strategy)


def strategy_names() -> list[str]:
    """Names of the packaged strategies."""
    return sorted(path.stem for path in _root().glob("*.json") if path.stem != ABLATIONS)


def ablation_names() -> list[str]:
    """Names of the packaged ablations."""
    return list(_ablations())


def find_strategy(name_or_path: str) -> StrategyFile:
    """A strategy by name, by the name of an ablation, or by path.

    Raises:
        PFedSAMError: E16 if there is none, or the file is wrong: the file and its first wrong key are named.
    """
    path = Path(name_or_path) if name_or_path.endswith(".json") else _root() / f"{name_or_path}.json"
    if name_or_path in _ablations():
        return patched(name_or_path, _ablations()[name_or_path])
    if not path.is_file() or path.stem == ABLATIONS:
        raise PFedSAMError(
            "E16",
            f"there is no strategy '{name_or_path}'.",
            f"Strategies: {strategy_names()}; ablations: {ablation_names()}; or the path of a .json file.",
        )
    try:
        found = StrategyFile(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"'{'.'.join(map(str, first['loc']))}': {first['msg']}" if first else str(error)
        raise PFedSAMError(
            "E16", f"{path} is no strategy: {what}.", "See jobs/strategies/fedavg_lora.json for one."
        ) from None
    found.checked()
    return found


def _root() -> Path:
    return folder("jobs") / "strategies"


def _ablations() -> dict[str, Any]:
    return json.loads((_root() / f"{ABLATIONS}.json").read_text())


def patched(name: str, patch: Mapping[str, Any]) -> StrategyFile:
    """A strategy with some keys replaced.

    Args:
        name: of the new strategy.
        patch: `base`, name of a strategy, and what is replaced: keys of the `strategy`, of the `overrides`, of its
            `phases` by their names; `order`: names of the phases that a round has, in order.

    Raises:
        PFedSAMError: E16 if a phase is named that is not there; E16 or E18 if what comes out is impossible.
    """
    base = find_strategy(patch["base"])
    strategy = {**base.strategy, **patch.get("strategy", {}), "name": name}
    changes = patch.get("phases", {})
    in_round, after = ([phase["name"] for phase in strategy.get(part, [])] for part in ("phases", "final"))
    unknown = [one for one in changes if one not in (*in_round, *after)]
    unknown += [one for one in patch.get("order", ()) if one not in in_round]
    if unknown:
        raise PFedSAMError(
            "E16",
            f"'{name}' names phase(s) {unknown}, which '{patch['base']}' does not have.",
            f"Its phases: {in_round} in a round, {after} after the last.",
        )
    for part in ("phases", "final"):
        strategy[part] = [{**phase, **changes.get(phase["name"], {})} for phase in strategy.get(part, [])]
    if "order" in patch:
        by_name = {phase["name"]: phase for phase in strategy["phases"]}
        strategy["phases"] = [by_name[one] for one in patch["order"]]
    found = StrategyFile(
        description=f"{patch['base']} with {json.dumps({k: v for k, v in patch.items() if k != 'base'})}",
        kind=base.kind,
        strategy=strategy,
        overrides={**base.overrides, **patch.get("overrides", {})},
    )
    found.checked()
    return found
