"""A download per site, at NVFlare's server: each site's tensors take the place of the global model's in its task.

`ScatterAndGather` broadcasts one model. NVFlare 2.9 copies the data of a broadcast once, for its first site, and hands
each site a `Shareable` of its own with its own headers; what is in the `DXO` is the same object for all. Then it fires
`BEFORE_TASK_DATA_FILTER`, applies the filters of task data, and fires `AFTER_TASK_DATA_FILTER`, in the thread of the
site that asked and under no lock. So the site's own `Shareable` gets a new `DXO` here, with copies of the tensors, and
nothing that sites share is changed. It is done before the filters, so that they see what is sent. NVFlare writes each
answer by itself: its downloads of large arrays are kept by message, not by task.

A filter that raises ends the task for all sites, and a handler that raises is passed over: the site would then train
from the global model, and the server would add its update to another one. So whatever goes wrong, this site's task is
emptied, and the others have theirs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.disabled import NO_DOWNLOAD, addressed, empty
from pfedsam.federated.plan import Plan, plan_of
from pfedsam.parameters import Manifest, check_state, update_digest
from pfedsam.training.judgement import State
from pfedsam.training.site_downloads import Outcome, SiteDownloads

logger = logging.getLogger(__name__)

#: Tasks in which a site gets its own download. Others, as `validate`, are of the global model.
OWN_TASKS = (AppConstants.TASK_TRAIN, AppConstants.TASK_CONFIGURE)
#: Folder in the server's kit, beside its jobs: a job that goes on finds there what each site downloads. It cannot be
#: carried in the job, as the global model is: a job goes to all sites.
KEPT = "pfedsam_downloads"


class ServedDownloads:
    """What each site downloads in a job; nothing of it happens in a job whose plan has no `downloads`."""

    def __init__(self) -> None:
        self._downloads: SiteDownloads | None = None

    def begin(self, fl_ctx: FLContext) -> None:
        """Take what was kept, if the job goes on from the same round of the same federation and global model.

        Args:
            fl_ctx: context of `INITIAL_MODEL_LOADED`.
        """
        plan = plan_of(fl_ctx)
        strategy = plan.checked()
        self._downloads = None
        if strategy.downloads is None:
            return
        number = int(fl_ctx.get_prop(AppConstants.START_ROUND, 0))
        downloads, path = SiteDownloads(strategy.downloads, strategy.aggregation), _kept(fl_ctx, plan)
        if number:
            try:
                known = path.is_file() and downloads.load(path, number, _digest(fl_ctx))
            except PFedSAMError as error:
                logger.error("%s", error)
                downloads, known = SiteDownloads(strategy.downloads, strategy.aggregation), False
            if known:
                logger.info("round %d: each site goes on from what it has downloaded, as in %s", number, path)
            else:
                logger.warning("round %d: %s is not of this model: all sites go on from the global one", number, path)
        self._downloads = downloads

    def next(
        self,
        fl_ctx: FLContext,
        theta: State,
        updates: Mapping[str, State],
        weights: Sequence[float],
        ceilings: Sequence[float | None],
        start: State | None,
    ) -> Outcome:
        """End a round, see `SiteDownloads.next`."""
        number = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND))
        if self._downloads is None:
            strategy = plan_of(fl_ctx).checked()
            assert strategy.downloads is not None
            self._downloads = SiteDownloads(strategy.downloads, strategy.aggregation)
        outcome = self._downloads.next(number, theta, updates, weights, ceilings, start)
        groups = outcome.told["groups"]
        what = ", ".join("+".join(group) for group in groups) or "no group with a model of its own"
        logger.info("round %d: downloads by %s: %s", number, self._downloads.settings.kind, what)
        return outcome

    def skip(self, fl_ctx: FLContext) -> None:
        """End a round without an update."""
        if self._downloads is not None:
            self._downloads.skip(int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND)))

    def keep(self, fl_ctx: FLContext) -> None:
        """Write what the next round begins with into the server's kit.

        Args:
            fl_ctx: context of `AFTER_SHAREABLE_TO_LEARNABLE`, with the new global model.
        """
        if self._downloads is None or self._downloads.round_number is None:
            return
        path = _kept(fl_ctx, plan_of(fl_ctx))
        try:
            self._downloads.save(path, _digest(fl_ctx))
        except OSError as error:
            logger.error("%s could not be written (%s): a resumed job begins from the global model", path, error)

    def replace(self, fl_ctx: FLContext) -> None:
        """Put the site's own download into the task that the server is about to send.

        Args:
            fl_ctx: context of `BEFORE_TASK_DATA_FILTER` at the server.
        """
        data, task = (fl_ctx.get_prop(key) for key in (FLContextKey.TASK_DATA, FLContextKey.TASK_NAME))
        if self._downloads is None or self._downloads.round_number is None or task not in OWN_TASKS:
            return
        try:
            _replace(data, self._downloads, addressed(fl_ctx), plan_of(fl_ctx).shared())
        except Exception as error:
            logger.exception("a site's own download could not be made")
            if isinstance(data, Shareable):
                empty(data, NO_DOWNLOAD)
                logger.error("task %s goes to one site without a model: %s", task, error)


def _replace(data: Shareable, downloads: SiteDownloads, names: set[str], expected: Manifest) -> None:
    if len(names) != 1:
        raise PFedSAMError(ErrorCode.REFUSED_BY_GUARD, f"a task is asked for by {sorted(names) or 'nobody'}.")
    (site,) = names
    number, theta = downloads.snapshot(site)
    if data.get_header(AppConstants.CURRENT_ROUND) != number:
        raise PFedSAMError(
            ErrorCode.REFUSED_BY_GUARD,
            f"site '{site}' asks for round {data.get_header(AppConstants.CURRENT_ROUND)}, this is round {number}.",
        )
    if theta is None:
        return
    dxo = from_shareable(data)
    if dxo.data_kind != DataKind.WEIGHTS:
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"a task holds {dxo.data_kind}, expected weights.")
    own = {name: np.array(tensor.numpy(), copy=True) for name, tensor in theta.items()}
    check_state(own, expected, code=ErrorCode.SHARED_TENSORS, what=f"the download of site '{site}'")
    DXO(DataKind.WEIGHTS, data=own, meta=dict(dxo.meta or {})).update_shareable(data)


def _kept(fl_ctx: FLContext, plan: Plan) -> Path:
    return Path(fl_ctx.get_engine().get_workspace().get_root_dir()) / KEPT / f"{plan.federation}.safetensors"


def _digest(fl_ctx: FLContext) -> str:
    """SHA-256 of the global model."""
    model: Any = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
    digest = hashlib.sha256()
    if isinstance(model, ModelLearnable):
        weights = model[ModelLearnableKey.WEIGHTS]
        update_digest(digest, {name: torch.as_tensor(np.asarray(value)) for name, value in weights.items()})
    return digest.hexdigest()
