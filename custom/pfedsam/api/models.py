"""A site's model in use: load it, segment images, compare it with labels."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pfedsam.data.suffixes import SUFFIXES
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.ownership import require_free

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from pfedsam.inference.predict import Prediction, Predictor

Which = Literal["personal", "global"]
#: A path, or values; see `Model.segment`.
Image: TypeAlias = "str | os.PathLike[str] | NDArray[Any]"


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What a model found in one image; `(x, y[, z])` below is the image's own grid, with the shape of its file.

    Attributes:
        prediction: the image and the probabilities as the writers of `pfedsam.inference` take them.
        class_names: names of the classes; label value n is the n-th.
    """

    prediction: Prediction = field(repr=False)
    class_names: tuple[str, ...]

    @cached_property
    def label(self) -> NDArray[np.uint8]:
        """`(x, y[, z])`: 0 is background, n the n-th class; of nested classes the inner one."""
        return self.prediction.label().reshape(self.prediction.image.label_shape)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """`(C, x, y[, z])`, 0 to 1: one map for each class."""
        probabilities = self.prediction.probabilities
        return probabilities.reshape(len(probabilities), *self.prediction.image.label_shape)

    @property
    def affine(self) -> NDArray[np.float64] | None:
        """`(4, 4)`, voxel indices to millimetres (right, anterior, superior); None if the image has none."""
        return self.prediction.image.affine

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the image was read, and of the part that the bundle does not see."""
        from pfedsam.data.field_of_view import told

        prediction = self.prediction
        side, unseen = prediction.field_of_view, prediction.share_unseen
        return (*prediction.remarks, *((told(unseen, side),) if side is not None and unseen >= 0.005 else ()))

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the label map, with the geometry of the image: NIfTI (`.nii.gz`), of a picture PNG.

        Args:
            path: file to write; without an ending it gets the right one.
            force: replace a file that is there.

        Returns:
            The file written.

        Raises:
            PFedSAMError: E16 for the ending of another format, E24 if the file is there, or is the image itself.

        Example:
            >>> model.segment("scan.nii.gz").save("results/scan_lesion.nii.gz")  # doctest: +SKIP
        """
        from pfedsam.inference.writers import LABEL, PICTURE, write_label

        image, path = self.prediction.image, Path(path)
        ending = PICTURE if image.kind == "picture" else LABEL
        stem = path.name[: -len(ending)] if path.name.endswith(ending) else path.name
        if stem.lower().endswith(SUFFIXES):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"'{path}' has the ending of another format.", f"Let it end in {ending}."
            )
        require_free(path.with_name(stem + ending), force, keep=[image.source])
        return write_label(self.label, image, path.with_name(stem))


@dataclass(frozen=True, eq=False)
class Model:
    """A site's model, ready for images; `load_model` makes it.

    Attributes:
        file: the model file.
        site: name of the site, None where the path does not tell it.
        which: the `personal` or the `global` model.
        class_names: names of the classes; label value n is the n-th.
    """

    file: Path
    site: str | None
    which: Which
    class_names: tuple[str, ...]
    predictor: Predictor = field(repr=False)

    @property
    def bundle(self) -> str:
        """Name of the bundle."""
        return self.predictor.bundle

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the bundle that the network was built with, where they are not the bundle's own."""
        return dict(self.predictor.settings)

    def segment(
        self, image: Image, box: Sequence[int] | None = None, affine: NDArray[Any] | None = None
    ) -> Segmentation:
        """Segment one image.

        Args:
            image: the path of a NIfTI, PNG, JPEG, TIFF or DICOM file or of a folder with one DICOM series; or an array:
                `(x, y, z)`: a volume; `(x, y)`: a grey picture, or with an affine a single slice; `(x, y, 3)`, uint8
                and without an affine: a colour picture. The first axis of a picture points right, the second down, so
                it is `np.asarray(picture).swapaxes(0, 1)` of a Pillow image. Values are in the unit of the modality.
            box: first and last voxel along each axis of the image, `(x0, x1, y0, y1[, z0, z1])`: what is to be
                segmented lies inside. For models that were trained with boxes.
            affine: of an array, `(4, 4)`: voxel indices to millimetres (right, anterior, superior). Without it the
                voxels of a volume are cubes of 1 mm, and its axes point right, anterior and superior.

        Returns:
            The label map and the probabilities in the grid of the image.

        Raises:
            PFedSAMError: E02 if there is no such image, E05 if it cannot be read or an array has another shape or type,
                E09 for values that are not finite, E16 for a box that is not inside, E32 for a box or an affine that
                does not go with the model or the image.
            TypeError: if `image` is neither a path nor an array.

        Example:
            >>> found = model.segment(values, affine=affine)  # doctest: +SKIP
            >>> found.label.shape == values.shape  # doctest: +SKIP
            True
        """
        import numpy as np

        if isinstance(image, np.ndarray):
            from pfedsam.data.arrays import picture_of

            return Segmentation(self.predictor(picture_of(image, affine), box), self.class_names)
        if not isinstance(image, (str, os.PathLike)):
            raise TypeError(f"an image is a path or an array, not {type(image).__name__}")
        if affine is not None:
            message = f"an affine is for an array, and {image} is a path."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Leave it out: the file has its own.")
        return Segmentation(self.predictor(Path(image), box), self.class_names)

    def segment_many(self, images: Iterable[Image]) -> Iterator[Segmentation]:
        """Segment images one after the other; each is read when its result is asked for, so memory holds one.

        An image that goes wrong raises and ends it: call `segment` for each image to go on with the others.

        Args:
            images: as `segment` takes them; may be a generator.

        Yields:
            The result of each image, in order.

        Raises:
            PFedSAMError: as `segment`.

        Example:
            >>> for found in model.segment_many(sorted(Path("scans").glob("*.nii.gz"))):  # doctest: +SKIP
            ...     found.save(Path("results") / found.prediction.image.source.name)
        """
        for image in images:
            yield self.segment(image)


