"""Write the split of a site down as `datalist.json`, and extend it for new patients: nobody who has a section moves.

A first split is dealt out to folds (`pfedsam.data.sections.deal`). Called again, new cases of known patients go to the
sections of their patients, new patients are placed one by one in the order of their names. Cases whose files are not
there any more keep their places in the file and are kept out (key `absent`): when they come back, they are where they
were. Cases without a label are in no section.

The sections of a file without folds stay the user's own: new patients are added in the proportions that the sections
had at the first extension (key `shares`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pfedsam.data.datalist_file import DATALIST, entry_name, listed_parts, read_content, wrong
from pfedsam.data.listed_split import listed_split
from pfedsam.data.sections import FOLDS, SECTIONS, Sections, deal, most_below, place
from pfedsam.data.site_folder import Case, labelled_cases, read_site
from pfedsam.data.suffixes import case_name
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_like
from pfedsam.ownership import use

#: The file as it was before the last change, beside it.
BEFORE = f"{DATALIST}.before"
#: Kind of a folder of links, see `pfedsam.ownership`.
LINKED = "split"
_KINDS = ("images", "labels")


@dataclass(frozen=True)
class Written:
    """What `write_datalist` did. It names cases, so it stays at the site.

    Attributes:
        path: the file.
        counts: number of cases of each section, of each fold; one fold for sections of the user's own.
        patients: number of patients.
        added: cases that were not in the file, all of them for a first split.
        absent: entries of the file whose images are not there.
        unlabelled: number of cases without a label.
        changed: whether the file was written.
    """

    path: Path
    counts: list[dict[str, int]]
    patients: int
    added: tuple[str, ...]
    absent: tuple[str, ...]
    changed: bool
    unlabelled: int = 0

    def lines(self) -> list[str]:
        """What was done, for people."""
        what = f"{len(self.added)} case(s) added" if self.changed else "unchanged"
        lines = [f"{self.path}: {self.patients} patients, {what}"]
        for number, counts in enumerate(self.counts):
            told = ", ".join(f"{count} {section}" for section, count in counts.items())
            lines.append(f"  fold {number}: {told}" if len(self.counts) > 1 else f"  {told}")
        if self.unlabelled:
            lines.append(f"  {self.unlabelled} case(s) without a label are in no section")
        if self.absent:
            lines.append(f"  kept out, their images are not there: {', '.join(self.absent)}")
        return lines


def write_datalist(folder: str | Path, folds: int | None = None) -> Written:
    """Write the split of a site, or extend the one that is there. A file that is changed is kept as `BEFORE`.

    Args:
        folder: site folder.
        folds: number of folds of a first split, 3 by default; None takes those that are there.

    Raises:
        PFedSAMError: what is wrong with the cases (E02, E03, E09); E06 if there are too few patients for a first split;
            E08 if the file is wrong or has another number of folds: it is left as it is.
        OSError: if it cannot be written.
    """
    folder = Path(folder)
    every, content = read_site(folder), read_content(folder)
    cases, parts = labelled_cases(folder, every), listed_parts(content)
    if not parts:
        try:
            content["folds"] = dealt_folds(cases, folds or FOLDS)
        except PFedSAMError as error:
            raise PFedSAMError(error.code, f"'{folder}': {error.message}", error.remedy) from None
        return _written(folder, content, every, cases)
    if folds is not None and folds != len(parts):
        what = f"it has {len(parts)} fold(s), {folds} were asked for"
        raise wrong(folder, what, "Leave --folds out; removing the file would move patients to other sections.")
    content["absent"] = _absent(folder, content, every)
    _require_right(folder, content)
    new = _new(content, cases)
    known = [_patients(content, part) for part in parts.values()]
    # those that are absent fill no section
    present = [_patients(content, part, content["absent"]) for part in parts.values()]
    for patient in sorted({case.patient for case in new} - set(known[0])):
        if isinstance(content.get("folds"), list):
            place(patient, present)
        else:
            _place_by_shares(folder, content, patient, present[0], known[0])
    _add(new, list(parts.values()), [one | other for one, other in zip(known, present, strict=True)])
    return _written(folder, content, every, new)


def dealt_folds(cases: Sequence[Case], folds: int = FOLDS) -> list[dict[str, Any]]:
    """The folds of a first split, as in the file.

    Raises:
        PFedSAMError: E06 if there are too few patients.
    """
    dealt = deal({case.patient for case in cases}, folds)
    parts: list[dict[str, Any]] = [{section: [] for section in SECTIONS} for _ in dealt]
    _add(cases, parts, dealt)
    return parts


def as_bytes(content: Mapping[str, Any]) -> bytes:
    """The content of a `datalist.json` as it is written."""
    return f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode()


def link_site(site: Path, out: Path) -> Path:
    """Make `<out>/<site>` of links to the images and labels of a site, with its split: for data that are only read.

    Args:
        site: site folder.
        out: folder of links, see `use_for_links`.

    Returns:
        The folder. A `datalist.json` that is in it already stays as it is.

    Raises:
        OSError: if it cannot be written.
    """
    folder = _linked(site, out)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in _KINDS:
        link = folder / kind
        if link.is_symlink():
            link.unlink()  # the data may lie elsewhere now
        link.symlink_to((site / kind).resolve())
    source, target = site / DATALIST, folder / DATALIST
    if source.is_file() and not target.exists():
        write_like(target, source.read_bytes(), source)
    return folder


def use_for_links(data: Path, sites: Sequence[Path], out: Path, force: bool = False) -> None:
    """Make the folder of linked sites, when it is known that each link can be made.

    Args:
        data: what is only read: a site folder, or the folder that holds the sites.
        sites: the site folders.
        out: the folder; may be missing.
        force: whether a folder of somebody else may be used, too.

    Raises:
        PFedSAMError: E24 if `out` and the data lie in each other, something else than a link is where a link goes, or
            it is somebody else's; nothing is written then.
        OSError: if it cannot be written.
    """
    place = out.resolve()
    for one in (data, *sites):
        found = one.resolve()
        if found == place or found in place.parents or place in found.parents:
            raise PFedSAMError(
                ErrorCode.NOT_OURS, f"{out} is {one}, or one lies in the other.", "Choose another folder."
            )
    for folder in (_linked(site, out) for site in sites):
        if folder.is_symlink():
            raise PFedSAMError(
                ErrorCode.NOT_OURS, f"{folder} is a link, a folder was expected.", "Choose another folder."
            )
        for path in (folder / kind for kind in _KINDS):
            if path.exists() and not path.is_symlink():
                raise PFedSAMError(ErrorCode.NOT_OURS, f"{path} is no link.", "Choose another folder.")
    use(out, LINKED, force)


def _linked(site: Path, out: Path) -> Path:
    """The folder of the links to a site."""
    return out / site.resolve().name


def _entries(content: dict[str, Any]) -> Iterator[Any]:
    """All entries of all sections that name a case."""
    for part in listed_parts(content).values():
        for section in SECTIONS:
            entries = part.get(section)
            yield from (entry for entry in (entries if isinstance(entries, list) else ()) if entry_name(entry))


def _new(content: dict[str, Any], cases: Sequence[Case]) -> list[Case]:
    """Cases that no section lists."""
    listed = {_case_of(entry) for entry in _entries(content)}
    return [case for case in cases if case.name not in listed]


def _absent(folder: Path, content: dict[str, Any], cases: Sequence[Case]) -> list[str]:
    """The entries that name a case whose image is not there."""
    names = {case.name for case in cases}

    def is_there(entry: Any) -> bool:
        return (folder / entry_name(entry)).exists() if isinstance(entry, dict) else entry in names

    return sorted({entry_name(entry) for entry in _entries(content) if not is_there(entry)})


def _require_right(folder: Path, content: dict[str, Any]) -> None:
    """Raise the first thing that is wrong in what is listed (E08)."""
    found = listed_split(folder, content=content)
    if found is not None and found[1]:
        raise found[1][0]


def _patients(content: dict[str, Any], part: Mapping[str, Any], without: Sequence[str] = ()) -> Sections:
    """The section of each patient that a part lists, without some entries."""
    patients = content.get("patients", {})
    found: Sections = {}
    for section in SECTIONS:
        for entry in (one for one in part.get(section, []) if entry_name(one) not in without):
            name = _case_of(entry)
            own = entry.get("patient") if isinstance(entry, dict) else None
            found[str(patients.get(name, name) if own is None else own)] = section
    return found


def _case_of(entry: Any) -> str:
    """The name of the case of an entry."""
    if isinstance(entry, dict):
        path = Path(entry_name(entry))
        return case_name(path) or path.name
    return str(entry)


def _place_by_shares(folder: Path, content: dict[str, Any], patient: str, sections: Sections, listed: Sections) -> None:
    """Add a new patient to sections of the user's own, in the proportions of what is listed."""
    counts, at_first = (
        {section: sum(found == section for found in one.values()) for section in SECTIONS} for one in (sections, listed)
    )
    shares = content.setdefault("shares", {section: at_first[section] / len(listed) for section in SECTIONS})
    if not isinstance(shares, dict) or not all(type(shares.get(section)) in (int, float) for section in SECTIONS):
        raise wrong(folder, f"'shares' does not map {list(SECTIONS)} to numbers")
    sections[patient] = most_below(counts, {section: shares[section] for section in SECTIONS})


