"""Image files of many kinds for tests, written with the libraries of their formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import highdicom
import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    generate_uid,
)

#: Of the volumes that `series` writes by default, in millimetres right, anterior, superior.
SERIES_AFFINE = np.array([[-3.0, 0, 0, 50], [0, -2.5, 0, 60], [0, 0, 4, -30], [0, 0, 0, 1]])
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def head(shape: Sequence[int] = (24, 20, 6), seed: int = 0) -> np.ndarray:
    """A bright, asymmetric, smooth blob with a little noise, integers from 0 to 250."""
    grid = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    blob = 180 * np.exp(-sum((one - 0.2 * n) ** 2 for n, one in enumerate(grid, 1)) * 2)
    values = blob + 40 * (grid[0] > 0.3) + np.random.default_rng(seed).uniform(0, 20, shape)
    return values.clip(0, 250).astype(np.int16)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """A NIfTI file; without an affine of 1 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def scaled_nifti(path: Path, stored: np.ndarray, slope: float, intercept: float, affine: np.ndarray) -> Path:
    """A NIfTI file of integers with a slope and an intercept in its header."""
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_slope_inter(slope, intercept)
    path.parent.mkdir(parents=True, exist_ok=True)
    # from_file_map scales the data anew unless the array is as it is stored
    with path.open("wb") as file:
        header = image.header.copy()
        header.set_data_offset(352)
        header.write_to(file)
        header["scl_slope"], header["scl_inter"] = slope, intercept
        file.seek(0)
        file.write(header.binaryblock)
        file.seek(352)
        file.write(np.asfortranarray(stored).tobytes(order="F"))
    return path


def dicom_slice(values: np.ndarray, position: Sequence[float], orientation: Sequence[float] = AXIAL) -> Dataset:
    """One CT slice `(x, y)` of 3 x 2.5 x 4 mm with a slope of 1 and an intercept of 0, of series and study unset."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "p", "Phantom^A", "", ""
    data.StudyDate = data.StudyTime = data.StudyID = data.AccessionNumber = data.ReferringPhysicianName = ""
    data.Modality, data.SeriesNumber, data.ImageType = "CT", 1, ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.ImageOrientationPatient = list(orientation)
    data.ImagePositionPatient = [round(float(one), 6) for one in position]
    data.PixelSpacing, data.SliceThickness = [2.5, 3.0], 4.0
    data.Rows, data.Columns = values.shape[1], values.shape[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.PixelData = np.ascontiguousarray(values.T).astype("<i2").tobytes()
    return data


def x_ray(
    values: np.ndarray,
    *,
    modality: str = "CR",
    photometric: str = "MONOCHROME2",
    bits: int = 12,
    signed: bool = False,
) -> Dataset:
    """One X-ray `(x, y)` with pixels of 0.2 x 0.14 mm, as scanners write it: without a place in the patient."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = ComputedRadiographyImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = "p", "Phantom^A", "", ""
    data.StudyDate = data.StudyTime = data.StudyID = data.AccessionNumber = data.ReferringPhysicianName = ""
    data.Modality, data.BodyPartExamined, data.ViewPosition = modality, "CHEST", "PA"
    data.ImageType, data.PatientOrientation = ["ORIGINAL", "PRIMARY"], ["L", "F"]
    data.PixelSpacing = [0.14, 0.2]
    data.Rows, data.Columns = values.shape[1], values.shape[0]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated = 8 if bits <= 8 else 16
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1, int(signed)
    kind = f"<{'i' if signed else 'u'}{data.BitsAllocated // 8}"
    data.PixelData = np.ascontiguousarray(values.T).astype(kind).tobytes()
    return data


def series(
    folder: Path,
    values: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    step: Sequence[float] = (0.0, 0.0, 4.0),
    origin: Sequence[float] = (-50.0, -60.0, -30.0),
    syntax: UID = ExplicitVRLittleEndian,
    edit: Callable[[Dataset, int], Any] | None = None,
    drop: Sequence[str] = (),
) -> Path:
    """A CT series of a volume `(x, y, z)` in `SERIES_AFFINE`, one file a slice, in random order, without suffix.

    Args:
        folder: to write to.
        values: stored values.
        orientation, step, origin: of the slices, in DICOM's coordinates.
        syntax: transfer syntax; what is compressed is so without loss.
        edit: changes a data set, called with it and the number of its slice.
        drop: attributes to leave out.
    """
    folder.mkdir(parents=True)
    study, one, frame = generate_uid(), generate_uid(), generate_uid()
    names = np.random.default_rng(0).permutation(values.shape[2])
    for z in range(values.shape[2]):
        data = dicom_slice(values[..., z], np.asarray(origin) + z * np.asarray(step), orientation)
        data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = study, one, frame
        data.InstanceNumber = z + 1
        if edit:
            edit(data, z)
        for keyword in drop:
            del data[keyword]
        save_dicom(folder / f"{names[z]:03d}", data, syntax)
    return folder


def save_dicom(path: Path, data: Dataset, syntax: UID = ExplicitVRLittleEndian) -> Path:
    """Write a data set in a transfer syntax."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if syntax.is_encapsulated:
        data.compress(syntax, generate_instance_uid=False)
    else:
        data.file_meta.TransferSyntaxUID = syntax
        if not syntax.is_little_endian:
            data.PixelData = np.frombuffer(data.PixelData, "<i2").byteswap().tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def enhanced(folder: Path, path: Path, shuffle: bool) -> Path:
    """The series in a folder as one multi-frame object; the frames in any order."""
    slices = sorted((pydicom.dcmread(one) for one in folder.iterdir()), key=lambda one: one.InstanceNumber)
    for one in slices:
        one.PositionReferenceIndicator, one.PatientPosition, one.Manufacturer = "", "HFS", "none"
    if shuffle:
        for number, at in enumerate(np.random.default_rng(3).permutation(len(slices)), 1):
            slices[at].InstanceNumber = number
        slices.sort(key=lambda one: one.InstanceNumber)
    whole = highdicom.legacy.LegacyConvertedEnhancedCTImage(
        legacy_datasets=slices,
        series_instance_uid=highdicom.UID(),
        series_number=2,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
    )
    pydicom.dcmwrite(path, whole)
    return path
