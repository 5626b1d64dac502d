#!/usr/bin/env bash
# Pillow scrambles a TIFF without compression that its orientation tag turns sideways (5 to 8).
#
# Guess before: since Pillow 6.2 a TIFF is turned upright when it is loaded, whatever its compression.
# Seen with Pillow 11.0.0 and 13.0.0: right for LZW; without compression, orientations 5 to 8 give an array of the stored
# shape with pixels in another order. Pillow 10.4.0 is right for both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/look.py" <<'PY'
import json, sys, tempfile
import numpy as np, PIL
from PIL import Image

stored = np.arange(12, dtype=np.uint8).reshape(3, 4)
# what a viewer shows of the stored rows, by the value of tag 274 (TIFF 6.0, Orientation)
shown = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.T, 6: np.rot90(stored, 3),
         7: np.rot90(stored.T, 2), 8: np.rot90(stored)}
wrong = {}
with tempfile.TemporaryDirectory() as folder:
    for compression in ("none", "tiff_lzw"):
        wrong[compression] = []
        for orientation, expected in shown.items():
            path = f"{folder}/a.tif"
            how = {} if compression == "none" else {"compression": compression}
            Image.fromarray(stored).save(path, tiffinfo={274: orientation}, **how)
            with Image.open(path) as image:
                if not np.array_equal(np.asarray(image), expected):
                    wrong[compression].append(orientation)
print(f"Pillow {PIL.__version__}: wrong orientations {wrong}")
sys.exit(wrong != {"none": json.loads(sys.argv[1]), "tiff_lzw": []})
PY
for pair in "10.4.0 []" "11.0.0 [5,6,7,8]" "13.0.0 [5,6,7,8]"; do
  read -r version expected <<<"$pair"
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "pillow==$version" "numpy==2.2.6" 2>/dev/null
  "$folder/$version/bin/python" "$folder/look.py" "$expected"
done
