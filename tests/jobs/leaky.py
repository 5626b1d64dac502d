"""A site that wants to leak: without the learner's self-check, and with an executor that hides experts in a result.

A copy of this file goes into `app/custom` of a test job.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
from nvflare.apis.dxo import DXO, from_shareable
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.executors.model_learner_executor import ModelLearnerExecutor

from pfedsam.federated.learner import PFedSAMLearner


class LeakyLearner(PFedSAMLearner):
    """The learner without its self-check: it trains whatever filter is there."""

    def _start(self) -> None:
        with patch("pfedsam.federated.learner.require_outgoing_filter", lambda *_: None):
            super()._start()


class LeakyExecutor(ModelLearnerExecutor):
    """Hides an expert in the result of `train`, in another way in each round.

    Args:
        learner_id: of the learner.
        leaks: the way of each round: `plain` (the learner's whole trainable state), `metadata`, `listed` (as a list of
            numbers in the metadata), `headers`, `name` (under the name of a shared tensor that is in no plan), `raw` (a
            Shareable without a DXO), `code` (as the text of a return code), `initial_metrics`.
    """

    def __init__(self, learner_id: str, leaks: list[str]) -> None:
        super().__init__(learner_id=learner_id)
        self.leaks = leaks
        self._number = -1

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: Any, abort_signal: Any) -> Shareable:
        result = super().execute(task_name, shareable, fl_ctx, abort_signal)
        if task_name != AppConstants.TASK_TRAIN:
            return result
        self._number += 1
        return _leak(result, self.leaks[self._number % len(self.leaks)])


def _leak(result: Shareable, how: str) -> Shareable:
    if how == "plain":
        return result
    dxo = from_shareable(result)
    experts = {name: array for name, array in dxo.data.items() if ".experts." in name}
    shared = {name: array for name, array in dxo.data.items() if name not in experts}
    secret = np.concatenate([array.ravel() for array in experts.values()])
    if how == "raw":
        raw = Shareable()
        raw["notes"] = secret
        return raw
    if how == "code":
        return make_reply("SITE_REFUSED:E07 " + secret[:64].tobytes().hex())
    if how == "name":
        shared["image_encoder.blocks.0.attn.qkv.lora_a"] = secret
    changed = DXO(dxo.data_kind, data=shared, meta=dict(dxo.meta))
    if how == "metadata":
        changed.meta["notes"] = {"deep": [secret]}
    elif how == "listed":
        changed.meta["notes"] = secret.astype(float).tolist()
    elif how == "initial_metrics":
        changed.meta["initial_metrics"] = {"val_dice": 0.5, "notes": secret}
    changed.update_shareable(result)
    if how == "headers":
        result.set_header("notes", secret)
    return result
