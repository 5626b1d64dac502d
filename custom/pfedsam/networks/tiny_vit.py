"""TinyViT image encoder of LiteMedSAM, written to the state-dict names of its published weights.

The architecture is TinyViT (Wu et al., ECCV 2022, arXiv 2207.10666) as LiteMedSAM changed it: the patch embedding is
two 1x1 convolutions at full resolution, and the last merging keeps the resolution: 256 px give 64 x 64 tokens.
Any side that is a multiple of 4 works with the same weights. Between the attention blocks the tokens are
`(B, H, W, C)`, as in segment-anything's ViT.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from pfedsam.networks.arithmetic import uses
from pfedsam.networks.attention import attend, over_windows

#: Bytes of hidden maps that a CPU's cache may hold.
CACHED = 2 * 1024**2


class ConvBN(nn.Sequential):
    """Convolution without bias, then batch norm: `(B, H, W, inputs)` to `(B, H / stride, W / stride, outputs)`.

    The statistics never move (`SegmentAnything.train`), so while it is not trained the norm is a factor and a shift of
    the convolution's channels: it costs nothing, forward or backward.
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, pad: int = 0, groups: int = 1):
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to tokens; a 1x1 convolution is a matrix product of them."""
        if not uses("folded_norm") or self.bn.training:
            maps: Tensor = self.bn(self.c(x.permute(0, 3, 1, 2)))
            return maps.permute(0, 2, 3, 1)
        if self.c.kernel_size == (1, 1):
            weight, bias = self._folded()
            return F.linear(x, weight.flatten(1), bias)
        return self.convolved(x, self.c.padding)

    def convolved(self, x: Tensor, padding: Any) -> Tensor:
        """The convolution with another padding than its own, and the norm."""
        weight, bias = self._folded()
        maps = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, self.c.stride, padding, groups=self.c.groups)
        return maps.permute(0, 2, 3, 1)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """In every call anew: weights that are loaded or trained later count."""
        norm = self.bn
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.c.weight * factor.view(-1, 1, 1, 1), norm.bias - norm.running_mean * factor


class PatchEmbed(nn.Module):
    """`(B, 3, H, W)` to `(B, H, W, dim)` by two 1x1 convolutions."""

    def __init__(self, dim: int):
        super().__init__()
        self.seq = nn.Sequential(ConvBN(3, dim // 2), nn.GELU(), ConvBN(dim // 2, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Embed every pixel."""
        return self.seq(x.permute(0, 2, 3, 1).contiguous())


