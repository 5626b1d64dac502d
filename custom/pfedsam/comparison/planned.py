"""The runs of a comparison, before they are run: each strategy on each seed, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedsam.bundles import require_settings
from pfedsam.comparison.run import Run
from pfedsam.data.site_folder import site_names
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ranges import LARGEST_SEED
from pfedsam.training.catalogue import ablation_names, find_strategy, strategy_name, strategy_names


def planned_runs(
    data: Path,
    strategies: Sequence[str],
    seeds: Sequence[int],
    rounds: int,
    bundle: str,
    overrides: Mapping[str, Any],
    unseen: bool = False,
    **common: Any,
) -> list[Run]:
    """The runs of a comparison, checked: each strategy on each seed, and with `unseen` without each site in turn.

    Args:
        data: folder that holds the site folders; with `{seed}` in it each seed has one of its own, of the same sites.
        strategies, seeds, rounds, bundle, overrides, unseen: see `pfedsam.compare`.
        common: what else all runs have, see `pfedsam.comparison.run.Run`.

    Raises:
        PFedSAMError: E02 if there is no site; E16, E18, E28 or E32 for wrong settings or names.
    """
    folders = {seed: of_seed(data, seed) for seed in seeds}
    sites = _sites(folders.values())
    wrong = [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]
    if wrong:
        message = f"seed(s) {wrong} are not from 0 to {LARGEST_SEED}."
        raise PFedSAMError(ErrorCode.WRONG_SETTING, message, "Give others.")
    for name in strategies:
        require_settings(bundle, {**overrides, **find_strategy(name).overrides})
    require_own_names(strategies)
    runs = [
        Run(
            str(folders[seed].resolve()),
            sites,
            bundle,
            name,
            seed,
            rounds,
            dict(overrides),
            held_out=held_out,
            **common,
        )
        for seed, path in folders.items()
        for held_out in (sites if unseen else (None,))
        for name in strategies
    ]
    for run in runs:
        run.check()
        run.file.checked()  # an error for a rule that there is not
    return runs


def of_seed(data: Path, seed: int) -> Path:
    """The folder of a seed: `runs/few-{seed}` is `runs/few-0` for seed 0; a path without `{seed}` is that of all."""
    return Path(str(data).replace("{seed}", str(seed)))


def _sites(folders: Iterable[Path]) -> tuple[str, ...]:
    """The sites, which must be the same in all folders."""
    found = {folder: site_names(folder) for folder in folders}
    empty = [str(folder) for folder, sites in found.items() if not sites]
    if empty or len(set(found.values())) > 1:
        told = f"{empty[0]} holds no site folder" if empty else f"the seeds have other sites: {found}"
        remedy = "Lay each out as <data>/<site>/images and <data>/<site>/labels."
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"{told}.", remedy)
    return next(iter(found.values()))


def require_own_names(strategies: Sequence[str]) -> None:
    """Refuse two strategies of one name: records and tables could not tell them apart.

    Raises:
        PFedSAMError: E32 naming both.
    """
    known = {name: name for name in (*strategy_names(), *ablation_names())}
    for path in strategies:
        name = strategy_name(path)
        other = known.setdefault(name, path)
        if other != path and find_strategy(other) != find_strategy(path):
            message = f"'{path}' and '{other}' are two strategies named '{name}'."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Give each a `name` of its own.")
