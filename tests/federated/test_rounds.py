"""What the administrator is told of a finished job."""

from __future__ import annotations

from pathlib import Path

from pfedsam.federated.records import RECEIVED_FILE, ROUNDS_FILE, append_record
from pfedsam.federated.rounds import remarks


def judged(cases: float, counted: float, clipped_to: float | None = None, why: str = "") -> dict:
    return {"cases": cases, "counted": counted, "norm": 1.0, "clipped_to": clipped_to, "cosine": None, "why": why}


def test_each_site_and_doubt_is_one_sentence(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for number in range(3):
        sites = {"site-1": judged(5, 5), "site-2": judged(1e6, 15), "site-3": judged(5, 5, clipped_to=2.0)}
        if number == 1:
            sites["site-3"] = judged(5, 0, why="it points back: -0.31")
            sites["site-1"] = judged(5, 5, clipped_to=1.0, why="it points back: -0.11")
        append_record(folders[number // 2], ROUNDS_FILE, {"round": number, "rule": "norm_clipped", "sites": sites})
    refused = {"client": "site-4", "task": "train", "accepted": False, "code": "E20"}
    append_record(folders[0], RECEIVED_FILE, refused)
    append_record(folders[1], RECEIVED_FILE, refused)
    lowered = {"client": "site-1", "task": "train", "round": 2, "accepted": True, "cases": 9, "counted": 5, "norm": 1.0}
    append_record(folders[1], RECEIVED_FILE, lowered)
    append_record(folders[1], RECEIVED_FILE, {**lowered, "client": "site-5", "cases": 5})
    assert remarks(folders) == [
        "site-1: it counted as 5 training cases, as agreed, and not as the 9 it reports, in round 2",
        "site-1: its update was scaled down (it points back), in round 1",
        "site-2: it counted as 15 training cases and not as the 1e+06 it reports, in rounds 0, 1, 2",
        "site-3: its update was left out (it points back), in round 1",
        "site-3: its update was scaled down to what is usual, in rounds 0, 2",
        "site-4: the guard refused a result (E20, see the server's log), 2 time(s)",
    ]
    assert remarks([tmp_path / "nothing"]) == []
