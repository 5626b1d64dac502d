"""What a site's filter wrote down of everything that left, one JSON object a line in the job's run folder."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

#: Written by `filters.PersonalisedFilter` at a site and by `filters.IncomingGuard` at the server.
SENT_FILE = "pfedsam_sent.jsonl"
RECEIVED_FILE = "pfedsam_received.jsonl"
#: Stages of a record in `SENT_FILE`: a result as the allow-list let it pass, the same after the filters behind it, and
#: the scalars of the whole run, which go around the filters.
CHECKED, LEFT, SCALARS = "checked", "left", "scalars"
#: Lines of a site's log that a person waits for.
NEWS = re.compile(r"- INFO - (round \d+: global Dice.*|round \d+, phase.*|final personal phase: global.*)")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file; none if there is no file, a line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def bytes_by_round(path: Path) -> list[int]:
    """Bytes of the tensors that left the site in each round."""
    left = (one for one in read_records(path) if one["stage"] == LEFT and one["task"] == "train" and one["tensors"])
    return list({one["round"]: one["bytes"] for one in left}.values())


def append_record(run_dir: Path, file_name: str, record: dict[str, Any]) -> None:
    """Write one record, with the time."""
    run_dir.mkdir(parents=True, exist_ok=True)
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with (run_dir / file_name).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time, **record}) + "\n")
