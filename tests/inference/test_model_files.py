"""Model files that do not fit or are broken are refused with an error of ours, and nothing in them runs."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import pfedsam
from pfedsam.bundles import network_of
from pfedsam.cli import app
from pfedsam.commands.interrupts import Interrupted
from pfedsam.errors import PFedSAMError
from pfedsam.inference.export import export_all, export_model, export_onnx, export_torchscript, personal_network
from pfedsam.inference.pair import pair
from pfedsam.parameters import TensorSpec
from pfedsam.storage.global_model import write_global_model
from pfedsam.storage.site_model import model_settings, read, write

TINY = {"backbone": "vit_test", "image_size": 64}


def test_an_exported_model_is_self_contained_and_has_no_moments(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    done = CliRunner().invoke(app, ["export-model", str(model), str(out)])
    assert done.exit_code == 0, done.output
    assert f"{model}: " in done.output and "current state of round 3" in done.output
    kept = read(out)
    assert kept.moments == {}
    assert kept.info["labels"] == ["lesion"]
    assert kept.info["settings"]["backbone"] == "vit_test"
    assert kept.info["round"] == 3
    assert model_settings(out, None, {}) == ("brain_lesion_mri", TINY)
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(personal_network(out)(image), personal_network(model)(image))
    assert all(name.split("/")[0] in ("shared", "personal") for name in load_file(out))


def test_another_network_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError) as caught:
        export_model(model, tmp_path / "out", overrides={"image_size": 96})
    assert caught.value.code == "E11"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["shared", "personal"])
def test_a_missing_tensor_is_refused(model: Path, tmp_path: Path, part: str) -> None:
    kept = read(model)
    name = sorted(getattr(kept, part))[0]
    del getattr(kept, part)[name]
    write(tmp_path / "less", kept)
    with pytest.raises(PFedSAMError, match=name.replace(".", r"\.")):
        personal_network(tmp_path / "less")


def test_another_bundle_is_refused(model: Path, tmp_path: Path) -> None:
    kept = read(model)
    kept.info["bundle"] = "knee"
    write(tmp_path / "other", kept)
    with pytest.raises(PFedSAMError, match="there is no installed bundle 'knee'"):
        personal_network(tmp_path / "other")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name, data in (("plain", pickle.dumps(Bad())), ("torch", None)):
        if data is None:
            torch.save({"x": Bad()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(PFedSAMError) as caught:
            personal_network(tmp_path / name)
        assert caught.value.code == "E13"
    assert not (tmp_path / "executed").exists()


def test_two_thousand_corrupted_files(model: Path, tmp_path: Path) -> None:
    """Bytes changed, cut off, put in, in header and data: ours or nothing, and never a crash."""
    data = model.read_bytes()
    network = network_of("brain_lesion_mri", TINY)
    random = np.random.default_rng(0)
    header = 8 + int.from_bytes(data[:8], "little")
    path = tmp_path / "model.safetensors"
    refused = 0
    for number in range(2000):
        broken = bytearray(data)
        kind = number % 4
        place = int(random.integers(header if number % 3 else len(data)))
        if kind == 0:
            for _ in range(int(random.integers(1, 8))):
                broken[int(random.integers(header))] = int(random.integers(256))
        elif kind == 1:
            del broken[place:]
        elif kind == 2:
            broken[place:place] = random.bytes(int(random.integers(1, 64)))
        else:
            end = min(len(broken), place + int(random.integers(1, 64)))
            broken[place:end] = random.bytes(end - place)
        path.write_bytes(bytes(broken))
        try:
            found = read(path)
            found.load_into(network)
        except PFedSAMError:
            refused += 1
    assert refused > 1000


def require_no_place_of_this_machine(out: Path) -> None:
    """No folder that our, torch's or the tests' sources lie in, not packed either, nor a word of a stack trace."""
    data = out.read_bytes()
    sources = (pfedsam.__file__, torch.__file__, segment_anything.__file__, __file__)
    folders = {str(Path(str(one)).resolve().parent) for one in sources} | {str(out.parent), str(Path.cwd())}
    for word in (*folders, f"{Path.home()}/", "site-packages", "stack_trace", "sam.py:", "debug_pkl"):
        assert word.encode() not in data, word
    if zipfile.is_zipfile(out):
        assert all(one.compress_type == zipfile.ZIP_STORED for one in zipfile.ZipFile(out).infolist())


def test_torchscript_and_onnx_equal_the_network_and_say_nothing_of_this_machine(model: Path, tmp_path: Path) -> None:
    network = personal_network(model)
    assert export_torchscript(network, tmp_path / "model.pt") <= 1e-4
    require_no_place_of_this_machine(tmp_path / "model.pt")
    pytest.importorskip("onnxscript")
    assert export_onnx(network, tmp_path / "model.onnx") <= 1e-4
    require_no_place_of_this_machine(tmp_path / "model.onnx")
    image = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(image), network(image), rtol=0, atol=1e-4)


class Spoilt(nn.Module):
    """A network of which no export can be told to be right."""

    image_size = 8

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * torch.nan


@pytest.mark.parametrize("write_one", [export_torchscript, export_onnx])
def test_an_export_that_is_not_right_takes_no_place(write_one: Callable[..., float], tmp_path: Path) -> None:
    if write_one is export_onnx:
        pytest.importorskip("onnxscript")
    (tmp_path / "old").write_bytes(b"the export before")
    for name in ("new", "old"):
        with pytest.raises(PFedSAMError, match=r"E34.*nan"):
            write_one(Spoilt(), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"the export before"


def test_an_export_that_cannot_be_run_takes_no_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    import onnxruntime

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("this model cannot be loaded")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        export_onnx(personal_network(model), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_no_path_of_this_machine_is_in_an_exported_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = network_of("brain_lesion_mri", TINY)
    monkeypatch.setattr("pfedsam.inference.export.network_of", lambda *_: network)
    monkeypatch.setenv("PFEDSAM_CHECKPOINT", "/srv/hospital/weights.pth")
    told = export_model(model, tmp_path / "out")
    assert "checkpoint" not in told["settings"] and told["settings"]["image_size"] == 64
    assert b"/srv/hospital" not in (tmp_path / "out").read_bytes()


@pytest.mark.parametrize("step", [0, 3, 6])
def test_an_export_that_is_stopped_leaves_nothing_behind(model: Path, tmp_path: Path, step: int) -> None:
    told: list[str] = []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) > step:
            raise Interrupted

    files = {"torchscript": tmp_path / "m.ts", "onnx": tmp_path / "m.onnx"}
    with pytest.raises(Interrupted):
        export_all(model, tmp_path / "m.safetensors", **files, event=stop)
    assert len(told) == step + 1 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_an_export_leaves_nothing_behind(
    model: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    words = ["export-model", model, tmp_path / "m.safetensors", "--onnx", tmp_path / "m.onnx"]
    process = subprocess.Popen([sys.executable, "-m", "pfedsam.cli", *map(str, words)], stdout=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list(tmp_path.glob(".m.onnx.*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signum and b"Nothing was written" in out, out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [None, "--torchscript", "--onnx"])
def test_a_file_that_is_there_is_replaced_by_force_only_and_before_anything_is_written(
    model: Path, tmp_path: Path, option: str | None
) -> None:
    out, there = tmp_path / "model.safetensors", tmp_path / "thesis.doc"
    there.write_text("mine")
    words = ["export-model", str(model), *([str(there)] if option is None else [str(out), option, str(there)])]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24"
    assert there.read_text() == "mine" and not out.exists()
    if option != "--onnx":
        assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0 and there.read_bytes() != b"mine"


def test_a_model_is_never_written_onto_the_one_that_is_read_nor_onto_another_result(
    model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "state.safetensors"
    own.write_bytes(model.read_bytes())
    for words in ([str(own)], [str(tmp_path / "a"), "--torchscript", str(tmp_path / "a")]):
        done = CliRunner().invoke(app, ["export-model", str(own), *words, "--force"])
        assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24"
    assert own.read_bytes() == model.read_bytes() and not (tmp_path / "a").exists()
    done = CliRunner().invoke(app, ["pull", "job", str(own), str(own), "--admin", str(tmp_path), "--force"])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24"


@pytest.mark.parametrize("name", ["model.pt", pytest.param("model.onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("backbone", "size"), [pytest.param("vit_b", 224, marks=pytest.mark.slow), ("lite_medsam", 128)]
)
def test_exports_of_the_real_backbones(backbone: str, size: int, name: str, tmp_path: Path) -> None:
    from pfedsam.networks.sam import build_network

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if backbone == "lite_medsam":
            network = build_network(backbone, size)
        else:
            # no weights of vit_b on a fresh machine: random ones from a seed
            with torch.device("meta"):
                network = build_network(backbone, size, checkpoint=None)
            network = network.to_empty(device="cpu")
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.data.normal_(0, 0.02)
        for layer in network.expert_layers().values():
            for parameter in layer.parameters():
                parameter.data.normal_(0, 0.05)
    network.set_experts(True)
    network.eval()
    difference = (export_torchscript if name == "model.pt" else export_onnx)(network, tmp_path / name)
    print(f"{backbone} at {size} px: {name} differs by {difference:.1e}")
    assert difference <= 1e-4


def test_experts_are_paired_only_with_the_global_model_that_they_were_trained_beside(
    model: Path, tmp_path: Path
) -> None:
    state = read(model)
    expected = {n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state.shared.items()}
    fingerprint = str(state.info["fingerprint"])
    write_global_model(tmp_path / "same.safetensors", state.shared, fingerprint, expected, 3)
    paired = pair(tmp_path / "same.safetensors", model)
    assert paired.moments == {} and not paired.info["mixed"]
    other = {name: tensor + 1 for name, tensor in state.shared.items()}
    write_global_model(tmp_path / "other.safetensors", other, fingerprint, expected, 2)
    with pytest.raises(PFedSAMError, match=r"E12.*round 3.*round 2"):
        pair(tmp_path / "other.safetensors", model)
    assert pair(tmp_path / "other.safetensors", model, mix=True).info["mixed"]
    write_global_model(tmp_path / "foreign.safetensors", state.shared, "0" * 64, expected, 3)
    with pytest.raises(PFedSAMError, match="E11"):
        pair(tmp_path / "foreign.safetensors", model)
