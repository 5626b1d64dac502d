"""The split that `datalist.json` writes down: its entries as cases of the site, and all that is wrong in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedsam.data.datalist_file import entry_name, listed_parts, read_content, wrong
from pfedsam.data.sections import SECTIONS
from pfedsam.data.site_folder import Case, Split, files_by_name, read_site
from pfedsam.data.suffixes import case_name
from pfedsam.errors import PFedSAMError, few, shown


def listed_split(
    folder: str | Path, seed: int = 0, content: dict[str, Any] | None = None
) -> tuple[Split, list[PFedSAMError]] | None:
    """The sections of `datalist.json` with everything that is wrong in it, or None if there are no sections.

    Args:
        folder: site folder.
        seed: chooses the fold, if there are folds. What is wrong in the others is told, too.
        content: of the file, if it shall be another than what is there.

    Raises:
        PFedSAMError: E08 if the file is not readable; E02 or E09 as `read_site`.
    """
    folder = Path(folder)
    content = read_content(folder) if content is None else content
    parts = listed_parts(content)
    if not parts:
        return None
    named = any(_has_names(part) for part in parts.values())
    known = {case.name: case for case in read_site(folder)} if named else {}
    listing = _Listing(folder, content, known, files_by_name(folder / "labels", "labels"))
    read = [listing.read(part, told) for told, part in parts.items()]
    problems = [*(problem for _, found in read for problem in found), *_differing(folder, parts)]
    # what is wrong in all folds is told once
    return read[seed % len(read)][0], list({error.message: error for error in problems}.values())


def emptied(folder: str | Path, sections: Split) -> list[PFedSAMError]:
    """The error of a listed split that cannot train because all images of a section are absent; else none.

    It is apart from what is wrong in the file: other folds can train, and `pfedsam split` can extend it.
    """
    empty = [section for section in ("training", "validation") if not sections[section]]
    what = f"the images of all cases for {' and '.join(empty)} are absent"
    remedy = f"Restore them, take another seed, or add patients and call `pfedsam split {folder}`."
    return [wrong(Path(folder), what, remedy)] if empty else []


@dataclass(frozen=True)
class _Listing:
    """What the entries of sections are looked up in: the content of `datalist.json`, cases and labels by name."""

    folder: Path
    content: Mapping[str, Any]
    known: Mapping[str, Case]
    labels: Mapping[str, Path]

    def read(self, part: Mapping[str, Any], told: str) -> tuple[Split, list[PFedSAMError]]:
        """The sections of a part, and what is wrong in them; `told` names the part."""
        absent = set(self.content.get("absent", []))
        sections: Split = {section: [] for section in SECTIONS}
        problems: list[PFedSAMError] = []
        for section in SECTIONS:
            entries = part.get(section, [] if section == "test" else None)
            if not isinstance(entries, list) or (not entries and section != "test"):
                problems.append(wrong(self.folder, f"section '{section}'{told} is missing or empty"))
                continue
            for entry in entries:
                if entry_name(entry) in absent:
                    continue
                try:
                    sections[section].append(self._case(section, entry))
                except PFedSAMError as error:
                    problems.append(error)
        return sections, [*problems, *_overlaps(self.folder, sections)]

    def _case(self, section: str, entry: Any) -> Case:
        """The case of one entry of a section, a name or a dictionary."""
        folder, patients = self.folder, self.content.get("patients", {})
        if isinstance(entry, str):
            if entry not in self.known:
                what = f"section '{section}' names the unknown case '{entry}'"
                raise wrong(folder, what, f"Restore it, or let `pfedsam split {folder}` keep it out.")
            return self.known[entry]
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            what = f"section '{section}' holds {entry!r}, neither a case name nor a dictionary with 'image'"
            raise wrong(folder, what)
        image = _inside(folder, section, entry["image"])
        name = case_name(image)
        if name is None:
            raise wrong(folder, f"section '{section}' names '{entry['image']}', no image of a known format")
        listed = entry.get("label")
        label = _inside(folder, section, listed) if isinstance(listed, str) else self.labels.get(name)
        return Case(name, image, label, str(entry.get("patient", patients.get(name, name))))


def _differing(folder: Path, parts: Mapping[str, Mapping[str, Any]]) -> Iterator[PFedSAMError]:
    """Folds that list other cases than the first."""
    names = {
        told: {entry_name(entry) for section in SECTIONS for entry in part.get(section, [])}
        for told, part in parts.items()
        if all(isinstance(part.get(section, []), list) for section in SECTIONS)
    }
    first = next(iter(names.values()), set())
    for told, found in names.items():
        if found != first:
            yield wrong(folder, f"the sections{told} list other cases than the first ({few(sorted(found ^ first))})")


def _has_names(content: Mapping[str, Any]) -> bool:
    entries = [content.get(section) for section in SECTIONS]
    return any(isinstance(entry, str) for items in entries if isinstance(items, list) for entry in items)


def _inside(folder: Path, section: str, relative: str) -> Path:
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts:
        raise wrong(folder, f"section '{section}' names '{relative}', which is not a path inside the site folder")
    try:
        found = (folder / path).exists()
    except (OSError, ValueError):  # too long for a name, or with a character that none has
        found = False
    if not found:
        raise wrong(folder, f"section '{section}' names the missing file {shown(relative)}")
    return folder / path


def _overlaps(folder: Path, sections: Split) -> Iterator[PFedSAMError]:
    """Cases that are listed twice and patients in two sections."""
    section_of_case: dict[str, str] = {}
    sections_of: dict[str, list[str]] = {}
    for section, cases in sections.items():
        for case in cases:
            if case.name in section_of_case:
                yield wrong(
                    folder, f"case '{case.name}' is listed twice ('{section_of_case[case.name]}' and '{section}')"
                )
            section_of_case[case.name] = section
            found = sections_of.setdefault(case.patient, [])
            if section not in found:
                found.append(section)
    for patient, found in sections_of.items():
        if len(found) > 1:
            yield wrong(folder, f"patient '{patient}' is in the sections {found}")
