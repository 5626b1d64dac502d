"""Window attention: one key for all the padding means what the padding itself means, in values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pfedsam.networks.tiny_vit import Attention


def padded_attention(layer: Attention, x: Tensor) -> Tensor:
    """The same layer with zeros around the map, every window whole."""
    w, (batch, height, width, dim) = layer.window, x.shape
    x = F.pad(x, (0, 0, 0, -width % w, 0, -height % w))
    rows, columns = x.shape[1] // w, x.shape[2] // w
    x = x.view(batch, rows, w, columns, w, dim).transpose(2, 3).reshape(-1, w * w, dim)
    qkv = layer.qkv(layer.norm(x)).view(len(x), w * w, layer.num_heads, 3, layer.head_dim)
    q, k, v = qkv.permute(3, 0, 2, 1, 4)
    attention = q @ k.transpose(-2, -1) / layer.head_dim**0.5 + layer.attention_biases[:, layer.bias_index]
    x = layer.proj((attention.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
    x = x.view(batch, rows, columns, w, w, dim).transpose(2, 3).reshape(batch, rows * w, columns * w, dim)
    return x[:, :height, :width]


@pytest.mark.parametrize("side", [(3, 3), (6, 9), (2, 2), (4, 3), (3, 5), (7, 8), (1, 1)])
def test_attention_equals_that_of_the_padded_map(side):
    generator = torch.Generator().manual_seed(0)
    layer = Attention(dim=8, heads=2, window=3).double()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    results = []
    for call in (layer, lambda x: padded_attention(layer, x)):
        x = torch.randn(
            2, *side, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True
        )
        y = call(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        results.append([y, *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert results[0][-1].abs().max() > 0
