"""The weights that a bundle goes out with: `models/model.pt`, of a global model or of the base weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.files import read_safetensors
from pfedsam.inference.global_start import GlobalStart, find_start
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import SHAREABLE_GROUPS, Roles, manifest
from pfedsam.storage.bundle_weights import write_bundle_weights
from pfedsam.storage.global_model import FINGERPRINT
from pfedsam.storage.site_model import read


def make_weights(root: Path, model: Path | None = None) -> Path:
    """Write `models/model.pt` into a bundle's folder.

    Args:
        root: the bundle's folder.
        model: a global model, a site's model, or the folder of a run: see `pfedsam.inference.global_start.find_start`.
            Of a site's model the shared part alone is taken, so nothing personal is in the file. None for the base
            weights, which are not trained for the task.

    Returns:
        The file.

    Raises:
        PFedSAMError: E02 if there is no bundle, E10 or E13 if there is no model, E11 or E12 if it does not fit the
            network as the bundle's own settings make it, E32 if it is another bundle's.
    """
    root = root.resolve()
    network = _network(root)
    shared = {} if model is None else _shared(root, network, find_start(model))
    return write_bundle_weights(root, network, shared)


def _network(root: Path) -> SegmentAnything:
    from monai.bundle import ConfigParser

    config = root / "configs" / "inference.json"
    if not config.is_file():
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"there is no {config}.", "Give the folder of a bundle.")
    parser = ConfigParser()
    parser.read_config(str(config))
    network: Any = parser.get_parsed_content("network_def")
    return network


def _shared(root: Path, network: SegmentAnything, start: GlobalStart) -> dict[str, Tensor]:
    if start.bundle not in (None, root.name):
        message = f"{start.file} is a model of the bundle {shown(start.bundle)}, the folder is {root.name}."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Give a model that was trained with this bundle.")
    if (fingerprint := _fingerprint(start)) != network.base_fingerprint:
        raise PFedSAMError(
            ErrorCode.OTHER_BASE_WEIGHTS,
            f"{start.file} was trained on base weights {fingerprint[:12]} with the overrides {start.overrides}, the "
            f"bundle makes a network of {str(network.base_fingerprint)[:12]}.",
            "Write the settings of the training into the configurations of a bundle of your own.",
        )
    if start.of_site:
        expected = manifest(network, read(start.file).roles, "shared")
    else:
        # a global model does not tell its strategy; what is in it is a part of what may be shared, or is refused
        sharable = manifest(network, Roles(shared=tuple(SHAREABLE_GROUPS), personal=()), "shared")
        named = read_safetensors(start.file)[0]
        expected = {name: spec for name, spec in sharable.items() if name in named}
    return start.tensors(expected)[0]


def _fingerprint(start: GlobalStart) -> str:
    """Of the base weights and settings that a model was trained with."""
    if start.of_site:
        return str(read(start.file).info.get("fingerprint"))
    return read_safetensors(start.file)[1].get(FINGERPRINT, "")
