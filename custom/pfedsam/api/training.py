"""One site that trains alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pfedsam import defaults
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ownership import claim, require_free

if TYPE_CHECKING:
    from pfedsam.storage.site_model import SiteModel

#: Called with a line for each thing that one waits for.
Event: TypeAlias = Callable[[str], None]


def train_site(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] = "runs/train_site",
    *,
    bundle: str = defaults.BUNDLE,
    strategy: str = "local_only",
    rounds: int = 6,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    force: bool = False,
    event: Event | None = None,
) -> SiteModel:
    """Train one site alone. Nothing is sent, and NVFlare is not needed.

    The model is written to `<out>/model.safetensors`, for `load_model(out)`. A training that was stopped goes on after
    its last round when it is called again with the same arguments.

    Args:
        folder: site folder, with `images` and `labels`.
        out: folder to write to; it stays at the site.
        bundle: name of an installed bundle.
        strategy: name or `.json` file of a strategy of kind `local`.
        rounds: number of rounds, each with the epochs that the strategy says; its final phase follows.
        seed: of the draws; the test fold is `seed` modulo `folds`.
        settings: overrides of the bundle, see `pfedsam settings`.
        device: `auto`, or a torch device.
        force: replace a model that is in `out`, or write into a folder that is not ours.
        event: called with a line after each round.

    Returns:
        The site's model, as it was written.

    Raises:
        PFedSAMError: E02 to E09 for what is wrong with the site's data, E10 for base weights, E18, E28, E30 or E32 for
            wrong settings or names, E24 if `out` holds a model already or is not ours.

    Example:
        >>> pfedsam.train_site("data/hospital_a", "runs/hospital_a", rounds=3)  # doctest: +SKIP
        >>> pfedsam.load_model("runs/hospital_a").segment("scan.nii.gz")  # doctest: +SKIP
    """
    from pfedsam.bundles import require_settings
    from pfedsam.comparison.run import Run
    from pfedsam.storage.model_files import TRAINED
    from pfedsam.storage.site_model import read
    from pfedsam.training.catalogue import find_strategy
    from pfedsam.training.federation import run_federation
    from pfedsam.training.preparation import require_trainable

    folder, out = Path(folder).resolve(), Path(out)
    file = find_strategy(strategy)
    if file.kind != "local":
        message = f"'{strategy}' does not train a site alone: it is of kind '{file.kind}'."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Take local_only, or call simulate or compare.")
    overrides = {**(settings or {}), **file.overrides, "seed": seed}
    require_settings(bundle, overrides)
    require_trainable(folder, bundle, overrides)
    claim(out, "site training", force)
    require_free(out / TRAINED, force)
    # a run of one site: its folder in `out` is named by all that the training depends on
    run = Run(str(folder.parent), (folder.name,), bundle, strategy, seed, rounds, dict(settings or {}))
    federation = replace(run.federation(out), settings={"device": device})
    run_federation(federation, event, aggregated=False)
    model = read(federation.model_of(folder.name))
    model.moments = {}
    model.save(out / TRAINED)
    return model
