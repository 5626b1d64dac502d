"""The surgery: LoRA (shared) and experts (personal) are added to a Segment Anything network.

Every replaced layer keeps the names of its tensors, so a SAM checkpoint loads before or after the surgery.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.transformer import Attention
from torch import Tensor, nn

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.lora import Layout, LoRA, QVLoRA
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.moe import Gate, LMoE

#: Where experts may be: beside the MLPs of the adapted encoder blocks, the neck's 3x3 convolution, the decoder's MLPs.
Place = Literal["encoder", "neck", "decoder"]
#: Which linear layers of an adapted block get LoRA: q and v, the output projection of the attention, both of the MLP.
LoRAPlace = Literal["qv", "projection", "mlp"]
#: Settings of `adapt` that change nothing but the experts.
EXPERT_SETTINGS = ("experts", "bottleneck", "expert_scale", "expert_places", "gate", "top_k")
_EXPERT_SEED = 1_000_003
#: `adapted_blocks` as the registry of backbones has it.
AUTO = "auto"


class MLPWithExperts(MLPBlock):
    """segment-anything's MLP block with experts in parallel; its tensors keep their names."""

    def __init__(self, mlp: MLPBlock, experts: LMoE):
        nn.Module.__init__(self)
        self.lin1, self.lin2, self.act, self.experts = mlp.lin1, mlp.lin2, mlp.act, experts

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ..., dim)` to the same shape; `x` is normed already."""
        return super().forward(x) + self.experts(x)


class ConvWithExperts(nn.Conv2d):
    """A 3x3 convolution that keeps the number of channels, with experts in parallel; its tensors keep their names."""

    def __init__(self, conv: nn.Conv2d, experts: LMoE):
        nn.Module.__init__(self)
        self.__dict__.update({key: value for key, value in conv.__dict__.items() if key not in self.__dict__})
        self.weight, self.bias, self.experts = conv.weight, conv.bias, experts

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W)` to the same shape; `x` is normed already."""
        return super().forward(x) + self.experts(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def adapt(
    network: SegmentAnything,
    layout: Layout,
    *,
    adapted_blocks: int | str = 2,
    lora_rank: int = 4,
    lora_places: Sequence[str] = ("qv",),
    decoder_rank: int = 0,
    experts: int = 4,
    bottleneck: int = 16,
    expert_scale: float = 1.0,
    expert_places: Sequence[str] = ("encoder",),
    gate: Gate = "image",
    top_k: int = 0,
    seed: int = 0,
) -> None:
    """Add low-rank updates and experts.

    Args:
        network: is changed in place.
        layout: of the encoder's fused qkv rows.
        adapted_blocks: the last so many encoder blocks get LoRA and experts; `all` for each.
        lora_rank: rank in the encoder, 0 for none.
        lora_places: which layers of these blocks get LoRA, some of `LoRAPlace`.
        decoder_rank: rank of LoRA on q and v of the decoder's attention layers, 0 for none.
        experts: number of experts of each mixture, 0 for no mixture.
        bottleneck: hidden width of an expert.
        expert_scale: s of the mixture.
        expert_places: where mixtures are, some of `Place`.
        gate: per image or per token.
        top_k: gates that count, 0 for all.
        seed: of the initial values.

    Raises:
        PFedSAMError: E16 for an impossible setting, naming it.
    """
    blocks = network.image_encoder.adaptable_blocks()  # type: ignore[operator]
    number = len(blocks) if adapted_blocks == "all" else adapted_blocks
    if not isinstance(number, int) or not 0 <= number <= len(blocks):
        raise PFedSAMError(
            ErrorCode.WRONG_SETTING,
            f"adapted_blocks is {adapted_blocks!r}.",
            f"Use 'auto', 'all' or 0 to {len(blocks)}.",
        )
    _check(lora_rank, lora_places, decoder_rank, experts, bottleneck, expert_places, gate, top_k)
    generator = torch.Generator().manual_seed(seed)
    # of their own: the shared tensors start alike whatever is personal
    of_experts = torch.Generator().manual_seed(seed + _EXPERT_SEED)

    def mixture(dim: int) -> LMoE:
        device = network.prompt_encoder.no_mask_embed.weight.device  # type: ignore[union-attr]
        return LMoE(dim, experts, bottleneck, expert_scale, gate, top_k, of_experts, device)  # type: ignore[arg-type]

    network.first_adapted = len(blocks) - number
    for block in blocks[network.first_adapted :]:
        qkv = block.attn.qkv
        if lora_rank:
            _add_lora(block, layout, lora_rank, lora_places, generator)
        if experts and "encoder" in expert_places:
            if isinstance(block.mlp, MLPBlock):
                block.mlp = MLPWithExperts(block.mlp, mixture(qkv.in_features))
            else:
                block.mlp.experts = mixture(qkv.in_features)
    if experts and "neck" in expert_places:
        neck: Any = network.image_encoder.neck
        neck[2] = ConvWithExperts(neck[2], mixture(neck[2].out_channels))
        network.neck_is_adapted = True
    transformer: Any = network.mask_decoder.transformer
    if experts and "decoder" in expert_places:
        for layer in transformer.layers:
            layer.mlp = MLPWithExperts(layer.mlp, mixture(layer.mlp.lin1.in_features))
    if decoder_rank:
        for attention in [module for module in transformer.modules() if isinstance(module, Attention)]:
            attention.q_proj = LoRA(attention.q_proj, decoder_rank, generator=generator)
            attention.v_proj = LoRA(attention.v_proj, decoder_rank, generator=generator)


def _add_lora(block: Any, layout: Layout, rank: int, places: Sequence[str], generator: torch.Generator) -> None:
    """LoRA in one encoder block; segment-anything's ViT and TinyViT name the layers of the MLP differently."""
    if "qv" in places:
        block.attn.qkv = QVLoRA(block.attn.qkv, block.attn.num_heads, layout, rank, generator=generator)
    if "projection" in places:
        block.attn.proj = LoRA(block.attn.proj, rank, generator=generator)
    if "mlp" in places:
        layers = {name: layer for name, layer in block.mlp.named_children() if isinstance(layer, nn.Linear)}
        for name, layer in layers.items():
            setattr(block.mlp, name, LoRA(layer, rank, generator=generator))


