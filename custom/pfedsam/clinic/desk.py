"""What clinicians' tools may ask of a site's model: which cases there are, a segmentation, a label to keep.

A question is a name and plain values, and so is its answer. Images are named by what `Desk.cases` lists, never by a
path: what a request says is looked up here and nowhere else.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import nibabel
import numpy as np
from numpy.typing import NDArray

from pfedsam.bundles import find_bundle, is_rgb
from pfedsam.data.geometry import same_place, turned_onto
from pfedsam.data.reader import load_picture
from pfedsam.data.site_folder import read_site
from pfedsam.data.suffixes import NIFTI
from pfedsam.errors import ErrorCode, PFedSAMError, few, shown
from pfedsam.files import file_digest
from pfedsam.storage.site_model import read
from pfedsam.storage.state_files import described
from pfedsam.viewer.corrections import save_correction
from pfedsam.viewer.masks import Classes

RESEARCH_ONLY = "Research only, not for diagnostic use."
#: Letters of a model's SHA-256 that name it, and what NIfTI has room for in its description.
_NAME, _DESCRIPTION = 8, 79
#: What the front may ask for.
QUESTIONS = ("about", "cases", "segment", "save", "add")


class Model(Protocol):
    """What a desk needs of a `pfedsam.api.Model`, which lies above this room."""

    @property
    def file(self) -> Path:
        """The model file."""

    @property
    def bundle(self) -> str:
        """Name of the bundle."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of the bundle, where they are not its own."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label value n is the n-th."""

    def segment(self, image: Path, box: Sequence[int] | None = None) -> Any:
        """A `pfedsam.api.Segmentation`."""


class Desk:
    """Answers questions about one site with one model. Not for several threads.

    Args:
        site: site folder; its NIfTI volumes are the cases.
        model: the site's, loaded.
        scratch: folder for results and for volumes that are sent; whoever made it deletes it.

    Raises:
        PFedSAMError: E02 if the site has no NIfTI volume, E32 for a model of pictures.
    """

    def __init__(self, site: Path, model: Model, scratch: Path) -> None:
        self.site, self.model, self.scratch = site, model, scratch
        if is_rgb(find_bundle(model.bundle)):
            message = f"bundle '{model.bundle}' takes colour pictures, and MONAI Label hands over volumes."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Look at pictures with `pfedsam view`.")
        self._classes = Classes.of_bundle(model.bundle, model.settings)
        self._sent: dict[str, Path] = {}
        self._about = self._described()
        if not self.cases():
            message = f"site folder '{site}' holds no NIfTI volume in 'images'."
            raise PFedSAMError(ErrorCode.SITE_FOLDER, message, "Put volumes as .nii.gz into it.")

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to `{"do": <name>, ...}`: `{"answer": value}`, or `{"error": sentence}`."""
        what = {key: value for key, value in question.items() if key != "do"}
        try:
            if question.get("do") not in QUESTIONS:
                message = f"there is no question {shown(question.get('do'))}."
                raise PFedSAMError(ErrorCode.CONTRADICTION, message, f"Known: {', '.join(QUESTIONS)}.")
            return {"answer": getattr(self, question["do"])(**what)}
        except PFedSAMError as error:
            return {"error": str(error)}
        # a library may raise anything; one request must not end the server
        except Exception as error:
            return {"error": f"{ErrorCode.UNEXPECTED}: {type(error).__name__}: {error}"}

    def about(self) -> dict[str, Any]:
        """Names, classes, and in sentences which model this is, what Dice was measured, and what it is for."""
        return self._about

    def cases(self) -> list[dict[str, Any]]:
        """The site's NIfTI volumes by name; `labelled` says whether there is a label."""
        cases = [case for case in read_site(self.site) if _is_nifti(case.image)]
        return [
            {"id": case.name, "path": str(case.image.resolve()), "labelled": case.label is not None} for case in cases
        ]

    def segment(self, image: str, box: Sequence[Any] | None = None) -> dict[str, Any]:
        """Segment a case, or a volume that was sent.

        Args:
            image: its name.
            box: two opposite corners in voxels, `(x0, x1, y0, y1, z0, z1)`, in any order; what lies outside the image
                is cut off.

        Returns:
            `file`: the label map, as `pfedsam infer` writes it, with the model's name in its description; `notes`:
            what a person should know of it.

        Raises:
            PFedSAMError: E02 for an unknown image, E16 for a box outside, else as `pfedsam.api.Model.segment`.
        """
        picture = load_picture(self._path(image))
        found = self.model.segment(picture.source, None if box is None else corners_in(box, picture.shape))
        folder = self._folder("results")
        made = found.save(folder / "label.nii.gz", force=True)
        told: Any = nibabel.load(made)
        told.header["descrip"] = self._about["short"][:_DESCRIPTION].encode("ascii", "replace")
        named = folder / f"{uuid.uuid4().hex}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.asanyarray(told.dataobj), told.affine, told.header), named)
        made.unlink()
        return {"file": str(named), "notes": list(found.notes)}

    def save(self, image: str, file: str, segments: Sequence[Any] | None = None) -> dict[str, Any]:
        """Keep a label that a person has made: never over a file, see `pfedsam.viewer.corrections.save_correction`.

        Args:
            image: name of a case of the site.
            file: the label, in the grid of the image; in the folder for what is sent.
            segments: names of the values 1, 2, ... in it; by default those of the classes.

        Returns:
            `saved`: the file, below the site folder.

        Raises:
            PFedSAMError: E02 if there is no such case, E04 for another grid, E07 for a segment that is no class, E24 if
                there are too many corrections.
        """
        if image in self._sent:
            message = f"'{image}' was sent and is no case of the site, so its label has no place."
            raise PFedSAMError(ErrorCode.SITE_FOLDER, message, f"Put the volume into {self.site / 'images'} first.")
        picture = load_picture(self._path(image))
        label = turned_onto(picture, load_picture(self._received(file), label=True))
        if label.shape != picture.shape or not same_place(picture, label):
            message = f"the label of '{image}' is in another grid: {list(label.shape)}, not {list(picture.shape)}."
            raise PFedSAMError(ErrorCode.SHAPES_DIFFER, message, "Draw it on the volume as it was loaded.")
        values = self._as_classes(label.values, segments).reshape(picture.label_shape)
        saved = save_correction(values, picture)
        return {"saved": saved.relative_to(picture.source.parents[1]).as_posix()}

    def add(self, image: str, file: str) -> dict[str, Any]:
        """Take a volume that was sent, until the server ends. It does not become a case of the site.

        Raises:
            PFedSAMError: E05 for a volume that cannot be read, E09 if the site has a case of this name.
        """
        if image in {case["id"] for case in self.cases()}:
            message = f"the site has a case '{image}' already."
            raise PFedSAMError(ErrorCode.SITE_DATA, message, "Fetch it with 'Next Sample', or rename the volume.")
        source = self._received(file)
        load_picture(source)
        kept = self._folder("sent") / f"{uuid.uuid4().hex}.nii{'.gz' if source.name.endswith('.gz') else ''}"
        shutil.copyfile(source, kept)
        if image in self._sent:
            self._sent[image].unlink()
        self._sent[image] = kept
        return {"id": image}

    def _path(self, image: str) -> Path:
        known = {case["id"]: Path(case["path"]) for case in self.cases()} | self._sent
        if image not in known:
            message = f"there is no volume {shown(image)} at '{self.site.name}'."
            raise PFedSAMError(ErrorCode.SITE_FOLDER, message, "Take one with 'Next Sample'.")
        return known[image]

    def _received(self, file: str) -> Path:
        """A file that the front has received; nothing else is read (E02)."""
        path = Path(file).resolve()
        if not path.is_relative_to(self.scratch.resolve()) or not _is_nifti(path):
            message = f"{path.name} was not sent to this server as a NIfTI volume."
            raise PFedSAMError(
                ErrorCode.SITE_FOLDER, message, "Send it as .nii.gz (Slicer's setting 'File Extension')."
            )
        return path

    def _folder(self, name: str) -> Path:
        folder = self.scratch / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _as_classes(self, values: NDArray[Any], segments: Sequence[Any] | None) -> NDArray[np.uint8]:
        """A label as the site's labels store it, from the numbers of segments."""
        names = list(self._classes.names if segments is None else segments)
        unknown = [
            shown(names[n - 1]) if 0 < n <= len(names) else str(n)
            for n in np.unique(values)
            if n != 0 and not (0 < n <= len(names) and names[n - 1] in self._classes.names)
        ]
        if unknown:
            message = f"the label holds {few(unknown)}, and the classes are {', '.join(self._classes.names)}."
            raise PFedSAMError(ErrorCode.LABEL_OUT_OF_RANGE, message, "Rename or delete the other segments.")
        table = np.zeros(len(names) + 1, dtype=np.uint8)
        for number, name in enumerate(names, 1):
            if name in self._classes.names:
                table[number] = _own_value(self._classes.values, self._classes.names.index(name))
        return table[values]

    def _described(self) -> dict[str, Any]:
        model, info = self.model, read(self.model.file).info
        version = described(model.file).removeprefix(f"{model.file}: ")
        digest = file_digest(model.file)[:_NAME]
        number = info.get("round")
        when = f"round{number}" if isinstance(number, int) else "alone"
        return {
            "name": f"pFedSAM, research only: {version} ({digest})",
            "description": f"{RESEARCH_ONLY} Personal model of {self.site.resolve().name}, bundle {model.bundle}: "
            f"{version}; SHA-256 {digest}.",
            "short": f"Research only. pFedSAM {model.bundle} {when} {digest}",
            # a part of an address
            "model": re.sub(r"[^A-Za-z0-9_.-]", "-", f"{model.bundle}-{when}-research-only"),
            "class_names": list(model.class_names),
            "takes_boxes": bool(model.settings.get("box_probability")),
        }


