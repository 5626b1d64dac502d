"""A site's model file: both parts and their settings come back, and nothing else is ever taken for a model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pfedsam.errors import PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, tensors
from pfedsam.storage import site_model
from pfedsam.storage.site_model import SiteModel, read, write

torch.set_num_threads(1)
ROLES = Roles(("lora_b", "decoder_subset"), ("experts", "lora_a"))


@pytest.fixture(scope="module")
def network() -> SegmentAnything:
    """A network with random adapters. Tests leave it as it is."""
    network = build_network("vit_test", 32)
    with torch.no_grad():
        for tensor in tensors(network).values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)), alpha=0.01)
    return network


@pytest.fixture(scope="module")
def other() -> SegmentAnything:
    """The same base with adapters as they start."""
    return build_network("vit_test", 32)


@pytest.fixture
def model(network) -> SiteModel:
    model = SiteModel.of(network, ROLES, round=3, note="é")
    model.moments = {"a.experts.up#exp_avg": torch.randn(2, 3), "a.experts.up#step": torch.tensor(4.0)}
    return model


@pytest.fixture
def path(tmp_path, model) -> Path:
    write(tmp_path / "site" / "state.safetensors", model)
    return tmp_path / "site" / "state.safetensors"


def code_of(call, *args) -> str:
    with pytest.raises(PFedSAMError) as caught:
        call(*args)
    return caught.value.code


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def test_model_comes_back_as_it_was_written(path, model):
    found = read(path)
    assert model.shared and model.personal
    assert same(found.shared, model.shared) and same(found.personal, model.personal)
    assert same(found.moments, model.moments)
    assert found.info == model.info and found.info["round"] == 3 and found.roles == ROLES


@torch.no_grad()
def test_model_in_another_network_of_the_same_base_gives_the_same_output(path, model, network, other):
    twin = copy.deepcopy(other)
    # only shared and personal tensors travel in the file: give the twin the frozen ones of the network
    for name, tensor in tensors(twin).items():
        if ROLES.of(name) == "frozen":
            tensor.copy_(tensors(network)[name])
    x = torch.rand(1, 3, 32, 32)
    assert not torch.equal(twin(x), network(x))
    read(path).load_into(twin)
    assert torch.equal(twin(x), network(x))


def test_model_of_a_network_is_a_copy(network):
    model = SiteModel.of(network, ROLES)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(network).values()}
    for tensor in (*model.shared.values(), *model.personal.values()):
        assert tensor.untyped_storage().data_ptr() not in storages


def test_written_file_is_readable_by_its_owner_only_and_leaves_no_other_file(path):
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["state.safetensors"]


# what does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fingerprint", ["0" * 64, None, 7])
def test_model_of_other_base_weights_is_refused_and_nothing_is_loaded(model, other, fingerprint):
    network = copy.deepcopy(other)
    model.info["fingerprint"] = fingerprint
    assert code_of(model.load_into, network) == "E11"
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(network).items())


@pytest.mark.parametrize(("part", "code"), [("shared", "E12"), ("personal", "E13")])
@pytest.mark.parametrize("how", ["missing", "extra"])
def test_model_with_a_wrong_tensor_is_refused(tmp_path, model, other, part, code, how):
    state = getattr(model, part)
    name = sorted(state)[-1]
    if how == "missing":
        del state[name]
    else:
        state["image_encoder.neck.9.weight"] = torch.ones(3)
    write(tmp_path / "a", model)
    assert code_of(read(tmp_path / "a").load_into, copy.deepcopy(other)) == code


@pytest.mark.parametrize("part", ["shared", "personal"])
def test_model_that_is_refused_changes_neither_part(model, other, part):
    """Shared and personal tensors belong together: half a model is no model."""
    network = copy.deepcopy(other)
    state = getattr(model, part)
    state[sorted(state)[0]] = torch.zeros(1)
    assert code_of(model.load_into, network) in {"E12", "E13"}
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(network).items())


@pytest.mark.parametrize(
    "roles",
    [
        {},
        {"shared": ["lora_a"]},
        {"personal": ["experts"]},
        {"shared": "lora_a", "personal": []},
        {"shared": ["experts"], "personal": []},
        {"shared": [], "personal": [7]},
        {"shared": [[]], "personal": []},
        {"shared": None, "personal": []},
    ],
    ids=str,
)
def test_model_with_wrong_roles_is_refused(tmp_path, model, other, roles):
    model.info["roles"] = roles
    write(tmp_path / "a", model)
    assert code_of(lambda: read(tmp_path / "a").load_into(other)) in {"E12", "E13", "E16"}


# what is no model -----------------------------------------------------------------------------------------------------


def test_missing_file_and_folder_are_refused(tmp_path):
    assert code_of(read, tmp_path / "none") == "E13"
    assert code_of(read, tmp_path) == "E13"


def test_file_cut_anywhere_is_refused(path):
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    cuts = [0, 1, 7, 8, 9, len(data) - 1, *torch.randint(len(data), (200,), generator=generator).tolist()]
    for cut in cuts:
        path.write_bytes(data[:cut])
        assert code_of(read, path) == "E13", cut


@pytest.mark.parametrize("part", ["shared", "personal", "moments"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused_by_name(path, model, part, value):
    state = getattr(model, part)
    name = sorted(state)[-1]
    state[name] = torch.full_like(state[name], value)
    write(path, model)
    with pytest.raises(PFedSAMError, match=f"E13.*{name}.*not finite"):
        read(path)


def test_zeroed_tail_and_a_flipped_bit_are_refused_with_what_was_expected_and_found(path):
    data = path.read_bytes()
    tensors = 8 + int.from_bytes(data[:8], "little")
    flipped = bytearray(data)
    flipped[(tensors + len(data)) // 2] ^= 1
    for damaged in (data[:-64] + bytes(64), bytes(flipped)):
        assert len(damaged) == len(data) and damaged != data
        path.write_bytes(damaged)
        with pytest.raises(PFedSAMError, match=r"E13.*is damaged: .*SHA-256 [0-9a-f]{12}, the file says [0-9a-f]{12}"):
            read(path)


def test_a_changed_round_in_the_text_is_damage_too(path):
    data = path.read_bytes()
    assert data.count(b'\\"round\\": 3') == 1
    path.write_bytes(data.replace(b'\\"round\\": 3', b'\\"round\\": 4'))
    assert code_of(read, path) == "E13"


@pytest.mark.parametrize(("schema", "reason"), [("1", "schema 1, which has no digest"), ("2", "the file says nothing")])
def test_a_model_without_a_digest_is_refused(path, model, schema, reason):
    metadata = {"schema": schema, "info": json.dumps(model.info)}
    save_file({f"shared/{name}": tensor for name, tensor in model.shared.items()}, path, metadata=metadata)
    with pytest.raises(PFedSAMError, match=rf"E13.*{reason}"):
        read(path)


def test_changed_bytes_raise_no_other_error_than_ours(path, other):
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    codes = []
    network = copy.deepcopy(other)
    for number in range(200):
        # half of them in the header, which is small
        limit = header if number % 2 else len(data)
        position, value = (int(torch.randint(high, (), generator=generator)) for high in (limit, 256))
        changed = bytearray(data)
        changed[position] = value
        path.write_bytes(changed)
        try:
            read(path).load_into(network)
        except PFedSAMError as error:
            codes.append(error.code)
    assert len(codes) > 50


@pytest.mark.parametrize("key", ["shared", "personal"])
def test_changed_key_in_the_text_of_a_file_is_refused(path, other, key):
    text = f'\\"{key}\\"'.encode()
    data = path.read_bytes()
    assert data.count(text) == 1
    path.write_bytes(data.replace(text, text.replace(key.encode()[:1], b"x")))
    assert code_of(lambda: read(path).load_into(other)) in {"E12", "E13", "E16"}


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_pickle_is_refused_and_its_code_never_runs(tmp_path, form):
    path, target = tmp_path / "state.safetensors", tmp_path / "made-by-the-file"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save({"shared/a": Payload(target)}, path)
    assert code_of(read, path) == "E13"
    assert not target.exists()


@pytest.mark.parametrize(
    ("schema", "info", "name"),
    [
        ("3", '{"roles": {}}', "shared/a"),
        (None, '{"roles": {}}', "shared/a"),
        ("1", None, "shared/a"),
        ("1", "{", "shared/a"),
        ("1", "[]", "shared/a"),
        ("1", '{"roles": []}', "shared/a"),
        ("1", '{"roles": {}}', "frozen/a"),
        ("1", '{"roles": {}}', "shared/"),
        ("1", '{"roles": {}}', "a"),
    ],
)
def test_other_safetensors_files_are_no_model(tmp_path, schema, info, name):
    metadata = {key: value for key, value in (("schema", schema), ("info", info)) if value is not None}
    save_file({name: torch.zeros(1)}, tmp_path / "a", metadata=metadata)
    assert code_of(read, tmp_path / "a") == "E13"


def test_file_holds_plain_tensors_and_one_text_only(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert set(header.pop("__metadata__")) == {"schema", "info", "sha256"}
    assert {name.split("/")[0] for name in header} == {"shared", "personal", "moments"}


# atomic ---------------------------------------------------------------------------------------------------------------


def test_file_is_intact_when_the_rename_fails(path, model, monkeypatch):
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no rename")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        model.info["round"] = 4
        with pytest.raises(OSError, match="no rename"):
            write(path, model)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    write(path, model)
    assert read(path).info["round"] == 4


def test_file_is_intact_when_the_disk_is_full(path, model):
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        with pytest.raises(OSError):
            write(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_model_of_a_training_without_a_federation_can_be_read(tmp_path, network, capsys):
    class Trainer:
        roles = ROLES

        class state:
            epoch = 5

    site_model.save_alone(str(tmp_path / "model.safetensors"), network, Trainer())
    found = read(tmp_path / "model.safetensors")
    assert found.info["epochs"] == 5 and found.info["round"] is None
    assert "model.safetensors" in capsys.readouterr().out
