"""What was found of each case of a site before, so that a case whose files are the same is not read again.

The file names cases and says what is wrong with them: it stays at the site, and it forgets a case that is gone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pfedsam
from pfedsam.data.site_folder import Case
from pfedsam.data.site_report import CaseRow, Finding, SiteReport
from pfedsam.errors import PFedSAMError
from pfedsam.files import content_hash, hash_of, read_object, write_atomically

logger = logging.getLogger(__name__)

#: Counts up when the file changes.
FORM = 1


class KnownChecks:
    """Checks of cases by the content of their files.

    Args:
        path: of the file; None to remember nothing.
        about: all else that decides what is found, for JSON.
    """

    def __init__(self, path: Path | None, about: Any) -> None:
        self.path = path
        self._about = [FORM, pfedsam.__version__, about]
        self._before = _read(path)
        self._now: dict[str, Any] = {}

    def find(self, case: Case) -> SiteReport | None:
        """What was found of a case, None if it is not known or its files have changed."""
        record = self._before.get(case.name)
        try:
            return _report(record) if record and record["key"] == self._key(case) else None
        # a file that somebody has edited: the case is read again
        except (KeyError, TypeError, ValueError):
            return None

    def keep(self, case: Case, part: SiteReport) -> None:
        """Remember what was found of a case, if it may be trained on: the others are read until they are mended."""
        if self.path is not None and part.ok:
            self._now[case.name] = {"key": self._key(case), **asdict(part)}

    def save(self) -> None:
        """Write the file, of the cases that were kept; if it cannot be written, the log says so."""
        if self.path is None or self._now == self._before:
            return
        try:
            write_atomically(self.path, json.dumps(self._now).encode())
        except OSError as error:
            logger.warning("the checks cannot be kept (%s): the next job reads all cases again", error)

    def _key(self, case: Case) -> str:
        files = [path for path in (case.image, case.label) if path is not None]
        return hash_of([self._about, [[str(path), content_hash(path)] for path in files]])


def _report(record: Mapping[str, Any]) -> SiteReport:
    (row,), findings = record["cases"], [Finding(**finding) for finding in record["findings"]]
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    rest = {name: record[name] for name in ("folder", "colour", "field_of_view", "remarks", "outside", "contents")}
    return SiteReport(findings=findings, cases=[CaseRow(**values)], **rest)


def _read(path: Path | None) -> dict[str, Any]:
    """The records by case; none if the file is missing or spoilt: all cases are read then."""
    if path is None or not path.exists():
        return {}
    try:
        return read_object(path, "")
    except PFedSAMError:
        return {}
