"""The one door: every tensor has one role, nothing above the ceiling is shared, and a wrong state changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pfedsam.errors import PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import (
    _GROUPS,
    ADDED,
    DECODER_LORA,
    GROUPS,
    MAY_BE_PERSONAL,
    OWN_GROUPS,
    SHAREABLE_GROUPS,
    Roles,
    TensorSpec,
    base_fingerprint,
    base_group,
    check_state,
    group_of,
    load_personal_state,
    load_shared_state,
    manifest,
    partition,
    personal_state,
    set_trainable,
    shared_state,
    tensors,
)
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
ROLES = Roles()


@pytest.fixture(scope="module")
def built() -> SegmentAnything:
    return build_network("vit_test", 32, classes=2)


@pytest.fixture
def network(built) -> SegmentAnything:
    return copy.deepcopy(built)


def error_of(call, *args, **kwargs) -> PFedSAMError:
    with pytest.raises(PFedSAMError) as caught:
        call(*args, **kwargs)
    return caught.value


# groups and roles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit_test", "lite_medsam"])
def test_every_tensor_of_a_network_has_exactly_one_group_and_one_role(backbone):
    with torch.device("meta"):
        network = build_network(backbone, 64, adapted_blocks="all")
    roles = partition(network, ROLES)
    assert set(roles) == set(network.state_dict())
    assert set(roles) >= {name for name, _ in network.named_parameters()}
    parts = [set(manifest(network, ROLES, role)) for role in ("shared", "personal", "frozen")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(roles)
    assert {group_of(name) for name in roles} == set(OWN_GROUPS) - {"personal_copy"} - (
        {"statistics"} if backbone == "vit_test" else set()
    )
    for name in roles:
        # beside the one that decides, only the patterns of its surroundings may fit
        fitting = {group for group, pattern in _GROUPS if pattern.fullmatch(name)}
        assert fitting - {group_of(name)} <= {"encoder"}, name


@pytest.mark.parametrize(
    "name",
    ["", "experts", "lora_a", "image_encoder", "image_encoder.new.weight", "mask_decoder.new.weight", "pixel_mean"],
)
def test_unknown_tensor_name_is_an_error(name):
    assert error_of(group_of, name).code == "E12"
    assert error_of(ROLES.of, name).code == "E12"


def test_new_tensor_in_a_network_can_neither_travel_nor_be_lost_unnoticed(network):
    network.mask_decoder.register_parameter("new", torch.nn.Parameter(torch.zeros(1)))
    for call in (shared_state, personal_state, partition):
        assert error_of(call, network, ROLES).code == "E12"
    assert error_of(base_fingerprint, network, {}).code == "E12"


@pytest.mark.parametrize("group", sorted(set(GROUPS) - SHAREABLE_GROUPS - set(DECODER_LORA)))
def test_group_above_the_ceiling_cannot_be_shared(group):
    error = error_of(Roles, shared=("lora_a", group), personal=())
    assert error.code == "E16" and group in error.message


def test_experts_copies_and_running_statistics_are_above_the_ceiling():
    assert not SHAREABLE_GROUPS & {"experts", "personal_copy", "statistics", "prompt"}


@pytest.mark.parametrize("group", sorted(set(GROUPS) - MAY_BE_PERSONAL - set(DECODER_LORA)))
def test_group_that_is_always_frozen_cannot_be_personal(group):
    assert error_of(Roles, personal=(group,)).code == "E16"


@pytest.mark.parametrize("shared,personal", [(("lora_a",), ("lora_a", "experts")), (("gate",), ()), ((), ("gate",))])
def test_group_in_both_roles_and_unknown_group_are_refused(shared, personal):
    assert error_of(Roles, shared, personal).code == "E16"


def test_roles_from_lists_equal_roles_from_tuples():
    assert Roles(["lora_a"], ["experts"]) == Roles(("lora_a",), ("experts",))  # type: ignore[arg-type]


@pytest.mark.parametrize("shared", [(), ("lora_a",), tuple(sorted(SHAREABLE_GROUPS))], ids=len)
def test_buffer_registered_on_an_expert_layer_is_personal_and_never_shared(network, shared):
    for layer in network.expert_layers().values():
        layer.register_buffer("canary", torch.full((3,), 7.0))
        layer.gate.register_buffer("running_mean", torch.full((3,), 7.0))
    roles = Roles(shared)
    canaries = {name for name in tensors(network) if name.endswith((".canary", ".gate.running_mean"))}
    assert len(canaries) == 4
    assert canaries <= set(personal_state(network, roles))
    assert not canaries & set(shared_state(network, roles))
    assert {roles.of("personal." + name) for name in tensors(network)} == {"frozen"}


# state in and out -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["shared", "personal"])
def door(request):
    """Role, way out, way in, and the code of a state that does not fit."""
    out, into, code = {
        "shared": (shared_state, load_shared_state, "E12"),
        "personal": (personal_state, load_personal_state, "E13"),
    }[request.param]
    return request.param, out, into, code


def test_state_goes_out_and_in_unchanged_and_touches_nothing_else(network, built, door):
    role, out, into, _ = door
    state = {name: torch.randn_like(tensor) for name, tensor in out(network, ROLES).items()}
    assert state.keys() == manifest(network, ROLES, role).keys() and state
    into(network, ROLES, state)
    again = out(network, ROLES)
    assert all(torch.equal(again[name], state[name]) for name in state)
    for name, tensor in tensors(network).items():
        assert name in state or torch.equal(tensor, tensors(built)[name])


def test_state_is_a_copy(network, door):
    _, out, into, _ = door
    state = out(network, ROLES)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    for tensor in tensors(network).values():
        tensor.data.add_(1)
    assert all(torch.equal(state[name], kept[name]) and not state[name].requires_grad for name in state)
    into(network, ROLES, state)
    for tensor in state.values():
        tensor.add_(1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in out(network, ROLES).items())


def test_numpy_arrays_are_taken_like_tensors(network, door):
    _, out, into, _ = door
    state = {name: np.full(tensor.shape, 0.5, np.float32) for name, tensor in out(network, ROLES).items()}
    into(network, ROLES, state)
    assert all((tensor == 0.5).all() for tensor in out(network, ROLES).values())


def wrong(state: dict, how: str) -> dict:
    # the last one, so that a load that checks as it goes would have changed the others
    name = list(state)[-1]
    value = state[name] + 1
    changed = {other: tensor + 1 for other, tensor in state.items()}
    if how == "missing":
        return {other: tensor for other, tensor in changed.items() if other != name}
    replaced = {
        "extra": value,
        "shape": value.unsqueeze(0),
        "float64": value.double(),
        "float16": value.half(),
        "integers": value.int(),
        "NaN": torch.full_like(value, torch.nan),
        "infinity": torch.where(torch.arange(value.numel()).view(value.shape) == 0, -torch.inf, value),
        "list": value.tolist(),
        "none": None,
        "big endian": value.numpy().astype(">f4"),
        "objects": np.full(value.shape, None, dtype=object),
    }[how]
    return {**changed, "image_encoder.neck.9.weight" if how == "extra" else name: replaced}


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "extra",
        "shape",
        "float64",
        "float16",
        "integers",
        "NaN",
        "infinity",
        "list",
        "none",
        "big endian",
        "objects",
    ],
)
def test_state_that_does_not_fit_is_refused_and_the_network_is_unchanged(network, door, how):
    _, out, into, code = door
    before = {name: tensor.detach().clone() for name, tensor in tensors(network).items()}
    error = error_of(into, network, ROLES, wrong(out(network, ROLES), how))
    assert error.code == code and error.remedy
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(network).items())


def test_personal_tensor_in_a_shared_state_is_refused(network):
    state = {**shared_state(network, ROLES), **personal_state(network, ROLES)}
    assert error_of(load_shared_state, network, ROLES, state).code == "E12"


def test_error_names_the_first_differences_only(network):
    error = error_of(check_state, {}, manifest(network, ROLES, "shared"), code="E12", what="state")
    assert "more" in error.message and len(error.message) < 400


def test_size_of_a_manifest_is_counted_in_bytes():
    assert TensorSpec((2, 3), "float32").bytes == 24
    assert TensorSpec((), "int64").bytes == 8
    assert TensorSpec((5,), "bfloat16").bytes == 10


# what trains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [("shared",), ("personal",), ("shared", "personal"), (), ("frozen",)], ids=str)
def test_exactly_the_parameters_of_the_roles_are_trainable(network, trained):
    chosen = set_trainable(network, ROLES, trained)
    wanted = set(trained) - {"frozen"}
    expected = [p for name, p in network.named_parameters() if ROLES.of(name) in wanted]
    assert [id(p) for p in chosen] == [id(p) for p in expected]
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (ROLES.of(name) in wanted), name


def test_default_roles_share_lora_and_the_decoder_subset_and_keep_the_experts(network):
    def groups(role):
        return {group_of(name) for name in manifest(network, ROLES, role)}

    assert groups("shared") == {"lora_a", "lora_b", "decoder_subset"}
    assert groups("personal") == {"experts"}
    assert not groups("frozen") & (groups("shared") | groups("personal"))


# fingerprint ----------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_every_base_tensor_and_with_no_adapter(network):
    expected = base_fingerprint(network, {"a": 1})
    for name, tensor in tensors(network).items():
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        assert (base_fingerprint(network, {"a": 1}) == expected) == (group_of(name) in ADDED), name
        with torch.no_grad():
            tensor.copy_(kept)
    assert base_fingerprint(network, {"a": 1}) == expected


def test_fingerprint_changes_with_a_setting_and_not_with_their_order(network):
    expected = base_fingerprint(network, {"a": 1, "b": 2})
    assert base_fingerprint(network, {"b": 2, "a": 1}) == expected
    assert base_fingerprint(network, {"a": 1, "b": 3}) != expected
    assert base_fingerprint(network, {"a": 1}) != expected


def test_fingerprint_tells_networks_of_other_settings_or_weights_apart():
    def fingerprint(image_size=32, **settings):
        return build_network("vit_test", image_size, **settings).base_fingerprint

    expected = fingerprint()
    assert fingerprint() == expected and len(expected) == 64
    others = [{"seed": 1}, {"classes": 2}, {"image_size": 64}, {"lora_rank": 2}, {"gate": "token"}, {"experts": 2}]
    found = [fingerprint(**other) for other in others]
    assert len({expected, *found}) == len(others) + 1


def test_fingerprint_is_the_same_whether_a_default_is_written_out_or_not():
    one = build_network("vit_test", 32)
    same = build_network("vit_test", 32, adapted_blocks=2, lora_rank=4, gate="image")
    auto = build_network("vit_test", 32, adapted_blocks="auto")
    assert one.base_fingerprint == same.base_fingerprint == auto.base_fingerprint


def test_lora_of_the_decoder_has_a_role_of_its_own_where_a_strategy_names_it_and_else_that_of_all_lora():
    network = build_network("vit_test", 32, decoder_rank=2)
    split = Roles(shared=("lora_b", "decoder_lora_a"), personal=("lora_a", "decoder_lora_b"))
    whole = Roles(shared=("lora_a",), personal=("lora_b",))
    lora = [name for name in tensors(network) if group_of(name) in ("lora_a", "lora_b")]
    decoder = [name for name in lora if name.startswith("mask_decoder.")]
    assert decoder and len(decoder) < len(lora)
    for name in lora:
        is_a = name.endswith("lora_a")
        assert split.of(name) == ("shared" if is_a == (name in decoder) else "personal")
        assert whole.of(name) == ("shared" if is_a else "personal")
        assert base_group(split.group(name)) == whole.group(name) == group_of(name)
    manifests = [set(manifest(network, split, role)) for role in ("shared", "personal")]
    assert not manifests[0] & manifests[1] and manifests[0] | manifests[1] >= set(lora)


@pytest.mark.parametrize("group", sorted(DECODER_LORA))
def test_a_part_of_lora_is_under_the_ceiling_of_lora_and_no_group_that_a_site_or_a_rate_can_name(group):
    assert Roles(shared=(group,), personal=()).shared == (group,)
    assert group not in SHAREABLE_GROUPS and group not in MAY_BE_PERSONAL
    assert error_of(Roles, shared=(group,), personal=(group,)).code == "E16"
    phase = {"name": "train", "trains": ["shared"], "experts": False, "rates": {group: 2}}
    assert error_of(Strategy.of, {"personal": [], "phases": [phase]}).code == "E16"