def _check(
    lora_rank: int,
    lora_places: Sequence[str],
    decoder_rank: int,
    experts: int,
    bottleneck: int,
    expert_places: Sequence[str],
    gate: str,
    top_k: int,
) -> None:
    smallest = {
        "lora_rank": (lora_rank, 0),
        "decoder_rank": (decoder_rank, 0),
        "experts": (experts, 0),
        "bottleneck": (bottleneck, 1),
        "top_k": (top_k, 0),
    }
    wrong = [f"{name} is {value}, at least {least}" for name, (value, least) in smallest.items() if value < least]
    if experts and top_k > experts:
        wrong.append(f"top_k is {top_k}, at most the number of experts, {experts}")
    for name, places, known in (
        ("lora_places", lora_places, get_args(LoRAPlace)),
        ("expert_places", expert_places, get_args(Place)),
    ):
        if isinstance(places, str) or set(places) - set(known) or len(set(places)) < len(places):
            wrong.append(f"{name} is {places!r}, a list of some of {known}")
    if gate not in get_args(Gate):
        wrong.append(f"gate is {gate!r}, one of {get_args(Gate)}")
    if wrong:
        raise PFedSAMError(ErrorCode.WRONG_SETTING, "; ".join(wrong) + ".", "Correct the bundle or the override.")


#: Settings of `adapt` with their defaults. They are part of the fingerprint, written out or not.
ADAPTATION: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(adapt).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "seed"
}
