#!/usr/bin/env bash
# A network that is written as TorchScript or as ONNX carries the folders of the machine that wrote it: the paths of the
# source files, among them a user's home and the name of a project.
#
# Guess before: the files hold operations, shapes and weights.
# Seen with torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2: TorchScript has a file of source ranges beside its code
# (*.debug_pkl), and the ONNX exporter (dynamo) writes the Python stack of each node into its metadata.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.14.1" "onnx==1.23.2" "onnxscript==0.7.2" "numpy==2.4.6" 2>/dev/null
mkdir -p "$folder/the-home-of-somebody"
cat >"$folder/the-home-of-somebody/small.py" <<'PY'
import torch


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x).relu()
PY
cd "$folder"
PYTHONPATH="$folder/the-home-of-somebody" "$folder/venv/bin/python" -W ignore - <<'PY'
import sys
import zipfile

import onnx, torch
from small import Small

network, example = Small().eval(), torch.zeros(1, 4)
torch.jit.trace(network, example).save("small.ts")
with zipfile.ZipFile("small.ts") as archive:
    told = {name: archive.read(name) for name in archive.namelist()}
named = sorted(name for name, data in told.items() if b"the-home-of-somebody" in data)
torch.onnx.export(network, (example,), "small.onnx", dynamo=True, external_data=False, verbose=False)
model = onnx.load("small.onnx")
keys = sorted({p.key for node in model.graph.node for p in node.metadata_props if "the-home-of-somebody" in p.value})
print(f"torch {torch.__version__}: TorchScript names the folder in {named}, ONNX in the metadata {keys} of its nodes")
sys.exit(not (named and keys))
PY
