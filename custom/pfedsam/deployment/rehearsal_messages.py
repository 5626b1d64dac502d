"""What the command of a rehearsal and the process of its small round tell each other."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from pfedsam.deployment.rehearsal_boundary import Leaving


class Asked(BaseModel):
    """What to rehearse.

    Attributes:
        plan: arguments of `pfedsam.federated.plan.Plan`.
        filters: the job's filters behind ours, as its configuration names them, see `rehearsal_terms`.
        folder: the site folder.
        site: name of the site.
        work: temporary folder, closed to others; state, prepared volumes and the bundle's output go there.
        first: the case of each section that is loaded first, see `pfedsam.training.rehearsal`.
        cases: at most so many training cases are trained on.
        all_cases: training cases of the site, which is what would be sent.
        keeps_prepared: whether the site keeps prepared volumes.
        may_share, may_tell, label_map, checkpoint, device, threads, least_validation_cases: of the site's settings.
    """

    plan: dict[str, Any]
    filters: list[dict[str, Any]] = []
    folder: str
    site: str
    work: str
    first: dict[str, str]
    cases: int
    all_cases: int
    keeps_prepared: bool = False
    may_share: tuple[str, ...] | None = None
    may_tell: tuple[str, ...] | None = None
    label_map: dict[str, str] | None = None
    checkpoint: str | None = None
    device: str = "auto"
    threads: int | None = None
    least_validation_cases: int = 1


class Measured(BaseModel):
    """What a small round was.

    Attributes:
        loaded: the first batch of each section, in words.
        device, threads: that were computed on.
        fingerprint: of the base weights and the network's settings; it must be the same at all sites.
        cases, validated, validation_cases: trained on, validated on, and validation cases in all.
        steps: optimiser steps of one epoch of every phase of a round, by phase; of the final phases, too.
        seconds: of `open`, `validate`, `first` and `later` (two epochs of a round's training), `final`.
        dice_global, dice_personal: on the validation cases, of models that have hardly trained.
        state_bytes, prepared_bytes, prepared_cases: on disk.
        memory_bytes, gpu_bytes: peaks of this process.
        leaves: what would leave the site with the training's result.
    """

    loaded: list[str]
    device: str
    threads: int
    fingerprint: str
    cases: int
    validated: int
    validation_cases: int
    steps: dict[str, int]
    seconds: dict[str, float]
    dice_global: float
    dice_personal: float | None
    state_bytes: int
    prepared_bytes: int
    prepared_cases: int
    memory_bytes: int
    gpu_bytes: int
    leaves: Leaving
