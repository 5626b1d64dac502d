"""The registry of backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import nn

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.lora import Layout
from pfedsam.networks.tiny_vit import TinyViT
from pfedsam.networks.vit import build_vit

#: Pixels of a side.
SMALLEST_IMAGE = 32


@dataclass(frozen=True)
class Backbone:
    """What the registry knows of a backbone.

    Attributes:
        encoder: builds the image encoder for an image side in pixels.
        multiple: the image side must be a multiple of it.
        stride: pixels for each position of the embedding, along one side.
        channels: of the image embedding.
        decoder_width: hidden width of the decoder's MLPs.
        layout: of the fused qkv rows.
        mean, std: normalisation of an image in [0, 1].
        checkpoint: name of its default weights (`pfedsam.networks.weights`), or None for random ones from a seed.
        adapted_blocks: how many of the last blocks are adapted where nothing else is asked for.
    """

    encoder: Callable[[int], nn.Module]
    multiple: int
    stride: int
    channels: int
    decoder_width: int
    layout: Layout
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    checkpoint: str | None
    adapted_blocks: int = 2


#: Normalisation of SAM's training (of ImageNet), for an image in [0, 1].
_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def _sam(checkpoint: str, **settings: Any) -> Backbone:
    """A published SAM (Kirillov et al., 2023)."""
    return Backbone(
        encoder=partial(build_vit, **settings),
        multiple=16,
        stride=16,
        channels=256,
        decoder_width=2048,
        layout="blocks",
        checkpoint=checkpoint,
        **_IMAGENET,
    )


BACKBONES: dict[str, Backbone] = {
    "lite_medsam": Backbone(
        encoder=lambda image_size: TinyViT(),
        multiple=4,
        stride=4,
        channels=256,
        decoder_width=2048,
        layout="per_head",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        checkpoint="lite_medsam",
        # all but the convolutions and the first stage of attention (tests/benchmarks/results/choices*.jsonl)
        adapted_blocks=8,
    ),
    "vit_b": _sam("sam_vit_b", width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": _sam("sam_vit_l", width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": _sam("sam_vit_h", width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
    "vit_test": Backbone(
        encoder=partial(build_vit, width=64, depth=3, heads=4, global_blocks=(2,), window=4, channels=32),
        multiple=16,
        stride=16,
        channels=32,
        decoder_width=64,
        layout="blocks",
        checkpoint=None,
        **_IMAGENET,
    ),
}


def get_backbone(name: str) -> Backbone:
    """The backbone of this name (E28 if there is none)."""
    if name not in BACKBONES:
        raise PFedSAMError(ErrorCode.UNKNOWN_NAME, f"unknown backbone '{name}'.", f"Choose one of {sorted(BACKBONES)}.")
    return BACKBONES[name]


def build_parts(name: str, image_size: int) -> dict[str, nn.Module]:
    """Image encoder, prompt encoder and mask decoder as in segment-anything, without weights.

    Raises:
        PFedSAMError: E28 if the backbone is unknown, E16 if it cannot take the image size.
    """
    backbone = get_backbone(name)
    if image_size < SMALLEST_IMAGE or image_size % backbone.multiple:
        remedy = f"Use a multiple of {backbone.multiple} from {SMALLEST_IMAGE} on."
        raise PFedSAMError(ErrorCode.WRONG_SETTING, f"image_size {image_size} for '{name}'.", remedy)
    encoder = backbone.encoder(image_size)
    grid = image_size // backbone.stride
    dim = backbone.channels
    return {
        "image_encoder": encoder,
        "prompt_encoder": PromptEncoder(
            embed_dim=dim, image_embedding_size=(grid, grid), input_image_size=(image_size,) * 2, mask_in_chans=16
        ),
        "mask_decoder": MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=8, mlp_dim=backbone.decoder_width),
            iou_head_hidden_dim=dim,
        ),
    }