class MBConv(nn.Module):
    """Inverted bottleneck with a residual: expand, depthwise 3x3, project."""

    def __init__(self, dim: int, expand: int = 4):
        super().__init__()
        hidden = dim * expand
        self.conv1, self.act1 = ConvBN(dim, hidden), nn.GELU()
        self.conv2, self.act2 = ConvBN(hidden, hidden, 3, 1, 1, groups=hidden), nn.GELU()
        self.conv3, self.act3 = ConvBN(hidden, dim), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` to the same shape."""
        if not self._fits_better(x):
            return self.act3(x + self.conv3(self.act2(self.conv2(self.act1(self.conv1(x))))))
        height, width = x.shape[1:3]
        rows = max(4, CACHED // (width * self.conv1.c.out_channels * x.element_size()))
        groups = [(start, min(start + rows, height)) for start in range(0, height, rows)]
        return torch.cat([torch.cat([self._rows(image, *group) for group in groups], 1) for image in x.split(1)])

    def _fits_better(self, x: Tensor) -> bool:
        """Whether to go by groups of rows: the hidden maps are four times the map, too large for a CPU's cache."""
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        trains = torch.is_grad_enabled() and (x.requires_grad or self.conv1.c.weight.requires_grad)
        off = not uses("row_groups") or not uses("folded_norm") or self.conv1.bn.training
        return not (off or trains or traced or x.device.type != "cpu")

    def _rows(self, image: Tensor, start: int, end: int) -> Tensor:
        """The result in some rows: the 3x3 convolution reads one row more on each side, of zeros at the map's edge."""
        first, last = max(start - 1, 0), min(end + 1, image.shape[1])
        hidden = self.act1(self.conv1(image[:, first:last]))
        hidden = F.pad(hidden, (0, 0, 0, 0, first - start + 1, end + 1 - last))
        return self.act3(image[:, start:end] + self.conv3(self.act2(self.conv2.convolved(hidden, (0, 1)))))


class PatchMerging(nn.Module):
    """`(B, H, W, dim)` to `(B, H / stride, W / stride, out_dim)`."""

    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        self.act = nn.GELU()
        self.conv1 = ConvBN(dim, out_dim)
        self.conv2 = ConvBN(out_dim, out_dim, 3, stride, 1, groups=out_dim)
        self.conv3 = ConvBN(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Merge neighbouring tokens."""
        return self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))


class ConvStage(nn.Module):
    """First stage, convolutions only: `(B, H, W, dim)` to `(B, H / 2, W / 2, out_dim)`."""

    def __init__(self, dim: int, out_dim: int, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(MBConv(dim) for _ in range(depth))
        self.downsample = PatchMerging(dim, out_dim, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks, then merge."""
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class Attention(nn.Module):
    """Attention inside windows with learned biases by absolute offset.

    The map is padded with zeros to whole windows, as its weights were trained. All padded keys are the same vector, and
    so are their values, so a window has one key for all of them: with the logarithm of the sum of their exponentiated
    biases as its bias, the softmax gives it the weight of them all. Padded queries are not computed, as none is read.

    `qkv` is fused and *interleaved per head*: of the `3 * dim` outputs, each head owns `3 * head_dim` in a row.
    """

    bias_index: Tensor

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.num_heads, self.head_dim, self.window = heads, dim // heads, window
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        points = list(itertools.product(range(window), range(window)))
        offsets: dict[tuple[int, int], int] = {}
        index = [offsets.setdefault((abs(p[0] - q[0]), abs(p[1] - q[1])), len(offsets)) for p in points for q in points]
        self.attention_biases = nn.Parameter(torch.zeros(heads, len(offsets)))
        self.register_buffer("bias_index", torch.tensor(index).view(len(points), len(points)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` to the same shape."""
        qkv, padded = self.qkv(self.norm(x)), self.qkv(self.norm(x.new_zeros(1, 1, 1, x.shape[-1])))
        return self.proj(over_windows(qkv, self.window, lambda part: self._windows(part, padded)))

    def _windows(self, qkv: Tensor, padded: Tensor) -> Tensor:
        """`(B, H, W, 3 * dim)`, windows that are all whole or all cut alike, to `(B, H, W, dim)`."""
        batch, height, width, _ = qkv.shape
        h, w = min(height, self.window), min(width, self.window)
        rows, columns = height // h, width // w
        heads = (self.num_heads, 3, self.head_dim)
        windows = qkv.view(batch, rows, h, columns, w, *heads).permute(6, 0, 1, 3, 5, 2, 4, 7)
        q, k, v = windows.reshape(3, -1, self.num_heads, h * w, self.head_dim)
        bias = self._bias(h, w).to(q.dtype)
        if bias.shape[-1] > h * w:
            # shape and not len(), which TorchScript's tracing would keep as the number that it was
            _, padded_k, padded_v = padded.view(1, *heads).permute(2, 0, 1, 3).unsqueeze(-2)
            k = torch.cat([k, padded_k.expand(k.shape[0], -1, -1, -1)], 2)
            v = torch.cat([v, padded_v.expand(v.shape[0], -1, -1, -1)], 2)
        out = attend(q * self.head_dim**-0.5, k, v, bias).view(
            batch, rows, columns, self.num_heads, h, w, self.head_dim
        )
        return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, -1)

    def _bias(self, height: int, width: int) -> Tensor:
        """Biases of the upper left of a window, `(heads, N, N)`, or `(heads, N, N + 1)` with those of its padding.

        They are gathered in every call, so weights loaded after `eval()` count, and added in the queries' precision:
        under autocast a float32 bias would make the softmax, and all that is kept for its gradient, float32.
        """
        index = self.bias_index.view([self.window] * 4)[:height, :width].flatten(0, 1)
        biases = self.attention_biases[:, index]
        real = biases[..., :height, :width].flatten(-2)
        if height == width == self.window:
            return real
        padding = torch.cat([biases[..., height:, :].flatten(-2), biases[..., :height, width:].flatten(-2)], -1)
        return torch.cat([real, padding.logsumexp(-1, keepdim=True)], -1)


class Mlp(nn.Module):
    """Norm and two linear layers, with room for experts in parallel: `y = MLP(n) + experts(n)`, n normed."""

    def __init__(self, dim: int, expand: int = 4):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, dim * expand), nn.GELU(), nn.Linear(dim * expand, dim)
        self.experts: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` to the same shape."""
        n = self.norm(x)
        y = self.fc2(self.act(self.fc1(n)))
        return y if self.experts is None else y + self.experts(n)


class Block(nn.Module):
    """Window attention, depthwise convolution, MLP."""

    def __init__(self, dim: int, heads: int, window: int):
        super().__init__()
        self.attn = Attention(dim, heads, window)
        self.mlp = Mlp(dim)
        self.local_conv = ConvBN(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, dim)` to the same shape."""
        x = x + self.attn(x)
        x = self.local_conv(x)
        return x + self.mlp(x)


class Stage(nn.Module):
    """Attention blocks, then a merging (none in the last stage)."""

    def __init__(self, dim: int, out_dim: int | None, depth: int, heads: int, window: int, stride: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window) for _ in range(depth))
        self.downsample = None if out_dim is None else PatchMerging(dim, out_dim, stride)


class TinyViT(nn.Module):
    """LiteMedSAM's image encoder: `(B, 3, H, W)` in [0, 1] to `(B, 256, H / 4, W / 4)`."""

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 160, 320),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (2, 4, 5, 10),
        windows: tuple[int, ...] = (7, 7, 14, 7),
        out_channels: int = 256,
    ):
        super().__init__()
        self.patch_embed = PatchEmbed(dims[0])
        self.layers = nn.ModuleList([ConvStage(dims[0], dims[1], depths[0])])
        for i in (1, 2, 3):
            out_dim = dims[i + 1] if i < 3 else None
            self.layers.append(Stage(dims[i], out_dim, depths[i], heads[i], windows[i], stride=2 if i == 1 else 1))
        self.neck = nn.Sequential(
            nn.Conv2d(dims[3], out_channels, 1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )

    def steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The encoder as a list of functions; `forward` is their composition. A frozen prefix of it can be cached."""
        steps: list[Callable[[Tensor], Tensor]] = [self.patch_embed, self.layers[0]]
        stages: list[Any] = list(self.layers)[1:]
        for layer in stages:
            steps.extend(layer.blocks)
            if layer.downsample is not None:
                steps.append(layer.downsample)
        return [*steps, self._neck]

    def adaptable_blocks(self) -> list[nn.Module]:
        """The attention blocks in order: those that LoRA and experts may adapt."""
        return [step for step in self.steps() if isinstance(step, Block)]

    def _neck(self, x: Tensor) -> Tensor:
        return self.neck(x.permute(0, 3, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch of images."""
        for step in self.steps():
            x = step(x)
        return x
