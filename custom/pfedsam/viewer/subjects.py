"""What the viewer may show: one image, the cases of a site folder, or those of a finished simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pfedsam.data.sections import SECTIONS
from pfedsam.data.site_folder import Case, files_by_name, read_site
from pfedsam.data.suffixes import case_name
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.viewer.corrections import LABELS, site_folder_of

#: What a simulation writes down of itself, and where the demo has its data.
TERMS, PHANTOM = "run.json", "phantom"
STATES = "state"


@dataclass(frozen=True)
class Subject:
    """One image that the page may ask for.

    Attributes:
        name: of the case.
        image: file, or folder of a DICOM series.
        label: its truth, None if there is none.
        model: model file of its site, None to show the image alone.
        site: name of the site, "" where that says nothing.
        section: of the split that the model was trained with, "" if it is not known.
    """

    name: str
    image: Path
    label: Path | None = None
    model: Path | None = None
    site: str = ""
    section: str = ""


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a simulation."""
    return (path / STATES).is_dir() and not (path / "images").is_dir()


def subjects_of(
    path: Path,
    model: Path | None = None,
    labels: Path | None = None,
    site: str | None = None,
    data: Path | None = None,
) -> list[Subject]:
    """What a path means.

    Args:
        path: an image, a folder of one DICOM series, a site folder, or the run folder of a simulation.
        model: a model as `pfedsam.storage.run_models.find_run_model` takes it; not for a run folder, which has its own.
        labels: the truth: a file, a folder of a DICOM series, or a folder with files named as the images; by default
            the label in the image's site folder.
        site: of a run folder, or of the model.
        data: of a run folder: the folder that holds its site folders, where the run does not say it.

    Raises:
        PFedSAMError: E02 if there is no image, or no label where one was named, E13 if there is no such model, E32 for
            what does not go together, E33 for a run that lacks models or does not say where its data is.
    """
    if is_run(path):
        if model is not None or labels is not None:
            message = f"{path} is a run folder, which has its own models and labels."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Leave --model and --labels out, or give an image.")
        return _of_run(path, site, data)
    if data is not None:
        message = f"--data is for a run folder, and {path} is none."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Leave it out, or give the folder of a finished run.")
    file = None if model is None else _model_file(model, site)
    if (path / "images").is_dir():
        cases = read_site(path)
        found = [_of_case(case, path.resolve().name, file) for case in cases]
    else:
        found = [_of_image(path, file)]
    return found if labels is None else [replace(one, label=_label_of(one, labels)) for one in found]


def _model_file(path: Path, site: str | None) -> Path:
    # torch is behind it, and an image alone needs none
    from pfedsam.storage.run_models import find_run_model

    return find_run_model(path, site)[0]


def _of_image(image: Path, model: Path | None) -> Subject:
    if not image.exists():
        raise PFedSAMError(
            ErrorCode.SITE_FOLDER,
            f"there is no image {image}.",
            "Give an image file, a folder of DICOM slices, a site folder, or the folder of a finished run.",
        )
    name, site = case_name(image) or image.resolve().name, site_folder_of(image)
    label = files_by_name(site / LABELS, LABELS).get(name) if site else None
    return Subject(name, image, label, model)


def _of_case(case: Case, site: str, model: Path | None, section: str = "") -> Subject:
    return Subject(case.name, case.image, case.label, model, site, section)


def _label_of(subject: Subject, labels: Path) -> Path | None:
    """The truth of an image: what was given, or in a folder of labels the one of its name."""
    if not labels.exists():
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"there is no label {labels}.", "Give a file or a folder of labels.")
    named = files_by_name(labels, LABELS) if labels.is_dir() else {}
    if not named:
        # a file, or the slices of one series
        return labels
    if subject.name not in named and not subject.site:
        message = f"{labels} holds no label '{subject.name}'."
        raise PFedSAMError(ErrorCode.SITE_FOLDER, message, "Name the label as its image, or give the file.")
    return named.get(subject.name)


def _of_run(run: Path, site: str | None, data: Path | None) -> list[Subject]:
    """The cases of every site of a run that has a model, those for test first."""
    from pfedsam.storage.state_list import list_states

    terms = _terms(run)
    sites = [site] if site else sorted({entry.site for entry in list_states(run / STATES)})
    if not sites:
        raise PFedSAMError(
            ErrorCode.RUN_INCOMPLETE, f"{run / STATES} holds no model.", "Finish the run: `pfedsam simulate` again."
        )
    root = _data_of(run, terms, data)
    found: list[Subject] = []
    for name in sites:
        if not (root / name).is_dir():
            message = f"{root} has no site folder '{name}', which {run} has a model of."
            raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, message, "Name the folder with the run's data: --data.")
        model = _model_file(run, name)
        sections = {case: told.get("section", "") for case, told in _cases_of(terms, name).items()}
        cases = read_site(root / name)
        of_site = [_of_case(case, name, model, str(sections.get(case.name, ""))) for case in cases]
        found += sorted(of_site, key=lambda one: (_order(one.section), one.name))
    return found


def _order(section: str) -> int:
    return SECTIONS[::-1].index(section) if section in SECTIONS else len(SECTIONS)


def _data_of(run: Path, terms: Mapping[str, Any], data: Path | None) -> Path:
    """The folder that holds the site folders of a run."""
    told = terms.get("data")
    known = data or (Path(told) if isinstance(told, str) else None) or run / PHANTOM
    if known.is_dir():
        return known
    if data is None and not isinstance(told, str):
        message = f"{run} does not say where its data is."
    else:
        message = f"the data of {run} is not in {known}."
    raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, message, "Name the folder that holds the site folders: --data.")


def _terms(run: Path) -> dict[str, Any]:
    """What a run wrote down of itself; nothing if it is of an earlier version."""
    try:
        content = json.loads((run / TERMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _cases_of(terms: Mapping[str, Any], site: str) -> dict[str, dict[str, Any]]:
    """What a run wrote down of each case of a site."""
    found: Any = terms
    for key in ("terms", "sites", site):
        found = found.get(key) if isinstance(found, dict) else None
    return {name: told for name, told in found.items() if isinstance(told, dict)} if isinstance(found, dict) else {}
