"""SAM's ViT: the published sizes, the same outputs as segment-anything, and correct position tables at any size."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry

from pfedsam.errors import PFedSAMError
from pfedsam.networks.backbones import BACKBONES, build_parts
from pfedsam.networks.loading import load_base
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.networks.vit import build_vit, resize_positions
from pfedsam.parameters import Roles, group_of, manifest, tensors

VITS = {
    "vit_b": {"depth": 12, "heads": 12, "width": 768, "global": {2, 5, 8, 11}},
    "vit_l": {"depth": 24, "heads": 16, "width": 1024, "global": {5, 11, 17, 23}},
    "vit_h": {"depth": 32, "heads": 16, "width": 1280, "global": {7, 15, 23, 31}},
}
#: Parameters of the published encoders (segment-anything's own classes give the same).
ENCODER = {"vit_b": 89_670_912, "vit_l": 308_278_272, "vit_h": 637_026_048}


def linear(table: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Linear interpolation along an axis where samples are centres of cells (no aligned corners)."""
    old = table.shape[axis]
    position = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, old - 1)
    weight = (position - low).reshape([-1 if i == axis else 1 for i in range(table.ndim)])
    return np.take(table, low, axis) * (1 - weight) + np.take(table, high, axis) * weight


@pytest.fixture(scope="module")
def random_vit_b() -> dict[str, torch.Tensor]:
    """A whole SAM ViT-B at 1024 px with random values in every tensor, position tables too."""
    sam = sam_model_registry["vit_b"]()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator) * 0.02 for name, t in sam.state_dict().items()}
    for name, tensor in state.items():
        if name.endswith(("norm1.weight", "norm2.weight", "neck.1.weight", "neck.3.weight")):
            tensor.add_(1)  # so that outputs are of the order of 1
    return {name: t for name, t in state.items() if not name.startswith("pixel_")}


@pytest.mark.parametrize("name", VITS)
def test_published_numbers_of_parameters(name):
    with torch.device("meta"):
        network = SegmentAnything(name, 1024, 4)

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(network.image_encoder) == ENCODER[name]
    assert (count(network.prompt_encoder), count(network.mask_decoder)) == (6_220, 4_058_340)
    if name == "vit_b":
        assert count(network) == 93_735_472


def test_rank_4_on_q_and_v_of_vit_b_has_147456_parameters_and_a_payload_under_3_2_megabytes():
    with torch.device("meta"):
        network = build_network("vit_b", 1024, adapted_blocks="all")
        default = build_network("vit_b", 1024)
    lora = [t.numel() for name, t in tensors(network).items() if group_of(name) in ("lora_a", "lora_b")]
    assert sum(lora) == 147_456
    for one in (network, default):
        assert sum(spec.bytes for spec in manifest(one, Roles(), "shared").values()) <= 3.2e6


@pytest.mark.parametrize("name", VITS)
def test_registry_has_the_published_architecture(name):
    with torch.device("meta"):
        ours, theirs = build_parts(name, 1024), sam_model_registry[name]()
    for part, module in ours.items():
        expected = {key: tuple(t.shape) for key, t in theirs.get_submodule(part).state_dict().items()}
        assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == expected
    windows = [block.window_size for block in ours["image_encoder"].blocks]
    assert {i for i, window in enumerate(windows) if window == 0} == VITS[name]["global"]
    assert {window for window in windows if window} == {14}


