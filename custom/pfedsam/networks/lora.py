"""Low-rank adaptation (LoRA: Hu et al., arXiv 2106.09685) of a linear layer, and of q and v in a fused projection."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedsam.networks.arithmetic import uses

#: How the rows of a fused projection are laid out: `q | k | v`, or `q k v` again for every head.
Layout = Literal["blocks", "per_head"]


class LoRA(nn.Linear):
    """A linear layer plus a low-rank update: `W x + b + (alpha / rank) * B A x`, a no-op at the start (`B` is zero).

    The layer keeps the names `weight` and `bias` of the layer that it replaces, so checkpoints load unchanged.

    Args:
        linear: the layer; its parameters are taken over, not copied.
        rank: of the update.
        alpha: scale; the update is multiplied by `alpha / rank`.
        generator: for `A`.
    """

    def __init__(
        self, linear: nn.Linear, rank: int = 4, alpha: float | None = None, generator: torch.Generator | None = None
    ):
        # no initialisation of a weight that is replaced in the next line
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = (rank if alpha is None else alpha) / rank
        device = linear.weight.device
        #: `(rank, in)`
        self.lora_a = _kaiming((rank, linear.in_features), device, generator)
        #: `(out, rank)`
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., out)`."""
        return low_rank(x, self.weight, self.bias, *self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        """The update as `B A`: A `(rank, in)` and B `(out, rank)`, scaled."""
        return self.lora_a, self.scale * self.lora_b


class QVLoRA(nn.Linear):
    """A fused qkv projection plus a low-rank update of its q and v rows.

    `W x + b + (alpha / rank) * [B_q A_q x, 0, B_v A_v x]`. `A` is Kaiming (seeded), `B` is zero: a no-op at the start.
    The layer keeps the names `weight` and `bias` of the projection that it replaces, so checkpoints load unchanged.

    Args:
        linear: the projection, `(3 * dim, in)`; its parameters are taken over, not copied.
        heads: number of attention heads.
        layout: layout of the fused rows; segment-anything's ViT has `blocks`, TinyViT has `per_head`.
        rank: of the update.
        alpha: scale; the update is multiplied by `alpha / rank`.
        generator: for `A`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        heads: int,
        layout: Layout,
        rank: int = 4,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ):
        # no initialisation of a weight that is replaced in the next line
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = (rank if alpha is None else alpha) / rank
        self.heads, self.layout = heads, layout
        dim = linear.out_features // 3
        device = linear.weight.device
        #: `(2, rank, in)`: q, v.
        self.lora_a = _kaiming((2, rank, linear.in_features), device, generator)
        #: `(2, dim, rank)`: q, v.
        self.lora_b = nn.Parameter(torch.zeros(2, dim, rank, device=device))

    def fused_b(self) -> Tensor:
        """`B` in the layout of the fused rows, `(3 * dim, 2 * rank)`: zero rows for k."""
        _, dim, rank = self.lora_b.shape
        heads = self.heads if self.layout == "per_head" else 1
        b_q, b_v = self.lora_b.view(2, heads, dim // heads, rank)
        zero = torch.zeros_like(b_q)
        q, k, v = torch.cat([b_q, zero], -1), torch.cat([zero, zero], -1), torch.cat([zero, b_v], -1)
        return torch.stack([q, k, v], dim=1).reshape(3 * dim, 2 * rank)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in)` to `(..., 3 * dim)`."""
        return low_rank(x, self.weight, self.bias, *self.factors())

    def factors(self) -> tuple[Tensor, Tensor]:
        """The update as `B A`: A `(2 * rank, in)` and B `(3 * dim, 2 * rank)`, scaled."""
        return self.lora_a.flatten(0, 1), self.scale * self.fused_b()


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A copy of a network, for use without training: each low-rank update is a part of its weight.

    Outputs are equal up to rounding. The experts stay, as they depend on the image.
    """
    alone = copy.deepcopy(network)
    for name, layer in list(alone.named_modules()):
        if isinstance(layer, (LoRA, QVLoRA)):
            a, b = layer.factors()
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = nn.Parameter(torch.addmm(layer.weight, b, a)), layer.bias
            parent, _, place = name.rpartition(".")
            setattr(alone.get_submodule(parent), place, plain)
    return alone


def low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`(W + B A) x + bias` without the product of `B` and `A`.

    Args:
        x: `(..., in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        a: `(rank, in)`.
        b: `(out, rank)`, scaled.

    Returns:
        `(..., out)`.
    """
    if not uses("fused_lora") or not _fuses(x, weight, a, b):
        return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)
    fused: Tensor = _LowRank.apply(x, weight, bias, a, b)
    return fused


def _fuses(x: Tensor, *others: Tensor) -> bool:
    """Whether the update can be added in place: in one precision, where nothing is traced or only looked at."""
    if x.device.type == "meta" or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled(x.device.type) and all(other.dtype == x.dtype for other in others)


class _LowRank(torch.autograd.Function):
    """One product in each direction: the update is a part of the weight, or is added into the result in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        # the sum passes over the weight four times, adding in place twice over the tokens of input and output
        ctx.merged = 2 * weight.numel() <= len(flat) * sum(weight.shape)
        ctx.shape = x.shape
        if ctx.merged:
            total = torch.addmm(weight, b, a)
            ctx.save_for_backward(flat, total, a, b, None)
            return F.linear(x, total, bias)
        inner = flat @ a.T
        ctx.save_for_backward(flat, weight, a, b, inner)
        out = F.linear(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(inner, b.T)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, inner = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad
        of_inner = grad @ b if needs_a or (needs_x and not ctx.merged) else None
        of_x = grad @ weight if needs_x else None
        if of_x is not None and not ctx.merged:
            of_x.addmm_(of_inner, a)
        if inner is None and needs_b:
            inner = flat @ a.T
        return (
            of_x.view(ctx.shape) if of_x is not None else None,
            grad.T @ flat if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            of_inner.T @ flat if needs_a and of_inner is not None else None,
            (inner.T @ grad).T.contiguous() if needs_b and inner is not None else None,
        )


def _kaiming(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> nn.Parameter:
    """Uniform values as torch's own linear layers get them (`kaiming_uniform_` with a = sqrt 5), by fan-in."""
    a = torch.empty(shape, device=device)
    if device.type != "meta":
        a = ((torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])).to(device)
    return nn.Parameter(a)
