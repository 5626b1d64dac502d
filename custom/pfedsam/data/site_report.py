"""What is known of a site's data: a row for each case, and findings.

A report names cases, files and patients, so it stays at the site; only the code of a finding may leave.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pfedsam.errors import PFedSAMError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing to know about a site.

    Args:
        code: of `pfedsam.errors.ErrorCode`.
        severity: an `error` forbids training, a `warning` should be looked at, a `note` is for information.
        case: case name, or "" if it concerns the site.
        message: what was found where.
        remedy: what to do next.
    """

    code: str
    severity: Severity
    case: str
    message: str
    remedy: str = ""


@dataclass
class CaseRow:
    """What one case holds.

    Args:
        name: case name.
        section: section of the split, or "" if it is in none.
        shape: voxels of each axis.
        spacing: millimetres of each axis, or None for a format that has none.
        orientation: axis codes, for example `RAS`, or "".
        dtype: data type of the image file.
        label_values: values of the label, after 0/255 is mapped.
        foreground: label voxels above 0, without those that are unknown.
        unknown: share of the label of which nobody knows what is there.
        unseen: how many of them lie outside the bundle's field of view.
        empty_slices: share of the slices (last axis) without foreground, or None for a 2-D image.
        intensity: least and greatest finite value of the image, or None.
    """

    name: str
    section: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] | None = None
    orientation: str = ""
    dtype: str = ""
    label_values: tuple[float, ...] = ()
    foreground: int = 0
    unknown: float = 0.0
    unseen: int = 0
    empty_slices: float | None = None
    intensity: tuple[float, float] | None = None


@dataclass
class SiteReport:
    """Everything that was found in a site folder."""

    folder: str
    findings: list[Finding] = field(default_factory=list)
    cases: list[CaseRow] = field(default_factory=list)
    colour: bool = False
    field_of_view: float | None = None
    #: Names of cases by what is to be said of them, and the share of an image outside the field of view.
    remarks: dict[str, list[str]] = field(default_factory=dict)
    outside: dict[str, float] = field(default_factory=dict)
    #: Hash of a case's voxels, by name.
    contents: dict[str, str] = field(default_factory=dict)
    #: What was loaded through the bundle's own transforms, in words.
    loaded: list[str] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings that forbid training."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dictionaries and lists, for JSON."""
        content = asdict(self)
        return {"folder": self.folder, "ok": self.ok} | {key: content[key] for key in ("findings", "cases", "loaded")}

    def add(self, code: str, severity: Severity, case: str, message: str, remedy: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(code, severity, case, message, remedy))

    def remark(self, text: str, case: str) -> None:
        """Keep a remark, which is added as one note for all its cases."""
        names = self.remarks.setdefault(text, [])
        if case not in names:
            names.append(case)

    def take(self, part: SiteReport) -> None:
        """Add all that was found of some cases."""
        self.cases += part.cases
        known = {finding.message for finding in self.findings}
        self.findings += [finding for finding in part.findings if finding.message not in known]
        for text, names in part.remarks.items():
            for name in names:
                self.remark(text, name)
        self.outside |= part.outside
        self.contents |= part.contents

    def add_error(self, error: PFedSAMError, case: str = "") -> None:
        """Add an error that was raised, once."""
        if not any(finding.message == error.message for finding in self.findings):
            self.add(error.code, "error", case, error.message, error.remedy)


def require_valid(report: SiteReport) -> None:
    """Raise the first error of a report, with the count of the others.

    Raises:
        PFedSAMError: with the code, the sentence and the remedy of the first error.
    """
    if report.errors:
        first, *others = report.errors
        more = f" (and {len(others)} more)" if others else ""
        raise PFedSAMError(first.code, first.message + more, first.remedy)
