"""Which sites a server found alike, and what each downloaded, by its records: for the page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pfedsam.files import read_lines
from pfedsam.storage.run_folder import ROUNDS_FILE, RUN, starts


def similar_sites(run: Path) -> dict[str, Any] | None:
    """What the server wrote of the last round with downloads that may differ between sites; None if there is none.

    Args:
        run: run folder of a simulation.

    Returns:
        `round`; `rounds`, the groups of each round as a text, by its number; `names` of the sites; `sites`, the rows of
        a table: name, its cosines to all, and its shares of all.
    """
    records = [record for start in starts(run) for record in read_lines(start / "server" / RUN / ROUNDS_FILE)]
    told = {record["round"]: record["downloads"] for record in records if record.get("downloads")}
    if not told:
        return None
    last = max(told)
    rows = zip(told[last]["sites"], told[last]["similarity"], told[last]["shares"], strict=True)
    return {
        "round": last,
        "rounds": {number: _groups(told[number]) for number in sorted(told)},
        "names": told[last]["sites"],
        "sites": list(rows),
    }


def _groups(told: dict[str, Any]) -> str:
    if any(told["shares"][0] != row for row in told["shares"]) and not told["groups"]:
        return "each site has a mixture of its own"
    return "; ".join(", ".join(group) for group in told["groups"]) or "all sites have the mean of all"
