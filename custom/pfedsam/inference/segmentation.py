"""A result as a DICOM segmentation object, which refers to the slices of its series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.sr.coding import Code
from pydicom.valuerep import DSfloat

from pfedsam.data.formats.dicom import Frame, named, slices_of, without_place
from pfedsam.data.suffixes import FLAT, NIFTI, is_dicom
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import when_whole
from pfedsam.inference.writers import SEGMENTATION

#: What a segmentation object takes over from its series (PS3.3, A.51): type 1 must be there, type 2 may be empty.
TYPE_1 = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID", "FrameOfReferenceUID", "Modality")
TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
    "SliceThickness",
)
#: Values of PatientSex (PS3.3, C.7.1.1); another is left empty.
_SEXES = ("M", "F", "O")
#: Decimal strings that are copied: 16 characters at most may be written, whatever was read.
_DECIMALS = (
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
)
#: SNOMED CT codes of what a segment shows.
_ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
_ANATOMICAL = Code("123037004", "SCT", "Anatomical Structure")
_LESION = Code("52988006", "SCT", "Lesion")
_STRUCTURE = Code("91723000", "SCT", "Anatomical structure")


def is_series(source: Path) -> bool:
    """Whether a segmentation object can be made for an image: it is DICOM."""
    return source.is_dir() or (not source.name.lower().endswith((*NIFTI, *FLAT)) and is_dicom(source))


def check_series(sources: Sequence[Path]) -> None:
    """Refuse series that lack what a segmentation object must have, before anything is segmented.

    A series that cannot be read is left to the one who reads it.

    Raises:
        PFedSAMError: E05 naming each series and its missing attributes, E32 for a picture, which has no slices.
    """
    problems = []
    for source in sources:
        try:
            flat = without_place(source)
            frames = [] if flat else slices_of(source)
        except PFedSAMError:
            continue
        if flat:
            message = f"{source} is a picture without a place in the patient, and --dicom-seg is for slices."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Leave it out: the mask of a picture is a PNG.")
        absent = {word for frame in frames for word in TYPE_1 if frame.data.get(word) in (None, "")}
        if absent:
            problems.append(f"{source} lacks {', '.join(named(word) for word in TYPE_1 if word in absent)}")
        elif len({frame.file for frame in frames}) > 1 and any("NumberOfFrames" in frame.data for frame in frames):
            problems.append(f"{source} holds several multi-frame objects")
    if problems:
        raise PFedSAMError(
            ErrorCode.UNREADABLE_IMAGE,
            f"no segmentation object can refer to {len(problems)} series: {'; '.join(problems)}.",
            "Leave out --dicom-seg for them, or restore the attributes.",
        )


def write_segmentation(label: NDArray[np.uint8], source: Path, path: Path, labels: Sequence[str], model: str) -> Path:
    """Write a segmentation object.

    Args:
        label: `(x, y, z)`, values 0 to the number of labels.
        source: folder or file of the series.
        path: without suffix.
        labels: names of the values 1, 2, ...
        model: name of the algorithm.

    Returns:
        The file written.

    Raises:
        PFedSAMError: as `check_series`.
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
    slices = slices_of(source)
    # one frame for each slice, rows first, in the order of the source; one plane for each segment
    planes = np.transpose(label, (2, 1, 0))
    if len({id(frame.data) for frame in slices}) == 1:
        planes = planes[np.argsort([frame.number for frame in slices])]
    pixels = np.stack([planes == number for number in range(1, len(labels) + 1)], axis=-1).astype(np.uint8)
    segmentation = highdicom.seg.Segmentation(
        source_images=_sources(slices),
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
    if len(slices) == 1:
        # highdicom takes 1 mm where there is no second slice
        _measures(segmentation).SpacingBetweenSlices = _measures(segmentation).SliceThickness or slices[0].thickness
    path = path.with_name(path.name + SEGMENTATION)
    with when_whole(path) as file:
        segmentation.save_as(file)
    return path


def _measures(segmentation: pydicom.Dataset) -> pydicom.Dataset:
    return segmentation.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def _sources(slices: Sequence[Frame]) -> list[pydicom.Dataset]:
    """The data sets of a volume, with an empty value for each attribute of type 2 that an anonymiser took away."""
    sources = list({id(frame.data): frame.data for frame in slices}.values())
    for data in sources:
        for keyword in TYPE_2:
            if keyword not in data:
                setattr(data, keyword, None)
        if data.PatientSex not in _SEXES:
            data.PatientSex = ""
        for keyword in _DECIMALS:
            if data.get(keyword) not in (None, ""):
                values = np.atleast_1d(np.asarray(data.get(keyword), dtype=float))
                setattr(data, keyword, [DSfloat(float(value), auto_format=True) for value in values])
    return sources
