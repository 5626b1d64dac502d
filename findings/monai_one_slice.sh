#!/usr/bin/env bash
# MONAI's SaveImage leaves out axes of length 1 at the end: the label of a volume of one slice is a 2-D file, which does not
# lie on its image in tools that compare shapes.
#
# Guess before: the file has the shape of the volume, (8, 6, 1).
# Seen with MONAI 1.6.1: (8, 6); a volume of two slices is (8, 6, 2).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "monai==1.6.1" "nibabel==5.4.2" torch 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import logging, sys, tempfile, warnings
warnings.simplefilter("ignore")
import monai, nibabel, numpy as np
from monai.transforms import LoadImage, SaveImage

logging.disable(logging.CRITICAL)
seen = {}
with tempfile.TemporaryDirectory() as folder:
    for shape in ((8, 6, 1), (8, 6, 2)):
        nibabel.save(nibabel.Nifti1Image(np.ones(shape, np.uint8), np.diag([2.0, 2, 5, 1])), f"{folder}/a.nii.gz")
        volume = LoadImage(ensure_channel_first=True)(f"{folder}/a.nii.gz")
        SaveImage(folder, output_postfix="label", separate_folder=False, print_log=False)(volume)
        seen[shape] = nibabel.load(f"{folder}/a_label.nii.gz").shape
print(f"MONAI {monai.__version__}: saved shapes by the volume's: {seen}")
sys.exit(seen != {(8, 6, 1): (8, 6), (8, 6, 2): (8, 6, 2)})
PY
