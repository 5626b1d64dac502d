"""Softmax attention, by torch's fused kernels or by matrix products, whichever serves better."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsam.networks.arithmetic import uses

#: From so many queries on, the fused kernel is taken on a CPU for training, too: it keeps no map of attention.
LONG = 512


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`softmax(q k^T + bias) v`; what scales the product is in `q` already.

    Args:
        q, k: `(B, heads, N, E)` and `(B, heads, M, E)`.
        v: `(B, heads, M, D)`.
        bias: broadcast to `(B, heads, N, M)`, or None.

    Returns:
        `(B, heads, N, D)`.
    """
    if not _fused(q, bias):
        scores = q @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    wide = q.shape[-1] - v.shape[-1]
    # the CPU's kernel wants values as wide as keys
    values = F.pad(v, (0, wide)) if wide and q.device.type == "cpu" else v
    out = F.scaled_dot_product_attention(q, k, values, attn_mask=None if bias is None else bias[None], scale=1.0)
    return out[..., : v.shape[-1]]


def over_windows(tokens: Tensor, window: int, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Whole windows, and those that the map's edges cut, each kind at once.

    Args:
        tokens: `(B, H, W, channels)`.
        window: side of a window in tokens.
        run: from windows that are all whole or all cut alike, side by side as on the map, to a map of the same sides.

    Returns:
        the results, put together: `(B, H, W, ...)`.
    """
    tall, wide = ((side - side % window, side % window) for side in tokens.shape[1:3])
    rows = [row for row in tokens.split(tall, 1) if row.shape[1]]
    parts = [[part for part in row.split(wide, 2) if part.shape[2]] for row in rows]
    return torch.cat([torch.cat([run(part) for part in row], 2) for row in parts], 1)


def _fused(q: Tensor, bias: Tensor | None) -> bool:
    # an exporter writes plain products, which every runtime has
    if not uses("sdpa") or torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    learned = bias is not None and bias.requires_grad
    if q.device.type != "cpu":
        return not learned
    trains = torch.is_grad_enabled() and q.requires_grad
    return (q.shape[-2] >= LONG and not learned) or (not trains and bias is not None)