def corners_in(box: Sequence[Any], shape: Sequence[int]) -> list[int]:
    """First and last voxel along each axis, from two opposite corners that need not be in order or inside.

    Raises:
        PFedSAMError: E16 for what is no box of this many axes, or a box outside.
    """
    numbers = [one for one in box if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(numbers) != len(box) or len(box) != 2 * len(shape) or not np.isfinite(numbers).all():
        message = f"the box is {shown(list(box))}, expected {2 * len(shape)} numbers."
        raise PFedSAMError(ErrorCode.WRONG_SETTING, message, "Draw the ROI again.")
    found: list[int] = []
    for one, other, size in zip(numbers[::2], numbers[1::2], shape, strict=True):
        first, last = sorted((round(one), round(other)))
        if last < 0 or first >= size:
            message = f"the box {shown(list(box))} lies outside the image, {list(shape)} voxels."
            raise PFedSAMError(ErrorCode.WRONG_SETTING, message, "Draw the ROI around the structure.")
        found += [max(first, 0), min(last, size - 1)]
    return found


def _own_value(values: Sequence[Sequence[int]], number: int) -> int:
    """The label value of a class that belongs to no class inside it."""
    inner = {value for others in values[number + 1 :] for value in others}
    return next(value for value in values[number] if value not in inner)


def _is_nifti(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(NIFTI)
