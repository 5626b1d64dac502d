"""Every shortcut gives the outputs and the gradients of the plain way, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedsam.errors import PFedSAMError
from pfedsam.networks import arithmetic
from pfedsam.networks.adaptation import adapt
from pfedsam.networks.arithmetic import SHORTCUTS, uses, without
from pfedsam.networks.backbones import get_backbone
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.vit import build_vit
from pfedsam.parameters import Roles, set_trainable

#: Relative to the largest value: rounding of float32.
CLOSE = 2e-5


def network(backbone: str, side: int, blocks: int | str = 2, **adaptation: Any) -> SegmentAnything:
    """A network in which nothing is zero, nor a norm a no-op."""
    torch.manual_seed(0)
    built = SegmentAnything(backbone, side, 1)
    places = {"adapted_blocks": blocks, "lora_rank": 4, "lora_places": ("qv", "projection", "mlp"), "decoder_rank": 2}
    adapt(built, get_backbone(backbone).layout, **{**places, **adaptation})
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.weight.data.uniform_(0.5, 2)
            module.bias.data.normal_(std=0.3)
    for parameter in built.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.05)
    return built.train()


def results(built: SegmentAnything, side: int, batch: int = 2) -> dict[str, Tensor]:
    """Logits, and the gradient of all that is trained and of the features."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, side, side, generator=generator)
    built.zero_grad(set_to_none=True)
    features = built.trunk(images).requires_grad_()
    logits = built.head(features)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients = {name: one.grad for name, one in built.named_parameters() if one.grad is not None}
    assert features.grad is not None
    return {"logits": logits.detach(), "features": features.grad, **{k: v.clone() for k, v in gradients.items()}}


def require_equal(first: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(first) == set(other)
    scale = max(float(value.abs().max()) for name, value in other.items() if name not in ("logits", "features"))
    for name, value in other.items():
        largest = max(float(value.abs().max()), 1e-3 * scale)
        assert float((first[name] - value).abs().max()) <= CLOSE * largest, name


TRAINED: dict[str, Callable[[SegmentAnything], None]] = {
    "shared": lambda built: set_trainable(built, Roles(), {"shared"}),
    "personal": lambda built: set_trainable(built, Roles(), {"personal"}),
    "everything": lambda built: [one.requires_grad_() for one in built.parameters()] and None,
}


@pytest.mark.parametrize("off", [*[(name,) for name in SHORTCUTS], SHORTCUTS], ids="+".join)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(("backbone", "side"), [("vit_test", 96), ("lite_medsam", 64)])
def test_outputs_and_gradients_are_those_of_the_plain_way(
    backbone: str, side: int, trained: str, off: tuple[str, ...]
) -> None:
    built = network(backbone, side, 3)
    TRAINED[trained](built)
    if trained == "everything":
        built.frozen_trunk = False
    fast = results(built, side)
    with without(*off):
        require_equal(fast, results(built, side))


@pytest.mark.parametrize("tokens", [(3, 3), (14, 14), (16, 16), (28, 28), (17, 31), (5, 20), (20, 5)], ids=str)
def test_windows_without_padding_at_every_kind_of_edge(tokens: tuple[int, int]) -> None:
    """Whole windows, cut ones on one side or both, a map smaller than a window; with every gradient."""
    torch.manual_seed(0)
    encoder = build_vit(16 * 28, width=32, depth=2, heads=4, global_blocks=(), channels=8)
    block: Any = encoder.blocks[1]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, *tokens, 32)
    weights = torch.randn(2, *tokens, 32)

    def run() -> dict[str, Tensor]:
        block.zero_grad()
        given = x.clone().requires_grad_()
        out = block(given)
        (out * weights).sum().backward()
        gradients = {name: one.grad.clone() for name, one in block.named_parameters()}
        assert given.grad is not None
        return {"logits": out.detach(), "features": given.grad, **gradients}

    fast = run()
    with without("unpadded"):
        require_equal(fast, run())


@pytest.mark.parametrize("tokens", [4, 400])
def test_low_rank_updates_in_the_weight_and_beside_it(tokens: int) -> None:
    from pfedsam.networks.lora import low_rank

    torch.manual_seed(0)
    parts = [
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((tokens, 24), (40, 24), (40,), (3, 24), (40, 3))
    ]
    assert torch.autograd.gradcheck(lambda *given: low_rank(*given).mean(0), parts, fast_mode=True)


def test_no_gradient_is_computed_for_what_is_frozen() -> None:
    from pfedsam.networks.lora import LoRA

    layer = LoRA(nn.Linear(8, 8), 2)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    layer(torch.randn(50, 8)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert layer.lora_b.grad is not None and bool(layer.lora_b.grad.any())


@pytest.mark.parametrize(("backbone", "side"), [("vit_test", 96), ("lite_medsam", 128)])
def test_without_gradients_the_result_is_the_same(backbone: str, side: int) -> None:
    built = network(backbone, side).eval()
    images = torch.rand(3, 3, side, side)
    with torch.no_grad():
        fast = built(images)
        for name in SHORTCUTS:
            with without(name):
                assert torch.allclose(fast, built(images), atol=CLOSE * float(fast.abs().max())), name


def test_reduced_precision_stays_close() -> None:
    built = network("vit_test", 96).eval()
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        exact = built(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reduced = built(images).float()
            with without(*SHORTCUTS):
                plain = built(images).float()
    scale = exact.abs().max()
    assert (reduced - exact).abs().max() < 2 * (plain - exact).abs().max() + 0.01 * scale


def test_a_shortcut_is_off_inside_only() -> None:
    with without("unpadded"):
        assert not uses("unpadded") and uses("sdpa")
        with without("sdpa"):
            assert not uses("unpadded") and not uses("sdpa")
        assert uses("sdpa")
    assert all(uses(name) for name in SHORTCUTS)
    with pytest.raises(PFedSAMError, match=r"E16.*unpaded.*unpadded"), without("unpaded"):
        pass


def test_the_page_names_each() -> None:
    assert all(f"`{name}`" in (arithmetic.__doc__ or "") for name in SHORTCUTS)
