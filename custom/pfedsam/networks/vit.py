"""SAM's own image encoder (ViT-B, L, H) from segment-anything, at any side that is a multiple of 16 pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Block, get_rel_pos
from torch import Tensor, nn

from pfedsam.networks.arithmetic import uses
from pfedsam.networks.attention import attend, over_windows

_REL_POS = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.rel_pos_[hw]")
_POS_EMBED = "image_encoder.pos_embed"


class UnpaddedBlock(Block):
    """segment-anything's block without the tokens that pad its windows; its tensors keep their names.

    SAM pads the map with zeros to whole windows: at 256 pixels 256 tokens become 784. All padded keys of a window have
    the same vector, the bias of the projection, and so have their values; only their relative positions differ. As
    those are a sum of one term for the row and one for the column, the exponentiated scores of all padded keys have a
    closed form, and a window has one key for all of them. Padded queries are not computed, as none is read.

    The relative positions are a product of the query with a table, so they are columns beside those of the query, with
    a one in the key at its own row and column: one matrix product gives the whole score.
    """

    def __init__(self, block: Block):
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.window_size = block.window_size

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` to the same shape."""
        if not (uses("unpadded") and self.attn.use_rel_pos):
            return super().forward(x)
        x = x + self._attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attention(self, x: Tensor) -> Tensor:
        qkv, padding = self.attn.qkv(x), self.attn.qkv.bias
        if padding is None:
            padding = qkv.new_zeros(qkv.shape[-1])
        window = self.window_size
        if not window:
            return self.attn.proj(self._windows(qkv, padding, x.shape[1:3]))
        return self.attn.proj(over_windows(qkv, window, lambda part: self._windows(part, padding, (window, window))))

    def _windows(self, qkv: Tensor, padding: Tensor, window: Any) -> Tensor:
        """`(B, H, W, 3 * dim)`, windows that are all whole or all cut alike, to `(B, H, W, dim)`."""
        batch, height, width, channels = qkv.shape
        heads, dim = self.attn.num_heads, channels // (3 * self.attn.num_heads)
        h, w = min(height, window[0]), min(width, window[1])
        rows, columns = height // h, width // w
        parts = qkv.view(batch, rows, h, columns, w, 3, heads, dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = parts.reshape(3, -1, heads, h * w, dim)
        positions = self._positions(q, h, w, window)
        if (h, w) != tuple(window):
            # shape and not len(), which TorchScript's tracing would keep as the number that it was
            _, padded_k, padded_v = padding.to(qkv.dtype).view(3, heads, 1, dim)
            k = torch.cat([k, padded_k.expand(k.shape[0], -1, -1, -1)], 2)
            v = torch.cat([v, padded_v.expand(v.shape[0], -1, -1, -1)], 2)
        q = q * self.attn.scale
        places = _places(h, w, positions.shape[-1], k)
        q = torch.cat([q, positions.to(q.dtype)], -1)
        k = torch.cat([k, places.expand(k.shape[0], heads, -1, -1)], -1)
        out = attend(q, k, v).view(batch, rows, columns, heads, h, w, dim)
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, -1)

    def _positions(self, q: Tensor, h: int, w: int, window: Any) -> Tensor:
        """Scores of the relative positions by row and by column, and of all padding: `(B, heads, N, h + w [+ 1])`."""
        attn, grid = self.attn, q.unflatten(2, (h, w))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, get_rel_pos(window[0], window[0], attn.rel_pos_h)[:h])
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, get_rel_pos(window[1], window[1], attn.rel_pos_w)[:w])
        parts, padded = [by_row[..., :h], by_column[..., :w]], []
        if h < window[0]:
            padded.append(_sum(by_row[..., h:]) + _sum(by_column))
        if w < window[1]:
            padded.append(_sum(by_row[..., :h]) + _sum(by_column[..., w:]))
        if padded:
            parts.append(padded[0] if len(padded) == 1 else torch.logaddexp(*padded))
        return torch.cat(parts, -1).flatten(2, 3)


