#!/usr/bin/env bash
# MONAI's SliceInferer changes its own roi_size when it is called: from the two numbers that it was given to three. So an
# inferer that is made from the attributes of one that was used refuses its volumes.
#
# Guess before: roi_size is (8, 8) after a call as before it.
# Seen with MONAI 1.6.1: [8, 8, 1] after the first call; SliceInferer(roi_size=used.roi_size) then raises on a volume.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "monai==1.6.1" torch 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys, warnings
warnings.simplefilter("ignore")
import monai, torch
from monai.inferers import SliceInferer

used = SliceInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=2)
before = list(used.roi_size)
used(torch.zeros(1, 1, 8, 8, 3), lambda images: images)
after = list(used.roi_size)
try:
    SliceInferer(roi_size=used.roi_size, sw_batch_size=2, spatial_dim=2)(torch.zeros(1, 1, 8, 8, 3), lambda images: images)
    second = "works"
except RuntimeError as error:
    second = f"raises {type(error).__name__}"
print(f"MONAI {monai.__version__}: roi_size {before} before, {after} after a call; an inferer made from it {second}")
sys.exit((before, after, second) != ([8, 8], [8, 8, 1], "raises RuntimeError"))
PY
