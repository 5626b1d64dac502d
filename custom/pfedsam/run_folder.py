"""The folder of a simulated federation: where NVFlare's simulator leaves what, and what was sent in each round.

<run>/workspace      of the last start; the simulator empties it when it starts again
<run>/earlier/<n>    what the starts before it told of their rounds: TensorBoard's files, what was sent
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pfedsam.files import read_lines

WORKSPACE, EARLIER = "workspace", "earlier"
#: The simulator's name of every run, in the folder of each site and of the server.
RUN = "simulate_job"
#: What a site's filter wrote down of all that left it, in the folder of the site's run; see `federated.records`.
SENT_FILE = "pfedsam_sent.jsonl"
#: Stage of a record in it: a result as it left, after all filters.
LEFT = "left"


def starts(run: Path) -> list[Path]:
    """Folders laid out as NVFlare's workspace, one for each start of a run, oldest first."""
    kept = [path for path in (run / EARLIER).glob("*") if path.name.isdigit()]
    return [*sorted(kept, key=lambda path: int(path.name)), run / WORKSPACE]


def bytes_by_round(paths: Iterable[Path]) -> dict[int, int]:
    """Bytes of the tensors that left a site in each round, from its records; of a round done twice the last counts."""
    left = (one for path in paths for one in read_lines(path) if one["stage"] == LEFT and one["task"] == "train")
    return dict(sorted({one["round"]: one["bytes"] for one in left if one["tensors"]}.items()))
