"""A personal model for a hospital that took no part in the federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam import defaults
from pfedsam.data.checks import check_site
from pfedsam.data.expected import expected_by
from pfedsam.data.site_report import require_valid
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.inference.global_start import GlobalStart
from pfedsam.parameters import manifest
from pfedsam.storage.site_model import write
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.site import SiteTrainer


def fit_personal(
    bundle: str,
    site: Path,
    start: GlobalStart,
    out: Path,
    strategy: str = defaults.STRATEGY,
    overrides: Mapping[str, Any] | None = None,
    cases: int | None = None,
    checkpoint: str | None = None,
) -> Path:
    """Run a strategy's final personal phase beside a global model.

    Args:
        bundle: name of an installed bundle.
        site: site folder; its training section is trained on.
        start: the global model, see `pfedsam.inference.global_start.find_start`.
        out: folder to write `model.safetensors` to.
        strategy: name of a strategy with a final phase.
        overrides: of the bundle, as in the federation.
        cases: at most so many training cases.
        checkpoint: path of the base weights on this machine.

    Returns:
        The model file.

    Raises:
        PFedSAMError: what is wrong with the site (E02 to E09, among them a label that the bundle does not know), E10 to
            E12 if the global model does not fit, E16 to E18 for wrong settings, E32 for a strategy whose final phase
            trains nothing here.
    """
    settings = dict(overrides or {})
    _require_final(strategy, settings)
    require_valid(check_site(site, **expected_by(bundle, settings)))
    local = SiteTrainer(
        bundle, site, find_strategy(strategy).checked(), settings, out, checkpoint=checkpoint, cases=cases
    )
    local.open()
    theta, fingerprint = start.tensors(manifest(local.network, local.strategy.roles, "shared"))
    local.receive(theta, fingerprint)
    number = start.round + 1
    local.finish(number)
    path = out / "model.safetensors"
    write(path, local.model(round=number, final=True))
    return path


def _require_final(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse a strategy without a final phase, and experts where the global model's network has none."""
    strategy = find_strategy(name).checked()
    if not strategy.final:
        message = f"the strategy '{name}' has no final phase, so it makes no personal model."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Take --strategy pfedsam, or fedavg_lora_ft.")
    if settings.get("experts") == 0 and "experts" in strategy.personal:
        message = f"the strategy '{name}' fits experts, and the network of this global model has none (experts=0)."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Take --strategy fedavg_lora_ft, which fits no experts.")
