"""`models/model.pt` of a bundle: every tensor of its network by name, as MONAI's model zoo asks for it."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pfedsam.errors import ErrorCode
from pfedsam.files import write_atomically
from pfedsam.networks.loading import read_checkpoint
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import Manifest, Roles, check_state, manifest
from pfedsam.storage.site_model import read

#: In a bundle's folder.
WEIGHTS = Path("models", "model.pt")
#: What a bundle's own training writes into its output folder.
_TRAINED = "model.safetensors"


def write_bundle_weights(root: Path, network: SegmentAnything, shared: Mapping[str, Tensor]) -> Path:
    """Write `models/model.pt` of a bundle, atomically: a network's tensors, some of them replaced.

    Args:
        root: the bundle's folder.
        network: as the bundle builds it: its experts are as they start, so no site's own are in the file.
        shared: shared tensors of a trained model by name; empty for the network as it is.

    Raises:
        PFedSAMError: E12 if a tensor does not fit or is not finite.
    """
    weights = {**network.state_dict(), **shared}
    check_state(weights, _every_tensor(network), code=ErrorCode.SHARED_TENSORS, what=f"weights of {root.name}")
    buffer = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, buffer)
    write_atomically(root / WEIGHTS, buffer.getvalue())
    return root / WEIGHTS


def default_model(output_dir: str, bundle_root: str) -> str | None:
    """The model that a bundle's inference takes where none is named. For bundles.

    Args:
        output_dir: what the bundle's training wrote there comes first.
        bundle_root: the bundle's folder, whose `models/model.pt` comes next.

    Returns:
        Its path; None if there is neither.
    """
    found = (path for path in (Path(output_dir, _TRAINED), Path(bundle_root) / WEIGHTS) if path.is_file())
    return next((str(path) for path in found), None)


def load_model(network: SegmentAnything, model_file: str | None, experts_on: bool) -> None:
    """Put a model into a network, and say which. For bundles.

    Args:
        network: of the same base weights and settings as the model.
        model_file: a site's model, or a bundle's `models/model.pt`. None leaves the base weights, with a warning: that
            network is not trained for the task.
        experts_on: the personal model of a site, else the global one.

    Raises:
        PFedSAMError: E10 or E13 if the file is missing or no model, E11 to E13 if it does not fit the network.
    """
    log = logging.getLogger(__name__)
    if model_file is None:
        network.set_experts(experts_on)
        log.warning(
            "UNTRAINED: no model is named, and none is where the bundle looks for one. The network has base weights "
            "alone: what it writes is no segmentation. Name a model with --model_file, or see `pfedsam bundle-weights`."
        )
        return
    log.info(f"model: {model_file}")
    if zipfile.is_zipfile(model_file):
        _load_weights(network, Path(model_file))
        network.set_experts(experts_on)
    else:
        read(model_file).load_as(network, experts_on)


def _every_tensor(network: SegmentAnything) -> Manifest:
    parts = [manifest(network, Roles(), role) for role in ("shared", "personal", "frozen")]
    return {name: spec for part in parts for name, spec in part.items()}


def _load_weights(network: SegmentAnything, path: Path) -> None:
    weights = read_checkpoint(path)
    check_state(weights, _every_tensor(network), code=ErrorCode.WRONG_CHECKPOINT, what=str(path))
    network.load_state_dict(weights)
