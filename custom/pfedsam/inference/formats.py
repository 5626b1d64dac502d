"""Image files in, label files out: shape, affine, orientation and series are those of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.sr.coding import Code

from pfedsam.data.pictures import NIFTI, visible
from pfedsam.errors import PFedSAMError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
#: Slices of a series may lie this much off an even spacing (share of the spacing).
GAP_TOLERANCE = 0.05
#: SNOMED CT codes of what a segment shows.
_ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
_ANATOMICAL = Code("123037004", "SCT", "Anatomical Structure")
_LESION = Code("52988006", "SCT", "Lesion")
_STRUCTURE = Code("91723000", "SCT", "Anatomical structure")


@dataclass(frozen=True)
class Input:
    """One image as the bundle gets it.

    Attributes:
        name: of the results: the file's name without suffix, or the folder's name.
        source: file or folder that was given.
        path: what the bundle reads: the file itself, or a NIfTI volume made of it.
        shape: of the label to write; spatial axes, with the input's trailing axes of length 1.
        affine: of the label to write; None for pictures.
        slices: of a DICOM series, sorted by position; empty for other formats.
    """

    name: str
    source: Path
    path: Path
    shape: tuple[int, ...]
    affine: NDArray[Any] | None = None
    slices: tuple[pydicom.Dataset, ...] = ()


def read_input(source: Path, scratch: Path, rgb: bool = False) -> Input:
    """Look at an image and make it readable for a bundle.

    Args:
        source: NIfTI file, folder of one DICOM series, or PNG, JPG, TIFF.
        scratch: folder for a volume that has to be made; nothing is written for a NIfTI volume.
        rgb: whether the bundle takes colour pictures; else a picture is read as one grey slice of 1 mm pixels.

    Raises:
        PFedSAMError: E05 naming the file for an unknown format, an image that cannot be read, a 4-D image with more
            than one channel, or a DICOM folder that is not one whole series.
    """
    if not source.exists():
        raise PFedSAMError("E02", f"there is no image {source}.", "Give NIfTI, PNG or JPG files, or DICOM folders.")
    name = source.name.lower()
    if source.is_dir():
        return _read_series(source, scratch)
    try:
        if name.endswith(NIFTI):
            return _read_nifti(source, scratch)
        if name.endswith(PICTURES):
            return _read_picture(source, scratch, rgb)
    except PFedSAMError:
        raise
    except Exception as error:
        raise PFedSAMError(
            "E05", f"{source} cannot be read: {type(error).__name__}: {error}.", "Write it anew."
        ) from None
    raise PFedSAMError("E05", f"{source} has an unknown format.", "Give NIfTI, PNG or JPG files, or DICOM folders.")


def write_label(label: NDArray[np.uint8], image: Input, path: Path) -> Path:
    """Write label values in the format of the input: NIfTI for volumes and series, PNG for pictures.

    Args:
        label: `(x, y[, z])`.
        image: what it belongs to.
        path: without suffix.

    Returns:
        The file written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.affine is None:
        path = path.with_name(path.name + ".png")
        Image.fromarray(np.swapaxes(label.reshape(image.shape), 0, 1)).save(path)
        return path
    path = path.with_name(path.name + ".nii.gz")
    _save_nifti(label.reshape(image.shape), image, path)
    return path


def write_probabilities(probabilities: NDArray[np.float32], image: Input, path: Path) -> Path:
    """Write probabilities `(C, x, y[, z])` as NIfTI, the classes last; one class has no axis for it."""
    path = path.with_name(path.name + ".nii.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [one.reshape(image.shape) for one in probabilities]
    _save_nifti(values[0] if len(values) == 1 else np.stack(values, axis=-1), image, path)
    return path


def write_segmentation(label: NDArray[np.uint8], image: Input, path: Path, labels: Sequence[str], model: str) -> Path:
    """Write a DICOM segmentation object that refers to the slices of the series.

    Args:
        label: `(x, y, z)`, values 0 to the number of labels.
        image: a DICOM series.
        path: without suffix.
        labels: names of the values 1, 2, ...
        model: name of the algorithm.

    Returns:
        The file written.
    """
    import highdicom
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    import pfedsam

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=model, version=pfedsam.__version__, family=codes.cid7162.ArtificialIntelligence
    )
    described = [
        SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=_ABNORMAL if "lesion" in name else _ANATOMICAL,
            segmented_property_type=_LESION if "lesion" in name else _STRUCTURE,
            algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(labels, 1)
    ]
    # one frame for each slice, rows first; one plane for each segment
    frames = np.transpose(label.reshape(image.shape), (2, 1, 0))
    pixels = np.stack([frames == number for number in range(1, len(labels) + 1)], axis=-1).astype(np.uint8)
    found = highdicom.seg.Segmentation(
        source_images=list(image.slices),
        pixel_array=pixels,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=900,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="pFedSAM",
        manufacturer_model_name=model,
        software_versions=pfedsam.__version__,
        device_serial_number="0",
        series_description="Research only, not for diagnostic use",
        omit_empty_frames=False,
    )
    path = path.with_name(path.name + ".dcm")
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save_as(path)
    return path


