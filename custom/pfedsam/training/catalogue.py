"""The catalogue of strategies: one file each in `jobs/strategies`, and the ablations as patches of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfedsam.bundles import checked_overrides, folder
from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.training.strategy import Strategy

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

    @classmethod
    def of(cls, content: Any, where: str) -> StrategyFile:
        """From the content of a file.

        Args:
            content: any JSON value.
            where: the file, for the sentence.

        Raises:
            PFedSAMError: E29 naming the first wrong key, or E18 for an override.
        """
        found = _checked(cls, content, where, "is no strategy", "See jobs/strategies/fedavg_lora.json for one.")
        found.checked()
        return found.model_copy(update={"overrides": checked_overrides(found.overrides)})

    def checked(self) -> Strategy:
        """The strategy (E16 or E18 if it or the overrides are impossible)."""
        checked_overrides(self.overrides)
        return Strategy.of(self.strategy)


class Patch(BaseModel):
    """What is replaced in a strategy.

    Attributes:
        base: name of a strategy or of another ablation.
        strategy: keys of the strategy.
        overrides: keys of the overrides.
        phases: keys of its phases, by their names.
        order: names of the phases that a round has, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    strategy: dict[str, Any] = Field(default_factory=dict)
    overrides: dict[str, Any] = Field(default_factory=dict)
    phases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    order: list[str] | None = None


def strategy_names() -> list[str]:
    """Names of the packaged strategies."""
    return sorted(path.stem for path in _root().glob("*.json") if path.stem != ABLATIONS)


def ablation_names() -> list[str]:
    """Names of the packaged ablations."""
    return list(_ablations())


def find_strategy(name_or_path: str) -> StrategyFile:
    """A strategy by name, by the name of an ablation, or by path.

    Raises:
        PFedSAMError: E28 if there is none, E29 if the file is wrong: the file and its first wrong key are named.
    """
    path = Path(name_or_path) if name_or_path.endswith(".json") else _root() / f"{name_or_path}.json"
    if name_or_path in _ablations():
        return patched(name_or_path, _ablations()[name_or_path])
    if not path.is_file() or path.stem == ABLATIONS:
        raise PFedSAMError(
            ErrorCode.UNKNOWN_NAME,
            f"there is no strategy '{name_or_path}'.",
            f"Strategies: {strategy_names()}; ablations: {ablation_names()}; or the path of a .json file.",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE, f"{path} is no strategy: {error}.", "Correct the file."
        ) from None
    return StrategyFile.of(content, str(path))


def strategy_name(name_or_path: str) -> str:
    """What a strategy is called in records and tables: its name; that of a file is the one in it, else the file's.

    Raises:
        PFedSAMError: E28 or E29, see `find_strategy`.
    """
    if not name_or_path.endswith(".json"):
        return name_or_path
    return str(find_strategy(name_or_path).strategy.get("name") or Path(name_or_path).stem)


Checked = TypeVar("Checked", bound=BaseModel)


def _checked(model: type[Checked], content: Any, where: str, what: str, remedy: str) -> Checked:
    """A model of a JSON value (E29 with the first wrong key)."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        told = f"'{key}': {first['msg']}" if key else f"it is {shown(content)}, expected keys with values"
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"{where} {what}: {told}.", remedy) from None


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
        PFedSAMError: E28 if a phase is named that is not there; E16 or E18 if what comes out is impossible.
    """
    told = _checked(Patch, patch, f"'{name}'", "is no patch", f"See jobs/strategies/{ABLATIONS}.json for some.")
    base = find_strategy(told.base)
    strategy = {**base.strategy, **told.strategy, "name": name}
    parts = {part: _phases(name, strategy, part) for part in ("phases", "final")}
    in_round, after = ([phase["name"] for phase in phases] for phases in parts.values())
    unknown = [one for one in told.phases if one not in (*in_round, *after)]
    unknown += [one for one in told.order or () if one not in in_round]
    if unknown:
        raise PFedSAMError(
            ErrorCode.UNKNOWN_NAME,
            f"'{name}' names phase(s) {unknown}, which '{told.base}' does not have.",
            f"Its phases: {in_round} in a round, {after} after the last.",
        )
    for part, phases in parts.items():
        strategy[part] = [{**phase, **told.phases.get(phase["name"], {})} for phase in phases]
    if told.order is not None:
        by_name = dict(zip(in_round, strategy["phases"], strict=True))
        strategy["phases"] = [by_name[one] for one in told.order]
    found = StrategyFile(
        description=f"{told.base} with {json.dumps({k: v for k, v in patch.items() if k != 'base'})}",
        kind=base.kind,
        strategy=strategy,
        overrides={**base.overrides, **told.overrides},
    )
    found.checked()
    return found


def _phases(name: str, strategy: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """Phases with names (E29 for anything else)."""
    phases = strategy.get(part, [])
    named = isinstance(phases, list) and all(isinstance(one, dict) and type(one.get("name")) is str for one in phases)
    if not named:
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE,
            f"'{name}': {part} is {shown(phases)}.",
            "Give a list of phases with names.",
        )
    return phases