def load_model(
    path: str | os.PathLike[str],
    site: str | None = None,
    which: Which = "personal",
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
    *,
    bundle: str | None = None,
    checkpoint: str | None = None,
    engine: str = "auto",
) -> Model:
    """Load a site's model. Bundle and settings are those that the model file names.

    Args:
        path: a model file (`state.safetensors`, `best.safetensors`, an exported one); the folder of a training that
            holds `model.safetensors`; the run folder of `pfedsam simulate`; a site's state folder; or a state root.
        site: which site of a run or state root; may be left out if there is one only, or for a global model that is the
            same at all sites.
        which: `personal`, or `global` for the model that all sites share (experts off).
        overrides: settings of the bundle that come before those of the file.
        device: a torch device, as `cpu` or `cuda:1`; by default the bundle's choice, the first GPU if there is one.
        bundle: name of an installed bundle; by default what the file names.
        checkpoint: path of the base weights on this machine; by default `PFEDSAM_CHECKPOINT`, else the bundle's.
        engine: what computes the network on a CPU: `torch`; `onnx`, with the extra `export`, which keeps a graph beside
            the model file, readable by its owner alone; or `auto`, which takes it once it saves time.

    Raises:
        PFedSAMError: E13 if there is no readable model, or no such site (the sentence lists the sites); E10 to E12 if
            the base weights or tensors do not fit; E16 for a device or an engine that is not there, E31 for an engine
            that is not installed; E18, E28, E30 or E32 for settings or names that are wrong, or do not go together.

    Example:
        >>> model = pfedsam.load_model("runs/mine", site="hospital_a")  # doctest: +SKIP
        >>> model.segment("scan.nii.gz").save("scan_lesion.nii.gz")  # doctest: +SKIP
    """
    if which not in ("personal", "global"):
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"there is no '{which}' model.", "Take personal or global.")

    from pfedsam.bundles import class_names, find_bundle
    from pfedsam.inference.predict import Predictor
    from pfedsam.storage.run_models import find_run_model

    file, site_name = find_run_model(Path(path), site, shared=which == "global")
    how: dict[str, Any] = {"bundle": bundle, "overrides": overrides, "checkpoint": checkpoint, "device": device}
    predictor = Predictor(file, experts=which == "personal", engine=engine, **how)
    predictor.open()
    return Model(file, site_name, which, tuple(class_names(find_bundle(predictor.bundle))), predictor)


def evaluate(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | Model,
    *,
    section: str = "test",
    bundle: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Compare the global and the personal model in a site's model file with the site's labels, as whole volumes.

    Test cases of patients that the model has seen are left out; `attrs["notes"]` of the table says which.

    Args:
        folder: site folder.
        model: as `load_model` takes it, or a loaded model; of a run folder it is the site named as `folder`.
        section: `training`, `validation` or `test`.
        bundle, overrides: see `load_model`.

    Returns:
        One row for each case, model and class: `site`, `case`, `model`, `class`, `dice`, `hd95` and `asd` (mm), `nsd`,
        `failed` (the class is there and nothing was found).

    Raises:
        PFedSAMError: E02 to E09 for the data, E06 if the section has no case, E08 if no case is left, E10 to E13 if the
            model does not fit.

    Example:
        >>> rows = pfedsam.evaluate("data/hospital_a", "runs/mine")  # doctest: +SKIP
        >>> rows.groupby("model").dice.mean()  # doctest: +SKIP
    """
    from pfedsam.evaluation.site import evaluate_site
    from pfedsam.evaluation.tables import case_rows
    from pfedsam.storage.model_files import only_model
    from pfedsam.storage.run_models import find_run_model
    from pfedsam.storage.site_model import model_settings

    folder = Path(folder)
    site = folder.resolve().name
    if isinstance(model, Model):
        file, overrides = model.file, {**model.settings, **(overrides or {})}
        bundle = bundle or model.bundle
    else:
        path = Path(model)
        file, _ = find_run_model(path, None if only_model(path) else site)
    bundle, settings = model_settings(file, bundle, overrides or {})
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = evaluate_site(
            bundle, folder, file, overrides=settings, section=section, site=site, output_dir=scratch
        )
    rows = case_rows([evaluation], bundle)
    rows.attrs["notes"] = evaluation.notes
    return rows
