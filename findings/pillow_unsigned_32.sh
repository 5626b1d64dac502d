#!/usr/bin/env bash
# Pillow has one mode for integers of 32 bits, a signed one, and takes unsigned TIFF for it: large numbers become negative.
#
# Guess before: an error, or a mode of floating point.
# Seen with Pillow 13.0.0: 3000000000 of an unsigned TIFF (SampleFormat 1, the default) is read as -1294967296.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "pillow==13.0.0" "tifffile==2025.5.10" "numpy==2.2.6" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys, tempfile
import numpy as np, PIL, tifffile
from PIL import Image

with tempfile.TemporaryDirectory() as folder:
    tifffile.imwrite(f"{folder}/a.tif", np.full((2, 3), 3_000_000_000, np.uint32))
    with Image.open(f"{folder}/a.tif") as image:
        found = np.asarray(image)
print(f"Pillow {PIL.__version__}: mode {image.mode}, {found.dtype}, value {found[0, 0]}; stored 3000000000")
sys.exit((image.mode, int(found[0, 0])) != ("I", -1294967296))
PY