def _add(cases: Sequence[Case], parts: Sequence[dict[str, Any]], sections: Sequence[Sections]) -> None:
    """Append cases to the sections of their patients, in each fold."""
    for part, section_of in zip(parts, sections, strict=True):
        for case in cases:
            part.setdefault(section_of[case.patient], []).append(case.name)


def _written(folder: Path, content: dict[str, Any], cases: Sequence[Case], added: Sequence[Case]) -> Written:
    """Write the file if it differs from what is there, and tell what is in it; `cases` are all of the site."""
    absent = content.pop("absent", [])
    if absent:
        content["absent"] = absent
    path, like = folder / DATALIST, folder / DATALIST
    changed = content != read_content(folder)
    if changed:
        if path.is_file():
            write_like(path.with_name(BEFORE), path.read_bytes(), path)
        else:
            like = _a_file(cases) or folder
        write_like(path, as_bytes(content), like)
    names = {case.name for case in cases}
    counts = [
        {section: sum(_case_of(entry) in names for entry in part.get(section, [])) for section in SECTIONS}
        for part in listed_parts(content).values()
    ]
    known = [case for case in cases if case.label is not None]
    told = tuple(case.name for case in added), tuple(absent)
    return Written(path, counts, len({case.patient for case in known}), *told, changed, len(cases) - len(known))


def _a_file(cases: Sequence[Case]) -> Path | None:
    """An image that is one file: who may read it may read the split."""
    return next((case.image for case in cases if case.image.is_file()), None)
