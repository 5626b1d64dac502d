#!/usr/bin/env bash
# A TIFF may say that 0 is white (PhotometricInterpretation 0, as films do). Pillow turns the values for 8 bits, not for 16.
#
# Guess before: both or neither.
# Seen with Pillow 13.0.0: stored 10 is read as 245 with 8 bits; stored 2570 is read as 2570 with 16 bits (white is 65535).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "pillow==13.0.0" "numpy==2.2.6" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import io, struct, sys
import numpy as np, PIL
from PIL import Image


def tiff(values, white_is_zero):
    """A plain TIFF 6.0 file of one strip, little-endian."""
    bits, (rows, columns) = values.dtype.itemsize * 8, values.shape
    strip = values.tobytes()
    tags = [(256, columns), (257, rows), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1),
            (278, rows), (279, len(strip))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHIHH", t, 3, 1, v, 0) for t, v in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


seen = []
for kind, value in ((np.uint8, 10), (np.dtype("<u2"), 2570)):
    stored = np.full((2, 4), value, kind)
    plain, white = (int(np.asarray(Image.open(io.BytesIO(tiff(stored, how))))[0, 0]) for how in (False, True))
    seen.append((plain, white))
    print(f"Pillow {PIL.__version__}, {stored.dtype}: stored {value}; black is zero: {plain}; white is zero: {white}")
sys.exit(seen != [(10, 245), (2570, 2570)])
PY
