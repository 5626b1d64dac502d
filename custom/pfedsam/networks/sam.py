"""Builds the network of a bundle: Segment Anything with base weights, LoRA (shared) and experts (personal)."""

from __future__ import annotations

from typing import Any

import torch

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.adaptation import ADAPTATION, AUTO, adapt
from pfedsam.networks.backbones import get_backbone
from pfedsam.networks.loading import load_base, read_checkpoint
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.weights import locate
from pfedsam.parameters import base_fingerprint


def build_network(
    backbone: str = "lite_medsam",
    image_size: int = 128,
    classes: int = 1,
    checkpoint: str | None = "default",
    seed: int = 0,
    checkpointing: bool = False,
    **adaptation: Any,
) -> SegmentAnything:
    """Build the network of a bundle: base weights, LoRA, experts, fingerprint.

    Args:
        backbone: a name of the registry.
        image_size: side of the input in pixels.
        classes: output channels.
        checkpoint: `default` for the backbone's own weights, a name of `pfedsam models`, a path, or None: no weights,
            which is allowed for `vit_test` (seeded random weights) and on the meta device only.
        checkpointing: see `SegmentAnything`; it changes memory and time, not the output.
        seed: of the initial adapters, and of `vit_test`'s weights.
        adaptation: settings of `adapt`; `adapted_blocks` may also be `auto`, the backbone's own number.

    Raises:
        PFedSAMError: E10 for a wrong or missing checkpoint, E16 for wrong settings.
    """
    registered = get_backbone(backbone)
    unknown = sorted(set(adaptation) - set(ADAPTATION))
    if unknown or classes < 1:
        what = f"unknown setting(s) {unknown}" if unknown else f"classes is {classes}"
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"{what}.", f"Settings: {sorted(ADAPTATION)}; at least one class.")
    if adaptation.get("adapted_blocks", AUTO) == AUTO:
        adaptation["adapted_blocks"] = registered.adapted_blocks
    meta = torch.empty(()).device.type == "meta"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SegmentAnything(backbone, image_size, classes)
        adapt(network, registered.layout, seed=seed, **adaptation)
    network.checkpointing = checkpointing
    if not meta and registered.checkpoint is not None:
        if checkpoint is None:
            raise PFedSAMError(
                ErrorCode.WRONG_CHECKPOINT,
                f"no checkpoint for '{backbone}'.",
                "Random weights are never used silently.",
            )
        path, checksum = locate(registered.checkpoint if checkpoint == "default" else checkpoint)
        load_base(network, read_checkpoint(path, checksum), str(path))
    if not meta:
        settings = {"backbone": backbone, "image_size": image_size, "classes": classes, **ADAPTATION, **adaptation}
        network.base_fingerprint = base_fingerprint(network, settings)
    return network.eval()
