"""What a page is told of its images: read when they are first asked for, segmented by the project's own inference."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.datalist_file import unknown_value
from pfedsam.data.expected import label_map_of
from pfedsam.data.field_of_view import told
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.viewer.corrections import no_site_folder, save_correction, site_folder_of
from pfedsam.viewer.grid import MOST, Grid, window_of
from pfedsam.viewer.masks import MOST_CLASSES, Classes, Mask, dice_of, difference, read_truth, read_values
from pfedsam.viewer.subjects import Subject

if TYPE_CHECKING:
    from pfedsam.inference.predict import Prediction, Predictor

MODELS = ("global", "personal")
EMPTY, TRUTH, BOX = "empty", "truth", "box"
#: What a drawing may begin with.
STARTS = (EMPTY, TRUTH, *MODELS, BOX)
#: Images that are kept in memory.
_KEPT = 2
_ALONE = Classes(("label",), ((1,),))


@dataclass
class _Opened:
    """An image that was read, and all that was found in it so far."""

    image: Picture
    grid: Grid
    classes: Classes
    truth: Mask | None
    predictions: dict[str, Prediction] = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)


class Session:
    """The images that a page may ask for, by number.

    Args:
        subjects: the images.
        bundle: name of an installed bundle; by default what a model names.
        overrides: of the bundle; by default what a model was trained with.
        checkpoint: path of the base weights; by default the bundle's.
        most: see `pfedsam.viewer.grid.MOST`.
        label_map: what the label values of the site mean, see `pfedsam.viewer.masks.Classes`; for images with a model.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        bundle: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        checkpoint: str | None = None,
        most: int = MOST,
        label_map: Mapping[str, str] | None = None,
    ) -> None:
        self.subjects = list(subjects)
        self._told = bundle, dict(overrides or {})
        self._checkpoint, self._most, self._label_map = checkpoint, most, label_map
        self._opened: OrderedDict[int, _Opened] = OrderedDict()
        self._predictors: dict[tuple[Path, str], Predictor] = {}
        self._settings_of: dict[Path, tuple[str, dict[str, Any]]] = {}
        # reading does not wait for a network, and networks compute one after the other
        self._reading, self._computing = threading.RLock(), threading.RLock()

    def listed(self) -> list[dict[str, Any]]:
        """Number, site, case and section of each image."""
        return [
            {"number": number, "site": one.site, "case": one.name, "section": one.section}
            for number, one in enumerate(self.subjects)
        ]

    def about(self, number: int) -> dict[str, Any]:
        """All that the page shows of an image beside its voxels: JSON values.

        Raises:
            PFedSAMError: what reading the image, its label or its model raises.
        """
        subject, opened = self.subjects[number], self._open(number)
        place = None if site_folder_of(subject.image) else " ".join(no_site_folder(subject.image))
        seen = subject.section in ("training", "validation")
        return {
            "case": subject.name,
            "site": subject.site,
            "kind": opened.image.kind,
            "shape": opened.grid.shown_shape,
            "steps": opened.grid.steps,
            "classes": opened.classes.names,
            "unknown": opened.classes.unknown is not None,
            "labels": opened.classes.labels,
            "models": MODELS if subject.model else (),
            "truth": opened.truth is not None,
            "boxes": subject.model is not None and bool(self._settings(subject.model)[1].get("box_probability")),
            "notes": [
                *opened.image.notes,
                *([f"the model was made with this patient ({subject.section}): its Dice here is no test"] * seen),
            ],
            "cannot_save": place,
        }

    def image(self, number: int) -> bytes:
        """The image as NIfTI."""
        opened = self._open(number)
        image = opened.image
        shape = (*image.volume_shape, 3) if image.is_colour else image.volume_shape
        window = None if image.is_colour else window_of(image)
        return opened.grid.nifti(image.values.reshape(shape), window)

    def mask(self, number: int, name: str) -> bytes:
        """A mask of `STARTS` as NIfTI of class numbers.

        Raises:
            PFedSAMError: E32 if there is none; what the inference raises.
        """
        opened = self._open(number)
        return opened.grid.nifti(self._mask(number, name).numbers, labels=True)

    def difference(self, number: int, model: str) -> bytes:
        """Where a model and the truth differ, as NIfTI; see `pfedsam.viewer.masks.difference`."""
        opened = self._open(number)
        return opened.grid.nifti(difference(self._mask(number, model), self._mask(number, TRUTH)), labels=True)

    def probability(self, number: int, model: str, channel: int) -> bytes:
        """The probability of a class, in percent, as NIfTI of bytes."""
        opened = self._open(number)
        probabilities = self._predicted(number, model).probabilities
        if channel >= len(probabilities):
            raise PFedSAMError(ErrorCode.CONTRADICTION, f"the model has no class {channel + 1}.")
        percent = np.rint(probabilities[channel] * 100).astype(np.uint8)
        return opened.grid.nifti(percent.reshape(opened.image.volume_shape), (0.0, 100.0))

    def found(self, number: int, name: str) -> dict[str, Any]:
        """Of a mask that was found: Dice of each class if there is a truth, voxels of each class, and remarks."""
        opened, mask = self._open(number), self._mask(number, name)
        remarks: list[str] = []
        prediction = opened.predictions.get(name)
        if prediction is not None:
            remarks += prediction.remarks
            if prediction.field_of_view is not None and prediction.share_unseen >= 0.005:
                remarks.append(told(prediction.share_unseen, prediction.field_of_view))
        return {
            "dice": None if opened.truth is None else dice_of(mask, opened.truth),
            "voxels": [int(np.count_nonzero(channel)) for channel in mask.channels],
            "remarks": remarks,
        }

    def segment(self, number: int, model: str, box: Sequence[int]) -> bytes:
        """What a model finds inside a box `(x0, x1, y0, y1, z0, z1)` of the grid that is shown, as NIfTI.

        Raises:
            PFedSAMError: E32 for a model without boxes; what the inference raises.
        """
        opened = self._open(number)
        with self._computing:
            found = self._predictor(number, model)(opened.image, opened.grid.box(box))
        opened.masks[BOX] = Mask.of_prediction(found)
        return opened.grid.nifti(opened.masks[BOX].numbers, labels=True)

    def save(self, number: int, start: str, drawing: bytes) -> Path:
        """Keep a drawing as the label of its image, in the site's own values; see `pfedsam.viewer.corrections`.

        Args:
            number: of the image.
            start: of `STARTS`, what the drawing began with.
            drawing: one byte a voxel in the grid that is shown, x first; values as `Classes` has them.

        Raises:
            PFedSAMError: E16 for a drawing of another size or with a value that is no class; E01 for a class that the
                site has no value for; E02 and E24 see there.
        """
        opened = self._open(number)
        values, shape = np.frombuffer(drawing, dtype=np.uint8), opened.grid.shown_shape
        classes = opened.classes.unknown or len(opened.classes.names)
        if values.size != np.prod(shape) or int(values.max(initial=0)) > classes:
            told_ = f"the drawing has {values.size} voxels with values up to {values.max(initial=0)}"
            message = f"{told_}, expected {int(np.prod(shape))} up to {classes}."
            raise PFedSAMError(ErrorCode.WRONG_SETTING, message, "Load the page again.")
        began = self._mask(number, start).numbers
        label = opened.grid.drawn(values.reshape(shape, order="F"), began)
        return save_correction(opened.classes.stored(label), opened.image)

    def bytes_of_drawing(self, number: int) -> int:
        """Size of a drawing of an image."""
        return int(np.prod(self._open(number).grid.shown_shape))

    def _mask(self, number: int, name: str) -> Mask:
        opened = self._open(number)
        if name in MODELS and name not in opened.masks:
            opened.masks[name] = Mask.of_prediction(self._predicted(number, name))
        if name == EMPTY:
            nothing: NDArray[np.uint8] = np.zeros(opened.image.volume_shape, dtype=np.uint8)
            return Mask(nothing, np.zeros((len(opened.classes.names), *nothing.shape), dtype=bool))
        mask = opened.truth if name == TRUTH else opened.masks.get(name)
        if mask is None:
            raise PFedSAMError(ErrorCode.CONTRADICTION, f"{opened.image.source} has no mask '{name}'.")
        return mask

    def _predicted(self, number: int, model: str) -> Prediction:
        opened = self._open(number)
        with self._computing:
            if model not in opened.predictions:
                opened.predictions[model] = self._predictor(number, model)(opened.image)
            return opened.predictions[model]

    def _predictor(self, number: int, model: str) -> Predictor:
        """A model's predictor."""
        file = self.subjects[number].model
        if file is None:
            raise PFedSAMError(ErrorCode.CONTRADICTION, "no model was given.", "Open the viewer with --model.")
        key = file, model
        if key not in self._predictors:
            # a page without a model needs neither MONAI nor torch
            from pfedsam.inference.predict import Predictor

            # networks of one site at a time
            self._predictors = {other: one for other, one in self._predictors.items() if other[0] == file}
            bundle, overrides = self._told
            how: dict[str, Any] = {"bundle": bundle, "overrides": overrides, "checkpoint": self._checkpoint}
            self._predictors[key] = Predictor(file, experts=model == "personal", **how)
        return self._predictors[key]

    def _settings(self, model: Path) -> tuple[str, dict[str, Any]]:
        if model not in self._settings_of:
            from pfedsam.storage.site_model import model_settings

            self._settings_of[model] = model_settings(model, *self._told)
        return self._settings_of[model]

    def _open(self, number: int) -> _Opened:
        with self._reading:
            if number not in self._opened:
                self._opened[number] = self._read(self.subjects[number])
            self._opened.move_to_end(number)
            while len(self._opened) > _KEPT:
                self._opened.popitem(last=False)
            return self._opened[number]

    def _read(self, subject: Subject) -> _Opened:
        image = load_picture(subject.image)
        grid, site = Grid.of(image, self._most), site_folder_of(subject.image)
        if subject.model is not None:
            bundle, settings = self._settings(subject.model)
            label_map = self._label_map if site is None else label_map_of(site, bundle, self._label_map)
            classes = Classes.of_bundle(bundle, settings, label_map)
            truth = None if subject.label is None else read_truth(image, subject.label, classes)
            return _Opened(image, grid, classes, truth)
        if subject.label is None:
            return _Opened(image, grid, _ALONE, None)
        mask, classes = read_values(image, subject.label, None if site is None else unknown_value(site))
        return _Opened(image, grid, classes, mask)


#: What the page may read of an image, by name: voxels, all as NIfTI.
LAYERS: dict[str, Callable[[Session, int], bytes]] = {
    "image": Session.image,
    **{name: partial(Session.mask, name=name) for name in STARTS},
    **{f"difference-{model}": partial(Session.difference, model=model) for model in MODELS},
    **{
        f"probability-{model}-{channel + 1}": partial(Session.probability, model=model, channel=channel)
        for model in MODELS
        for channel in range(MOST_CLASSES)
    },
}