def _sum(scores: Tensor) -> Tensor:
    """The score of one key in the place of several."""
    return scores.float().logsumexp(-1, keepdim=True)


def _places(h: int, w: int, columns: int, like: Tensor) -> Tensor:
    """Ones in each key at its row, at its column and, in the last key, at all padding: `(N [+ 1], columns)`."""
    where: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    places = torch.cat([torch.eye(h, **where).repeat_interleave(w, 0), torch.eye(w, **where).repeat(h, 1)], 1)
    if columns > h + w:
        places = F.pad(places, (0, 1, 0, 1))
        places[-1, -1] = 1
    return places


class SAMViT(ImageEncoderViT):
    """segment-anything's encoder as a list of steps: `(B, 3, H, W)` to `(B, D, H / 16, W / 16)`."""

    blocks: nn.ModuleList

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.blocks = nn.ModuleList(UnpaddedBlock(block) for block in self.blocks)

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The encoder as a list of functions; `forward` is their composition. A frozen prefix of it can be cached."""
        return [self._embed, *self.blocks, self._neck]

    def adaptable_blocks(self) -> list[nn.Module]:
        """The transformer blocks in order: those that LoRA and experts may adapt."""
        return list(self.blocks)

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return x if self.pos_embed is None else x + self.pos_embed

    def _neck(self, x: Tensor) -> Tensor:
        return self.neck(x.permute(0, 3, 1, 2))


def build_vit(
    image_size: int,
    *,
    width: int,
    depth: int,
    heads: int,
    global_blocks: tuple[int, ...],
    window: int = 14,
    channels: int = 256,
) -> SAMViT:
    """An encoder with SAM's fixed settings, without weights.

    Args:
        image_size: side of the input in pixels.
        width: channels of the tokens.
        depth: number of blocks.
        heads: attention heads of a block.
        global_blocks: indexes of the blocks that attend to the whole image; the others attend inside windows.
        window: side of a window in tokens.
        channels: of the embedding.
    """
    return SAMViT(
        img_size=image_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        out_chans=channels,
        use_rel_pos=True,
        window_size=window,
        global_attn_indexes=global_blocks,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def resize_positions(state: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """SAM's position tables for another image size (published ones are for 1024 pixels: 64 tokens).

    `pos_embed` is interpolated bilinearly, `rel_pos_h` and `rel_pos_w` of the blocks with *global* attention linearly
    (both with `align_corners=False`). Tables of windowed blocks do not depend on the image size and stay as they are:
    one of another shape is an error of the checkpoint, found when it is loaded.

    Args:
        state: of a whole SAM, with the prefix `image_encoder.`.
        encoder: the encoder to load it into; one without such tables leaves the state as it is.

    Returns:
        a new state; other tensors are the same objects.
    """
    resized = dict(state)
    if not isinstance(encoder, SAMViT):
        return resized
    wanted, found = encoder.pos_embed, state.get(_POS_EMBED)
    if wanted is not None and found is not None and found.ndim == 4 and found.shape[1:3] != wanted.shape[1:3]:
        table = F.interpolate(
            found.float().permute(0, 3, 1, 2), tuple(wanted.shape[1:3]), mode="bilinear", align_corners=False
        )
        resized[_POS_EMBED] = table.permute(0, 2, 3, 1).to(found.dtype)
    targets = dict(encoder.named_parameters(prefix="image_encoder"))
    for name, table in state.items():
        match = _REL_POS.fullmatch(name)
        if match is None or int(match[1]) >= len(encoder.blocks) or table.ndim != 2:
            continue
        length = len(targets[name])
        if encoder.blocks[int(match[1])].window_size == 0 and len(table) != length:
            # (L, C) to (1, C, L) and back
            rows = F.interpolate(table.float().T.unsqueeze(0), length, mode="linear", align_corners=False)
            resized[name] = rows[0].T.to(table.dtype)
    return resized
