"""The Dice of the global models that a site has received: the best is kept with its state, and a fall is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pfedsam.storage.state_files import BEST

#: A global model is far worse than before if its Dice is below this share of the best and lower by at least so much.
WORST_SHARE, LEAST_FALL = 0.5, 0.1
#: In what is told of a state: the best Dice of the global models that were received.
BEST_DICE = "best_dice_global"


def fall(dice: float, best: float | None) -> str:
    """What to say of a global model that is far worse than those before it; an empty text if it is not.

    Args:
        dice: of the global model that was received now, on the site's validation cases.
        best: of all before it that were validated, None if there is none.

    Returns:
        A sentence if the Dice is below `WORST_SHARE` of the best so far, and by at least `LEAST_FALL`.
    """
    if best is None or dice >= WORST_SHARE * best or best - dice < LEAST_FALL:
        return ""
    return (
        f"the Dice of the global model on this site's validation cases is {dice:.3f}, it was {best:.3f} at best. "
        "Where no new training has begun, the model may be damaged or made to do harm: ask the administrator, and "
        f"use {BEST} in the state folder until then."
    )


def best_dice_of(info: Mapping[str, Any]) -> float | None:
    """The best Dice that a state tells of the global models, None if it tells none.

    Args:
        info: of the state, with the key `BEST_DICE` if one was validated.
    """
    value = info.get(BEST_DICE)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
