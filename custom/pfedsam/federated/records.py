"""What a site's filter wrote down of everything that left, one JSON object a line in the job's run folder."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pfedsam.files import append_line
from pfedsam.storage.run_folder import LEFT, ROUNDS_FILE, SENT_FILE

#: Written by `filters.IncomingGuard` at the server; `SENT_FILE` by `filters.PersonalisedFilter` at a site;
#: `ROUNDS_FILE` by `aggregators.RobustAggregator` at the server: what became of each site's update, one record a round.
RECEIVED_FILE = "pfedsam_received.jsonl"
#: Written by `least_sites.LeastSites` at the server: who took part in a round and who was missing, one record a round.
SITES_FILE = "pfedsam_sites.jsonl"
#: Stages of a record in `SENT_FILE`: a result as the allow-list let it pass, the same after the filters behind it, and
#: the scalars of the whole run, which go around the filters.
CHECKED, SCALARS = "checked", "scalars"
#: Lines of a site's log that a person waits for.
PROGRESS_LINE = re.compile(r"- INFO - (round \d+: global Dice.*|round \d+, phase.*|final personal phase: global.*)")


def append_record(run_dir: Path, file_name: str, record: dict[str, Any]) -> None:
    """Write one record, with the time."""
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    append_line(run_dir / file_name, {"time": time, **record})


__all__ = [
    "CHECKED",
    "LEFT",
    "PROGRESS_LINE",
    "RECEIVED_FILE",
    "ROUNDS_FILE",
    "SCALARS",
    "SENT_FILE",
    "SITES_FILE",
    "append_record",
]
