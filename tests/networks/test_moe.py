"""The mixture of experts: its formula, its gates, its gradients and what is told of their use."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pfedsam.networks.moe import LMoE

torch.set_num_threads(1)
DIM, EXPERTS, BOTTLENECK = 6, 3, 2


def mixture(gate="image", scale: float = 0.5, filled: bool = True, top_k: int = 0) -> LMoE:
    layer = LMoE(DIM, EXPERTS, BOTTLENECK, scale, gate, top_k, generator=torch.Generator().manual_seed(0))
    if filled:
        torch.manual_seed(1)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    return layer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2))


def slow(layer: LMoE, n: Tensor) -> Tensor:
    """`s * sum_e g_e(n) * Up_e(GELU(Down_e(n)))`, token by token and expert by expert."""
    result = torch.zeros_like(n)
    for b in range(len(n)):
        image = n[b].reshape(-1, DIM)
        for t, token in enumerate(image):
            gated = image.mean(0) if layer.gate_per == "image" else token
            g = torch.softmax(layer.gate.weight @ gated + layer.gate.bias, 0)
            total = torch.zeros(DIM)
            for e in range(EXPERTS):
                rows = slice(e * BOTTLENECK, (e + 1) * BOTTLENECK)
                hidden = F.gelu(layer.down.weight[rows] @ token + layer.down.bias[rows])
                total = total + g[e] * (layer.up[e].T @ hidden + layer.up_bias[e])
            result[b].view(-1, DIM)[t] = layer.scale * total
    return result


@pytest.mark.parametrize("gate", ["image", "token"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5)], ids=["map", "sequence"])
@torch.no_grad()
def test_layer_equals_its_formula_written_as_loops(gate, shape):
    layer, n = mixture(gate), tokens(*shape)
    assert torch.allclose(layer(n), slow(layer, n), atol=1e-5)


@pytest.mark.parametrize("alpha", [0, 0.25, 1])
@torch.no_grad()
def test_interpolated_layer_gives_that_part_of_its_output(alpha):
    layer, n = mixture(), tokens(2, 3, 4)
    whole, gates = layer(n), layer.gates(n)
    layer.interpolate(alpha)
    assert torch.allclose(layer(n), alpha * whole, atol=1e-6) and layer.gates(n).equal(gates)


@pytest.mark.parametrize("gate", ["image", "token"])
@torch.no_grad()
def test_gates_are_positive_and_sum_to_one(gate):
    gates = mixture(gate).gates(tokens(2, 3, 4))
    assert gates.shape == ((2, 1, 1, EXPERTS) if gate == "image" else (2, 3, 4, EXPERTS))
    assert (gates > 0).all()
    assert torch.allclose(gates.sum(-1), torch.ones(gates.shape[:-1]))


@torch.no_grad()
def test_gate_per_image_is_one_for_all_tokens_and_differs_between_images():
    layer, n = mixture("image"), tokens(2, 3, 4)
    gates = layer.gates(n)
    assert not torch.allclose(gates[0], gates[1])
    # it follows the mean token only: the order of the tokens is no matter
    assert torch.allclose(layer.gates(n.flatten(1, 2).flip(1)).flatten(), gates.flatten(), atol=1e-6)


@torch.no_grad()
def test_image_is_not_gated_by_its_neighbours_in_the_batch():
    layer, n = mixture("image"), tokens(3, 2, 2)
    assert torch.allclose(layer(n)[1:2], layer(n[1:2]), atol=1e-6)


@torch.no_grad()
def test_layer_is_zero_at_the_start_and_when_it_is_off():
    n = tokens(2, 3, 4)
    assert not mixture(filled=False)(n).any()
    layer = mixture()
    assert layer(n).any()
    layer.enabled = False
    off = layer(n)
    assert off.shape == n.shape and not off.any()


def test_gradient_reaches_up_at_once_and_gate_and_down_after_it():
    layer, n = mixture(filled=False), tokens(2, 3, 4)
    layer(n).sum().backward()
    assert layer.up.grad is not None and layer.up.grad.any()
    assert not layer.gate.weight.grad.any() and not layer.down.weight.grad.any()
    torch.nn.init.normal_(layer.up, generator=torch.Generator().manual_seed(0))
    layer.zero_grad()
    layer(n).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("gate", ["image", "token"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gate_learns_from_the_task_however_few_experts_count(gate, top_k):
    layer = mixture(gate, top_k=top_k)
    layer(tokens(2, 3, 4)).square().sum().backward()  # without the balance loss
    assert layer.gate.weight.grad is not None and layer.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("gate", ["image", "token"])
@torch.no_grad()
def test_of_top_1_the_largest_gate_counts_as_it_is(gate):
    sparse, dense, n = mixture(gate, top_k=1), mixture(gate), tokens(2, 3, 4)
    largest, chosen = dense.gates(n).max(-1, keepdim=True)
    assert torch.equal(sparse.gates(n), torch.zeros_like(dense.gates(n)).scatter(-1, chosen, largest))


@pytest.mark.parametrize("gate", ["image", "token"])
@torch.no_grad()
def test_of_top_2_the_two_largest_gates_are_scaled_to_sum_1(gate):
    sparse, dense, n = mixture(gate, top_k=2), mixture(gate), tokens(2, 3, 4)
    gates = dense.gates(n)
    kept = torch.where(gates > gates.min(-1, keepdim=True).values, gates, 0.0)  # all but the least of three
    torch.testing.assert_close(sparse.gates(n), kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(mixture(gate, top_k=EXPERTS).gates(n), gates, rtol=0, atol=0)


@torch.no_grad()
def test_usage_of_top_1_is_how_often_each_expert_was_chosen():
    layer, n = mixture("token", top_k=1).train(), tokens(2, 3, 4)
    layer(n)
    usage, chosen = layer.usage(), layer.gates(n).argmax(-1).flatten()
    expected = (torch.bincount(chosen, minlength=EXPERTS) / len(chosen)).tolist()
    assert [usage[f"share_{e}"] for e in range(EXPERTS)] == pytest.approx(expected, abs=1e-6)
    assert usage["entropy"] == pytest.approx(0, abs=1e-6)


def test_experts_start_different_from_each_other():
    down = mixture(filled=False).down.weight.view(EXPERTS, -1)
    assert not any(torch.allclose(down[0], other) for other in down[1:])


@pytest.mark.parametrize("gate", ["image", "token"])
@torch.no_grad()
def test_usage_tells_mean_shares_and_entropy_of_the_gates(gate):
    layer = mixture(gate).train()
    batches = [tokens(2, 3, 4), 3 * tokens(1, 3, 4)]
    for n in batches:
        layer(n)
    usage = layer.usage()
    # every gate counts the same: one for an image or one for a token
    gates = torch.cat([layer.gates(n).flatten(0, -2) for n in batches])
    shares = [usage[f"share_{e}"] for e in range(EXPERTS)]
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    assert shares == pytest.approx(gates.mean(0).tolist(), abs=1e-6)
    assert usage["entropy"] == pytest.approx(float(-(gates * gates.log()).sum(-1).mean()), abs=1e-5)
    assert 0 <= usage["entropy"] <= math.log(EXPERTS)


@torch.no_grad()
def test_usage_shows_a_dead_expert_and_counts_in_training_only():
    layer = mixture().train()
    layer.gate.weight.zero_()
    layer.gate.bias.copy_(torch.tensor([5.0, 5.0, -50.0]))
    layer(tokens(2, 3, 4))
    assert layer.usage()["share_2"] == pytest.approx(0, abs=1e-9)
    assert layer.usage()["share_0"] == pytest.approx(0.5)
    layer.forget_usage()
    assert layer.usage() == {}
    layer.eval()(tokens(1, 3, 4))
    layer.train().enabled = False
    layer(tokens(1, 3, 4))
    assert layer.usage() == {}
