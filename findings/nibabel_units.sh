#!/usr/bin/env bash
# A NIfTI header may state its lengths in metres, millimetres or micrometres. nibabel's affine is in that unit, although its
# documentation speaks of millimetres throughout; nothing warns.
#
# Guess before: the affine is converted to millimetres.
# Seen with nibabel 5.4.2: voxels of 10 micrometres have the affine diag(10, 10, 10), as if they were 10 mm wide.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "nibabel==5.4.2" "numpy==2.2.6" 2>/dev/null
"$folder/venv/bin/python" -W error - <<'PY'
import sys, tempfile
import nibabel, numpy as np

with tempfile.TemporaryDirectory() as folder:
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.diag([10.0, 10, 10, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, f"{folder}/a.nii")
    found = nibabel.load(f"{folder}/a.nii")
print(f"nibabel {nibabel.__version__}: unit {found.header.get_xyzt_units()[0]}, affine {np.diag(found.affine)[:3]}")
sys.exit(not np.allclose(np.diag(found.affine)[:3], 10))
PY
