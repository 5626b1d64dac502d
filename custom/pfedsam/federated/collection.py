"""Python's garbage collector in a job's processes: it looks at what rounds leave, not at the libraries.

NVFlare collects garbage at the server after every round (`memory_gc_rounds` of its workflow), and Python does at a
site. Each time all objects of torch, MONAI and NVFlare are gone through, which stay to the end: a pause between two
rounds in which nobody trains.
"""

from __future__ import annotations

import gc


def leave_out_what_is_there() -> None:
    """Collect once, and never look again at the objects that are there now: call it when a job has been set up."""
    gc.collect()
    gc.freeze()
