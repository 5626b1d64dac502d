"""What became of the sites' updates in a job, by the server's records: who counted for less than it claimed, when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pfedsam.federated.records import RECEIVED_FILE, ROUNDS_FILE
from pfedsam.files import read_lines
from pfedsam.training.judgement import JUDGING


def remarks(folders: Iterable[Path]) -> list[str]:
    """One sentence for each site and kind of doubt, for the administrator; none if every update counted as it came.

    Args:
        folders: run folders of the server: of a fetched result, or of each start of a simulation.
    """
    found: dict[tuple[str, str], list[int | None]] = {}
    for folder in folders:
        for site, what, number in [*_judged(folder), *_refused(folder)]:
            found.setdefault((site, what), []).append(number)
    return [f"{site}: {what}{_in_rounds(numbers)}" for (site, what), numbers in sorted(found.items())]


def _judged(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    for one in read_lines(folder / ROUNDS_FILE):
        if one["rule"] not in JUDGING:
            continue
        for site, told in one["sites"].items():
            if told["why"]:
                what = "scaled down" if told["counted"] else "left out"
                yield site, f"its update was {what} ({_plain(told['why'])})", one["round"]
            elif told["clipped_to"] is not None:
                yield site, "its update was scaled down to what is usual", one["round"]
            if 0 < told["counted"] < told["cases"]:
                what = f"it counted as {told['counted']:g} training cases and not as the {told['cases']:g} it reports"
                yield site, what, one["round"]


def _refused(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    for one in read_lines(folder / RECEIVED_FILE):
        if not one.get("accepted"):
            yield str(one.get("client")), f"the guard refused a result ({one.get('code')}, see the server's log)", None
        elif _lowered(one):
            told = f"it counted as {one['counted']} training cases, as agreed, and not as the {one['cases']} it reports"
            yield str(one["client"]), told, one.get("round")


def _plain(why: str) -> str:
    """A reason without its numbers, so that rounds with the same reason come together."""
    return why.partition(":")[0]


def _lowered(one: dict[str, Any]) -> bool:
    return isinstance(one.get("counted"), int) and one["counted"] < one["cases"]


def _in_rounds(numbers: list[int | None]) -> str:
    known = sorted({number for number in numbers if number is not None})
    if not known:
        return f", {len(numbers)} time(s)" if len(numbers) > 1 else ""
    return f", in round{'s' if len(known) > 1 else ''} {', '.join(map(str, known))}"
