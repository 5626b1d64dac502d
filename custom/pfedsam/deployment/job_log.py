"""How far a job is and what its sites did, by the server's own log of it: the lines that our components write there.

The log is a part of what whoever submitted the job may download anyway. It names sites, never cases: nothing is sent
for it that is not sent without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from pfedsam.errors import REFUSED, ErrorCode, code_of_reply
from pfedsam.storage.progress import Pace

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) - \S+ - [A-Z]+ - (.*)")
_STARTED = re.compile(r"Round (\d+) started\.$")
_CLOSED = re.compile(r"Round (\d+) finished\.$")
_TOOK_PART = re.compile(r"round (\d+): \d+ of \d+ sites took part: ([^;]*)(?:; missing: (.*))?$")
_UPDATE = re.compile(r"round (\d+): site (\S+): (\S+) cases.*?, norm (\S+?),.*\bshare (\S+)$")
_DICE = re.compile(r"round (\d+): site (\S+): validation Dice of the global model (\S+)$")
_FINAL = re.compile(r"final personal phase: site (\S+) (is done|failed.*)$")
_GUARD = re.compile(r"result of site (\S+) refused: (E\d\d)\b")
_REFUSED = re.compile(r"\bpeer=([^,\]]+),.*\bpeer_rc=SITE_REFUSED:(E\d\d)\b")


@dataclass
class SiteSeen:
    """What a job's log tells of a site.

    Attributes:
        rounds: in so many rounds its update counted.
        missing: rounds in which it was expected and nothing of it counted.
        last: the last round in which it took part, None before.
        cases: its training cases, as counted; None where the log does not say (the plain mean).
        norm: L2 norm of its last update, None as above.
        share: of the last mean, None as above.
        dice: validation Dice of the global model at this site, None where it tells none.
        problem: code of its last refusal, by itself or by the server's guard; empty if it has taken part since then.
        final: what became of its final personal phase.
    """

    rounds: int = 0
    missing: list[int] = field(default_factory=list)
    last: int | None = None
    cases: float | None = None
    norm: float | None = None
    share: float | None = None
    dice: float | None = None
    problem: str = ""
    final: str = ""


@dataclass
class JobSeen:
    """What a job's log tells.

    Attributes:
        sites: by name, in the order of their names.
        first, current: the first and the last round that has started, None before.
        closed: the last round that is over, None before.
        at: time of the last line, in seconds of the server's clock; 0 if there is none.
        pace: of the rounds.
    """

    sites: dict[str, SiteSeen] = field(default_factory=dict)
    first: int | None = None
    current: int | None = None
    closed: int | None = None
    at: float = 0.0
    pace: Pace = field(default_factory=Pace)

    def left(self, end: int, waited: float = 0.0) -> float | None:
        """Seconds until the last round is over; the final personal phase and the evaluation come on top.

        Args:
            end: number of the last round plus one.
            waited: seconds since the last line of the log.

        Returns:
            None before a round is over.
        """
        return None if self.first is None else self.pace.left(end - self.first, self.at + waited)

    def site(self, name: str) -> SiteSeen:
        """A site, which is known from now on."""
        return self.sites.setdefault(name, SiteSeen())


def read_job_log(lines: Iterable[str], expected: Iterable[str] = ()) -> JobSeen:
    """What the lines of a job's log at the server tell; lines of others are passed over.

    Args:
        lines: of `log.txt`, from the first one, or from a later one where the log was cut.
        expected: names of the sites that the job was handed to.
    """
    seen = JobSeen({name: SiteSeen() for name in sorted(expected)})
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        seen.at = datetime.fromisoformat(found[1]).timestamp() + int(found[2]) / 1000
        for pattern, take in _TAKERS:
            match = pattern.search(found[3])
            if match is not None:
                take(seen, match)
                break
    seen.sites = dict(sorted(seen.sites.items()))
    return seen


def refusal(code: str) -> str:
    """What a code means that a site has refused a task with, or the guard a result."""
    if code == ErrorCode.DEPLOYMENT:  # of the learner only `federated.versions` says it
        return "its versions of pfedsam and nvflare are not the server's"
    known = code_of_reply(f"{REFUSED}:{code}")
    return known.meaning if known else "an unknown code"


def _started(seen: JobSeen, match: re.Match[str]) -> None:
    seen.current = int(match[1])
    if seen.first is None:
        seen.first = seen.current
        seen.pace.step(0, seen.at)


def _closed(seen: JobSeen, match: re.Match[str]) -> None:
    seen.closed = int(match[1])
    if seen.first is None:  # the log was cut
        seen.first = seen.closed + 1
    seen.pace.step(seen.closed + 1 - seen.first, seen.at)


def _took_part(seen: JobSeen, match: re.Match[str]) -> None:
    for name in _names(match[2]):
        site = seen.site(name)
        site.rounds, site.last, site.problem = site.rounds + 1, int(match[1]), ""
    for name in _names(match[3]):
        seen.site(name).missing.append(int(match[1]))


def _update(seen: JobSeen, match: re.Match[str]) -> None:
    site = seen.site(match[2])
    site.cases, site.norm, site.share = (_number(match[place]) for place in (3, 4, 5))


def _dice(seen: JobSeen, match: re.Match[str]) -> None:
    seen.site(match[2]).dice = _number(match[3])


def _final(seen: JobSeen, match: re.Match[str]) -> None:
    seen.site(match[1]).final = "done" if match[2] == "is done" else match[2]


def _problem(seen: JobSeen, match: re.Match[str]) -> None:
    seen.site(match[1]).problem = match[2]


_TAKERS: tuple[tuple[re.Pattern[str], Callable[[JobSeen, re.Match[str]], None]], ...] = (
    (_STARTED, _started),
    (_CLOSED, _closed),
    (_TOOK_PART, _took_part),
    (_UPDATE, _update),
    (_DICE, _dice),
    (_FINAL, _final),
    (_GUARD, _problem),
    (_REFUSED, _problem),
)


def _names(text: str | None) -> list[str]:
    return [name for name in (text or "").split(", ") if name]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
