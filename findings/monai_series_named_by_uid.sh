#!/usr/bin/env bash
# Scanners and archives name a folder of DICOM slices by the UID of its series. MONAI's SaveImage takes what follows the last
# dot of that name for a suffix: series 1.2.840.1 and 1.2.840.2 are saved under one name, the second over the first.
#
# Guess before: a folder has no suffix, so its name is kept.
# Seen with MONAI 1.6.1: two folders, one result, 1.2.840_seg.nii.gz.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "monai==1.6.1" "nibabel==5.4.2" "pydicom==3.0.2" torch 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import logging, os, sys, tempfile, warnings
warnings.simplefilter("ignore")
import monai, numpy as np
from monai.transforms import LoadImage, SaveImage
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

logging.disable(logging.CRITICAL)


def series(folder):
    os.makedirs(folder)
    for z in range(3):
        data = Dataset()
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.InstanceNumber, data.Rows, data.Columns, data.PixelSpacing = z + 1, 4, 4, [1, 1]
        data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, z]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelData = np.full(16, z, np.uint16).tobytes()
        data.save_as(f"{folder}/{z}.dcm", enforce_file_format=True)


with tempfile.TemporaryDirectory() as folder:
    for name in ("1.2.840.1", "1.2.840.2"):
        series(f"{folder}/{name}")
        volume = LoadImage(reader="PydicomReader", ensure_channel_first=True)(f"{folder}/{name}")
        SaveImage(f"{folder}/out", output_postfix="seg", separate_folder=False, print_log=False)(volume)
    written = sorted(os.listdir(f"{folder}/out"))
print(f"MONAI {monai.__version__}: two series, results {written}")
sys.exit(written != ["1.2.840_seg.nii.gz"])
PY
