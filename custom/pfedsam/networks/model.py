"""The network's class: Segment Anything, without prompts or with boxes; what is added to it is `adaptation`'s."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from pfedsam.networks.backbones import build_parts, get_backbone
from pfedsam.networks.moe import LMoE
from pfedsam.networks.prompts import box_tokens
from pfedsam.networks.scripting import Scriptable
from pfedsam.parameters import ADDED, group_of, tensors, update_digest


class SegmentAnything(nn.Module):
    """`(B, 3, H, W)` in [0, 1] to logits `(B, C, H, W)`.

    Normalisation happens inside. There is no prompt by default: the dense prompt is SAM's `no_mask_embed`, and there
    are no sparse tokens but inside `prompted`. `forward` is `head(trunk(images))`: `trunk` is the frozen part before
    the first adapted block and can be cached, `head` is all the rest.

    Args:
        backbone: a name of the registry.
        image_size: side of the input in pixels.
        classes: output channels C; the decoder has one mask token for each.

    Attributes:
        frozen_trunk: False while the encoder itself is trained: then nothing is cached and all of it gets a gradient.
        checkpointing: compute the activations of each encoder block again in the backward pass, to save memory.
    """

    base_fingerprint: str | None = None
    frozen_trunk: bool = True
    checkpointing: bool = False
    neck_is_adapted: bool = False
    boxes: Tensor | None = None
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: str, image_size: int, classes: int):
        super().__init__()
        settings = get_backbone(backbone)
        parts = build_parts(backbone, image_size)
        self.image_encoder, self.prompt_encoder = parts["image_encoder"], parts["prompt_encoder"]
        self.mask_decoder: MaskDecoder = select_mask_tokens(parts["mask_decoder"], classes)
        self.image_size, self.classes = image_size, classes
        self.first_adapted = len(self.image_encoder.adaptable_blocks())  # type: ignore[operator]
        self.register_buffer("pixel_mean", torch.tensor(settings.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(settings.std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> SegmentAnything:
        """Training mode for the adapted parts only: running statistics of the encoder must never move."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def trunk(self, images: Tensor) -> Tensor:
        """`(B, 3, H, W)` to the frozen features before the first adapted block, without gradient."""
        with torch.no_grad():
            x = (images - self.pixel_mean) / self.pixel_std
            for step in self._steps()[: self._split()]:
                x = step(x)
        return x

    def trunk_fingerprint(self) -> str:
        """SHA-256 over what `trunk` computes with: where it ends, the normalisation and the encoder's base weights."""
        digest = hashlib.sha256(f"{self.image_size}|{self._split()}".encode())
        encoder = {name: t for name, t in tensors(self).items() if name.startswith("image_encoder.")}
        base = {name: tensor for name, tensor in encoder.items() if group_of(name) not in ADDED}
        update_digest(digest, {"pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std, **base})
        return digest.hexdigest()

    def head(self, features: Tensor) -> Tensor:
        """Features of `trunk` to logits `(B, C, H, W)`."""
        return self.decode(self.encode(features))

    def encode(self, features: Tensor) -> Tensor:
        """Features of `trunk` to the image embedding `(B, D, h, w)`."""
        again = self.checkpointing and torch.is_grad_enabled()
        for step in self._steps()[self._split() :]:
            features = recompute(step, features, use_reentrant=False) if again else step(features)
        return features

    def decode(self, embedding: Tensor) -> Tensor:
        """Image embedding `(B, D, h, w)` to logits `(B, C, H, W)`."""
        if self.boxes is None:
            # a batch of one prompt, broadcast inside; a batch of B prompts would be paired with B images each
            masks = self._masks(embedding, embedding.new_zeros(1, 0, embedding.shape[1]))
        else:
            tokens = box_tokens(self.prompt_encoder, self.boxes.to(embedding.device)).to(embedding.dtype)
            pairs = zip(embedding.split(1), tokens.split(1), strict=True)
            masks = torch.cat([self._masks(one, token) for one, token in pairs])
        size = (self.image_size, self.image_size)
        return masks if masks.shape[-2:] == size else F.interpolate(masks, size, mode="bilinear", align_corners=False)

    def _masks(self, embedding: Tensor, tokens: Tensor) -> Tensor:
        prompt: Any = self.prompt_encoder
        masks, _ = self.mask_decoder.predict_masks(
            image_embeddings=embedding,
            image_pe=prompt.get_dense_pe(),
            sparse_prompt_embeddings=tokens,
            dense_prompt_embeddings=prompt.no_mask_embed.weight.view(1, -1, 1, 1),
        )
        return masks

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        return self.head(self.trunk(images))

    def __prepare_scriptable__(self) -> Scriptable:
        """What `torch.jit.script` takes in place of the network."""
        return Scriptable(self)

    def expert_layers(self) -> dict[str, LMoE]:
        """The mixtures by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LMoE)}

    def set_experts(self, on: bool) -> None:
        """Turn all experts on (personal model) or off (global model)."""
        for layer in self.expert_layers().values():
            layer.enabled = on

    @contextmanager
    def prompted(self, boxes: Tensor | None) -> Iterator[None]:
        """Boxes for the next batches, see `pfedsam.networks.prompts.box_tokens`; None for no prompt."""
        before, self.boxes = self.boxes, boxes
        try:
            yield
        finally:
            self.boxes = before

    @contextmanager
    def experts(self, on: bool) -> Iterator[None]:
        """The experts on or off inside a `with` block; their state is restored after it."""
        before = {layer: layer.enabled for layer in self.expert_layers().values()}
        self.set_experts(on)
        try:
            yield
        finally:
            for layer, enabled in before.items():
                layer.enabled = enabled

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Passes inside are no second look at the site's images: their gates do not count in the experts' usage."""
        layers = list(self.expert_layers().values())
        for layer in layers:
            layer.counted = False
        try:
            yield
        finally:
            for layer in layers:
                layer.counted = True

    def _steps(self) -> list[Any]:
        return self.image_encoder.steps()  # type: ignore[operator]

    def balance_loss(self) -> Tensor | None:
        """Mean load-balance loss of the experts in the last forward pass in training; None if all experts count."""
        layers = [layer for layer in self.expert_layers().values() if layer.enabled]
        losses = [layer.balance for layer in layers if layer.balance is not None]
        return torch.stack(losses).mean() if losses else None

    def _split(self) -> int:
        """Index of the first step that is not frozen."""
        if not self.frozen_trunk:
            return 0
        blocks = self.image_encoder.adaptable_blocks()  # type: ignore[operator]
        steps = self._steps()
        if self.first_adapted < len(blocks):
            return steps.index(blocks[self.first_adapted])
        return len(steps) - 1 if self.neck_is_adapted else len(steps)


def select_mask_tokens(decoder: MaskDecoder, classes: int) -> MaskDecoder:
    """Give the decoder one mask token and hypernetwork for each class, starting from SAM's own, repeated if need be."""
    source = [i % decoder.num_mask_tokens for i in range(classes)]
    tokens = nn.Embedding(classes, decoder.transformer_dim, device=decoder.mask_tokens.weight.device)
    tokens.weight.data.copy_(decoder.mask_tokens.weight.data[source])
    decoder.mask_tokens = tokens
    decoder.output_hypernetworks_mlps = nn.ModuleList(
        copy.deepcopy(decoder.output_hypernetworks_mlps[i]) for i in source
    )
    decoder.num_mask_tokens = classes
    return decoder
