"""Bytes that a site sends in a round, beside sending all of SAM. Prints a table and writes results/payload.json."""

import json
from pathlib import Path

import numpy as np
from nvflare.apis.dxo import DXO, DataKind
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.fuel.utils import fobs
from rich.console import Console
from rich.table import Table

from pfedsam.bundles import network_of
from pfedsam.parameters import Roles, manifest

#: Parameters of SAM with ViT-B (Kirillov et al., 2023); 4 bytes each.
SAM_VIT_B = 93_735_472


def main() -> None:
    fobs.register(NumpyArrayDecomposer)
    network = network_of("brain_lesion_mri", weights=False)
    shared = manifest(network, Roles(), "shared")
    arrays = {name: np.zeros(spec.shape, spec.dtype) for name, spec in shared.items()}
    parameters = sum(array.size for array in arrays.values())
    wire = len(fobs.dumps(DXO(DataKind.WEIGHT_DIFF, data=arrays).to_shareable()))
    full = 4 * sum(parameter.numel() for parameter in network.parameters())
    rows = {
        "shared tensors, fp32": 4 * parameters,
        "the same, serialised by NVFlare": wire,
        "all of this network": full,
        "all of SAM ViT-B": 4 * SAM_VIT_B,
    }
    table = Table("what is sent", "bytes", "ratio", title=f"brain_lesion_mri: {parameters} shared parameters")
    for name, size in rows.items():
        table.add_row(name, f"{size:,}", f"{size / rows['shared tensors, fp32']:.3f}")
    Console().print(table)
    out = Path(__file__).parent / "results" / "payload.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"shared_parameters": parameters, "bytes": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
