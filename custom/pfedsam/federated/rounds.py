"""What became of the sites' updates in a job, by the server's records: who was missing or counted less, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pfedsam.federated.records import RECEIVED_FILE, ROUNDS_FILE, SITES_FILE
from pfedsam.files import read_lines
from pfedsam.training.judgement import JUDGING


def remarks(folders: Iterable[Path]) -> list[str]:
    """One sentence for each site and kind of doubt, for the administrator; none if every update counted as it came.

    Args:
        folders: run folders of the server: of a fetched result, or of each start of a simulation.
    """
    doubts: dict[tuple[str, str], list[int | None]] = {}
    for folder in folders:
        for site, what, number in [*_missing(folder), *_judged(folder), *_refused(folder)]:
            doubts.setdefault((site, what), []).append(number)
    return [f"{site}: {what}{_in_rounds(numbers)}" for (site, what), numbers in sorted(doubts.items())]


def attendance(folders: Iterable[Path]) -> str:
    """In how many of the rounds each site took part, for example `a 3 of 3 rounds, b 2 of 3 rounds`.

    Args:
        folders: run folders of the server, as in `remarks`.

    Returns:
        An empty text if there is no record of any round.
    """
    records = [record for folder in folders for record in read_lines(folder / SITES_FILE)]
    # of a round that was done again, the last one counts
    rounds = {record["round"]: record for record in records}
    counts = Counter(site for record in rounds.values() for site in record["sites"])
    sites = sorted({site for record in rounds.values() for site in (*record["sites"], *record["missing"])})
    return ", ".join(f"{site} {counts[site]} of {len(rounds)} rounds" for site in sites)


def _missing(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    for record in read_lines(folder / SITES_FILE):
        for site in record["missing"]:
            yield site, "it was missing", record["round"]


def _judged(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    for record in read_lines(folder / ROUNDS_FILE):
        if record["rule"] not in JUDGING:
            continue
        for site, judgement in record["sites"].items():
            if judgement["why"]:
                what = "scaled down" if judgement["counted"] else "left out"
                yield site, f"its update was {what} ({_plain(judgement['why'])})", record["round"]
            elif judgement["clipped_to"] is not None:
                yield site, "its update was scaled down to what is usual", record["round"]
            if 0 < judgement["counted"] < judgement["cases"]:
                counted, cases = (f"{judgement[key]:g}" for key in ("counted", "cases"))
                yield site, f"it counted as {counted} training cases and not as the {cases} it reports", record["round"]


def _refused(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    for record in read_lines(folder / RECEIVED_FILE):
        if not record.get("accepted"):
            code = record.get("code")
            yield str(record.get("client")), f"the guard refused a result ({code}, see the server's log)", None
        elif _lowered(record):
            counted, cases = record["counted"], record["cases"]
            sentence = f"it counted as {counted} training cases, as agreed, and not as the {cases} it reports"
            yield str(record["client"]), sentence, record.get("round")


def _plain(why: str) -> str:
    """A reason without its numbers, so that rounds with the same reason come together."""
    return why.partition(":")[0]


def _lowered(record: dict[str, Any]) -> bool:
    return isinstance(record.get("counted"), int) and record["counted"] < record["cases"]


def _in_rounds(numbers: list[int | None]) -> str:
    known = sorted({number for number in numbers if number is not None})
    if not known:
        return f", {len(numbers)} time(s)" if len(numbers) > 1 else ""
    return f", in round{'s' if len(known) > 1 else ''} {', '.join(map(str, known))}"
