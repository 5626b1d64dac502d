"""What was there at the start is not looked at again; what a round leaves is collected."""

from __future__ import annotations

import gc
import weakref

from pfedsam.federated.collection import leave_out_what_is_there


class Circle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.own = self


def test_garbage_of_later_is_collected_and_the_rest_is_left_alone() -> None:
    kept = gc.get_freeze_count()
    try:
        leave_out_what_is_there()
        assert gc.get_freeze_count() > max(kept, 10_000)
        gone = weakref.ref(Circle())
        assert gone() is not None
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