@torch.no_grad()
@pytest.mark.slow
def test_outputs_with_random_weights_equal_segment_anything_at_1024_pixels(random_vit_b):
    torch.set_num_threads(os.cpu_count() or 1)  # 370 billion multiplications, twice
    theirs = sam_model_registry["vit_b"]().eval()
    theirs.load_state_dict({**theirs.state_dict(), **random_vit_b})
    ours = SegmentAnything("vit_b", 1024, 4).eval()
    ours.first_adapted = 12
    load_base(ours, random_vit_b, "random")
    image = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    embedding = ours.trunk(image)
    expected = theirs.image_encoder((image * 255 - theirs.pixel_mean) / theirs.pixel_std)
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5
    masks, _ = theirs.mask_decoder.predict_masks(
        image_embeddings=expected,
        image_pe=theirs.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=torch.zeros(1, 0, 256),
        dense_prompt_embeddings=theirs.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, 64, 64),
    )
    expected_logits = torch.nn.functional.interpolate(masks, (1024, 1024), mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours.decode(expected), expected_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [224, 256, 448])
@pytest.mark.parametrize("name", VITS)
def test_position_tables_equal_a_direct_interpolation(name, side):
    width, head = VITS[name]["width"], VITS[name]["width"] // VITS[name]["heads"]
    with torch.device("meta"):
        encoder = BACKBONES[name].encoder(side)
    generator = torch.Generator().manual_seed(side)
    state = {"image_encoder.pos_embed": torch.randn(1, 64, 64, width, generator=generator)}
    for i in range(VITS[name]["depth"]):
        for axis in "hw":
            length = 127 if i in VITS[name]["global"] else 27
            state[f"image_encoder.blocks.{i}.attn.rel_pos_{axis}"] = torch.randn(length, head, generator=generator)
    resized = resize_positions(state, encoder)
    grid = side // 16
    table = linear(linear(state["image_encoder.pos_embed"].double().numpy(), 1, grid), 2, grid)
    np.testing.assert_allclose(resized["image_encoder.pos_embed"].numpy(), table, rtol=0, atol=1e-4)
    for key, tensor in state.items():
        found = re.search(r"blocks\.(\d+)\.", key)
        if found is None:
            continue
        if int(found[1]) in VITS[name]["global"]:
            expected = linear(tensor.double().numpy(), 0, 2 * grid - 1)
            np.testing.assert_allclose(resized[key].numpy(), expected, rtol=0, atol=1e-4)
        else:
            assert resized[key] is tensor
    shapes = {key: tuple(t.shape) for key, t in encoder.named_parameters(prefix="image_encoder") if key in state}
    assert shapes == {key: tuple(t.shape) for key, t in resized.items()}


@torch.no_grad()
def test_a_checkpoint_of_another_size_loads_and_the_same_size_loads_unchanged(random_vit_b):
    network = SegmentAnything("vit_b", 224, 1).eval()
    load_base(network, random_vit_b, "random")
    loaded = tensors(network)
    for name, tensor in random_vit_b.items():
        if name in loaded and loaded[name].shape == tensor.shape and "mask_tokens" not in name:
            assert torch.equal(loaded[name], tensor), name
    assert loaded["image_encoder.pos_embed"].shape == (1, 14, 14, 768)
    assert torch.isfinite(network(torch.rand(1, 3, 224, 224))).all()


def test_table_of_a_windowed_block_with_a_wrong_length_is_refused(random_vit_b):
    state = dict(random_vit_b)
    state["image_encoder.blocks.0.attn.rel_pos_h"] = torch.zeros(127, 64)
    with pytest.raises(PFedSAMError, match=r"E10.*blocks\.0\.attn\.rel_pos_h.*shape"):
        load_base(SegmentAnything("vit_b", 224, 1), state, "random")


def test_size_that_is_no_multiple_of_16_is_refused():
    with pytest.raises(PFedSAMError, match=r"E16.*230"):
        build_network("vit_b", 230)


def test_an_encoder_without_tables_leaves_a_state_as_it_is():
    state = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 8)}
    assert resize_positions(state, torch.nn.Identity()) == state


def test_steps_composed_equal_forward():
    encoder = build_vit(64, width=32, depth=2, heads=2, global_blocks=(1,), window=2, channels=8).eval()
    x = torch.rand(2, 3, 64, 64)
    y = x
    for step in encoder.steps():
        y = step(y)
    assert torch.equal(y, encoder(x))
