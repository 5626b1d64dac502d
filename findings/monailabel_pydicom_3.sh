#!/usr/bin/env bash
# MONAI Label 0.8.5 asks for pydicom 2.4.4 or newer and for pydicom-seg. What pip takes today, pydicom 3, has no module that
# pydicom-seg 0.4.1 (its last release) imports: a fresh installation of MONAI Label cannot import its server.
#
# Guess before: two packages whose declared versions fit each other can be imported together.
# Seen with pydicom-seg 0.4.1: with pydicom 3.0.1 ModuleNotFoundError, pydicom._storage_sopclass_uids; with 2.4.4 it works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "pydicom-seg==0.4.1" "pydicom==3.0.1" setuptools
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" "monailabel==0.8.5"
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
import zipfile
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("monailabel-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
asked = sorted(line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: pydicom"))
try:
    import pydicom_seg

    seen = "it works"
except ModuleNotFoundError as error:
    seen = f"there is no {error.name}"
print(f"MONAI Label 0.8.5 asks for {asked}; pydicom-seg 0.4.1 with pydicom 3.0.1: {seen}")
sys.exit((asked, seen) != (["pydicom-seg>=0.4.1", "pydicom>=2.4.4"], "there is no pydicom._storage_sopclass_uids"))
PY
"$folder/venv/bin/pip" install --quiet "pydicom==2.4.4"
"$folder/venv/bin/python" -c "import pydicom_seg, pydicom; print('with pydicom', pydicom.__version__, 'it works')"
