"""TorchScript of the network, asked for as MONAI and others ask for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network


@pytest.fixture
def network() -> SegmentAnything:
    """Small, and with experts and low-rank updates that change the output."""
    network = build_network("vit_test", image_size=64, classes=2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "experts" in name or "lora_b" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return network


def images(number: int) -> torch.Tensor:
    return torch.rand(number, 3, 64, 64, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("experts", [True, False], ids=["personal", "global"])
@torch.no_grad()
def test_the_script_gives_the_networks_logits_for_any_batch(
    experts: bool, network: SegmentAnything, tmp_path: Path
) -> None:
    network.set_experts(experts)
    torch.jit.script(network).save(str(tmp_path / "model.ts"))
    loaded = torch.jit.load(str(tmp_path / "model.ts"))
    for number in (1, 2, 5):
        torch.testing.assert_close(loaded(images(number)), network(images(number)), rtol=0, atol=1e-4)
    network.set_experts(not experts)
    assert not torch.allclose(loaded(images(1)), network(images(1)), atol=1e-3), "the script kept what was set"


def test_scripting_leaves_the_network_as_it_was(network: SegmentAnything) -> None:
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.jit.script(network)
    assert network.training
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    network(images(2)).sum().backward()
    assert any(parameter.grad is not None for parameter in network.parameters())