def _stem(path: Path) -> str:
    name = path.name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else path.stem


def _read_nifti(source: Path, scratch: Path) -> Input:
    image: Any = nibabel.load(source)
    spatial = tuple(size for size in image.shape[:3])
    if any(size != 1 for size in image.shape[3:]):
        raise PFedSAMError(
            "E05", f"{source} has shape {image.shape}, expected one channel.", "Give one volume of the series."
        )
    path = source
    if image.ndim != 3:
        data = np.asanyarray(image.dataobj).reshape(*spatial, *[1] * (3 - len(spatial)))
        path = _save_volume(data, image.affine, scratch, _stem(source))
    return Input(_stem(source), source, path, image.shape, image.affine)


def _read_picture(source: Path, scratch: Path, rgb: bool) -> Input:
    with Image.open(source) as image:
        size = image.size
        values = np.swapaxes(np.asarray(image.convert("L")), 0, 1)
    path = source if rgb else _save_volume(values[..., None], np.eye(4), scratch, source.stem)
    return Input(source.stem, source, path, size)


def _read_series(source: Path, scratch: Path) -> Input:
    """A folder of one DICOM series, sorted by position along the normal of its slices."""
    remedy = "Give a folder that holds one whole series and nothing else."
    slices = []
    for path in visible(source):
        try:
            slices.append(pydicom.dcmread(path))
        except Exception as error:
            raise PFedSAMError("E05", f"{path} is no DICOM file ({error}).", remedy) from None
    if not slices:
        raise PFedSAMError("E02", f"{source} holds no file.", remedy)
    for key in ("SeriesInstanceUID", "ImageOrientationPatient", "Rows", "Columns", "PixelSpacing"):
        found = {str(one.get(key)) for one in slices}
        if len(found) > 1 or found == {"None"}:
            raise PFedSAMError("E05", f"{source}: slices differ in {key} ({len(found)} values), or lack it.", remedy)
    row, column = np.asarray(slices[0].ImageOrientationPatient, dtype=float).reshape(2, 3)
    normal = np.cross(row, column)
    slices.sort(key=lambda one: float(normal @ np.asarray(one.ImagePositionPatient, dtype=float)))
    positions = np.asarray([normal @ np.asarray(one.ImagePositionPatient, dtype=float) for one in slices])
    steps = np.diff(positions)
    step = float(np.median(steps)) if len(steps) else float(slices[0].get("SliceThickness") or 1.0)
    uneven = np.flatnonzero(np.abs(steps - step) > GAP_TOLERANCE * abs(step))
    if step <= 0 or len(uneven):
        where = f"between slices {uneven[0] + 1} and {uneven[0] + 2}" if len(uneven) else "everywhere"
        raise PFedSAMError(
            "E05", f"{source}: slices are missing or double {where} (expected {step:.2f} mm apart).", remedy
        )
    # DICOM's axes point left and posterior, NIfTI's right and anterior; x runs along a row, y along a column
    down, across = (float(one) for one in slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * across, column * down, normal * step
    affine[:3, 3] = np.asarray(slices[0].ImagePositionPatient, dtype=float)
    affine[:2] *= -1
    try:
        planes = [_values(one) for one in slices]
    except Exception as error:
        raise PFedSAMError("E05", f"{source}: pixels cannot be read: {error}.", remedy) from None
    volume = np.stack(planes, axis=-1)
    return Input(
        source.name, source, _save_volume(volume, affine, scratch, source.name), volume.shape, affine, tuple(slices)
    )


def _values(one: pydicom.Dataset) -> NDArray[np.float32]:
    """Values `(x, y)` of a slice in the unit of the modality."""
    values = one.pixel_array.astype(np.float32)
    return np.swapaxes(values * float(one.get("RescaleSlope", 1)) + float(one.get("RescaleIntercept", 0)), 0, 1)


def _save_volume(values: NDArray[Any], affine: NDArray[Any], scratch: Path, name: str) -> Path:
    path = scratch / f"{name}.nii"
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def _save_nifti(values: NDArray[Any], image: Input, path: Path) -> None:
    """With the affine and its codes as in the input."""
    out = nibabel.Nifti1Image(values, image.affine)
    if image.source.name.lower().endswith(NIFTI):
        header: Any = nibabel.load(image.source).header  # type: ignore[attr-defined]
        for kind in ("qform", "sform"):
            form, code = getattr(header, f"get_{kind}")(coded=True)
            getattr(out, f"set_{kind}")(form if code else None, int(code))
        out.header.set_xyzt_units(*header.get_xyzt_units())
    nibabel.save(out, path)
