"""A site that sends nonsense. A copy of this file goes into `app/custom` of a test job."""

from __future__ import annotations

from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, MetaKey, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable

#: Ways to spoil a result, and what the guard says of each.
WAYS = {
    "not a number": "not finite",
    "infinite": "not finite",
    "huge": "larger than",
    "wrong shape": "expected float32",
    "missing key": "missing tensors",
    "extra key": "unknown tensors",
    "many cases": "must be an int",
}


class Spoil(Filter):
    """Spoils the results of one site, in another way in each round.

    Args:
        site: its name.
        ways: keys of `WAYS`, one for each round.
    """

    def __init__(self, site: str, ways: list[str]) -> None:
        super().__init__()
        self.site = site
        self.ways = ways
        self._number = -1

    def process(self, shareable: Shareable, fl_ctx: Any) -> Shareable:
        if fl_ctx.get_identity_name() != self.site or fl_ctx.get_prop(FLContextKey.TASK_NAME) != "train":
            return shareable
        if shareable.get_return_code() != ReturnCode.OK:
            return shareable
        self._number += 1
        dxo = from_shareable(shareable)
        _spoil(dxo, self.ways[self._number % len(self.ways)])
        return dxo.update_shareable(shareable)


def _spoil(dxo: DXO, way: str) -> None:
    name = sorted(dxo.data)[0]
    values = {"not a number": np.nan, "infinite": np.inf, "huge": 1e30}
    if way in values:
        dxo.data[name] = np.full_like(dxo.data[name], values[way])
    elif way == "wrong shape":
        dxo.data[name] = np.zeros((3, 3), dtype=np.float32)
    elif way == "missing key":
        del dxo.data[name]
    elif way == "extra key":
        dxo.data["image_encoder.extra"] = np.zeros(3, dtype=np.float32)
    else:
        dxo.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] = 10**12
