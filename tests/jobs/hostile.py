"""A hostile site. A copy of this file goes into `app/custom` of a test job: the last filter of the site's results."""

from __future__ import annotations

from typing import Any

from nvflare.apis.dxo import MetaKey, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.shareable import Shareable

#: What each attack does to an update.
ATTACKS = ("cases", "scale", "flip", "dice", "old round", "all")


class Attack(Filter):
    """Changes what the site sends after training, in the same way in every round.

    Args:
        attacks: some of `ATTACKS`; `all` is all but the old round at once. `old round` says in every round, also in
            the first, that the update is of the round before.
    """

    def __init__(self, attacks: list[str]) -> None:
        super().__init__()
        self.attacks = attacks

    def process(self, shareable: Shareable, fl_ctx: Any) -> Shareable:
        if fl_ctx.get_prop(FLContextKey.TASK_NAME) != "train" or shareable.get_return_code() != ReturnCode.OK:
            return shareable
        dxo = from_shareable(shareable)
        chosen = {"cases", "scale", "flip", "dice"} if "all" in self.attacks else set(self.attacks)
        factor = (1000 if "scale" in chosen else 1) * (-1 if "flip" in chosen else 1)
        dxo.data = {name: (factor * value).astype(value.dtype) for name, value in dxo.data.items()}
        if "cases" in chosen:
            dxo.meta[MetaKey.NUM_STEPS_CURRENT_ROUND] = 10**6
        if "dice" in chosen:
            dxo.meta[MetaKey.INITIAL_METRICS] = {"val_dice": 1.0}
        if "old round" in chosen:
            dxo.meta["pfedsam_round"] -= 1
        return dxo.update_shareable(shareable)
