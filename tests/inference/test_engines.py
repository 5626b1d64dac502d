"""ONNX Runtime computes what torch does; its graph is the owner's alone, is made once, and goes with its model."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import head, nifti
from torch import nn
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.errors import PFedSAMError
from pfedsam.inference import engines
from pfedsam.inference.engines import Engine
from pfedsam.inference.predict import Predictor
from pfedsam.storage.model_files import find_model
from pfedsam.storage.site_model import read, write
from pfedsam.storage.state_list import delete_state, list_states

pytest.importorskip("onnxruntime")

SLICES = 5


@pytest.fixture
def own(model: Path, tmp_path: Path) -> Path:
    """The model in a folder of its own."""
    (tmp_path / "own").mkdir()
    return Path(shutil.copy(model, tmp_path / "own"))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return nifti(tmp_path / "scan.nii.gz", head((32, 28, SLICES)), np.diag([4.0, 4.0, 5.0, 1.0]))


def probabilities(model: Path, scan: Path, engine: str, experts: bool = True) -> np.ndarray:
    return Predictor(model, experts=experts, engine=engine, device="cpu")(scan).probabilities


def graphs(model: Path) -> list[Path]:
    """All that lies beside a model."""
    return sorted(path for path in model.parent.iterdir() if path != model)


def test_the_engines_agree_for_the_personal_and_the_global_model_and_each_has_its_graph(own: Path, scan: Path) -> None:
    found = {}
    for experts in (True, False):
        found[experts] = probabilities(own, scan, "onnx", experts)
        np.testing.assert_allclose(found[experts], probabilities(own, scan, "torch", experts), rtol=0, atol=1e-4)
    assert np.abs(found[True] - found[False]).max() > 1e-3
    assert len(graphs(own)) == 2
    for graph in graphs(own):
        assert graph.name.startswith(f".{own.name}.") and stat.S_IMODE(graph.stat().st_mode) == 0o600


def test_a_graph_is_made_once_and_a_damaged_or_a_wrong_one_anew(own: Path, scan: Path) -> None:
    expected = probabilities(own, scan, "torch")
    probabilities(own, scan, "onnx", experts=False)
    (other,) = graphs(own)
    probabilities(own, scan, "onnx")
    (graph,) = set(graphs(own)) - {other}
    made = graph.stat().st_mtime_ns
    probabilities(own, scan, "onnx")
    assert graph.stat().st_mtime_ns == made
    whole = graph.read_bytes()
    for wrong in (whole[:-1000], b"", other.read_bytes()):
        graph.write_bytes(wrong)
        np.testing.assert_allclose(probabilities(own, scan, "onnx"), expected, rtol=0, atol=1e-4)
        assert len(graph.read_bytes()) == len(whole)


def test_the_graph_of_an_earlier_model_goes(own: Path, scan: Path) -> None:
    probabilities(own, scan, "onnx")
    (before,) = graphs(own)
    changed = read(own)
    for tensor in changed.personal.values():
        tensor += 0.1
    write(own, changed)
    np.testing.assert_allclose(probabilities(own, scan, "onnx"), probabilities(own, scan, "torch"), rtol=0, atol=1e-4)
    (now,) = graphs(own)
    assert now != before


def test_a_graph_that_cannot_be_kept_is_used_all_the_same(own: Path, scan: Path) -> None:
    """The name of the graph is too long for the file system where that of the model is nearly so."""
    longest = os.pathconf(own.parent, "PC_NAME_MAX")
    own = own.rename(own.with_name("m" * (longest - 12) + ".safetensors"))
    np.testing.assert_allclose(probabilities(own, scan, "onnx"), probabilities(own, scan, "torch"), rtol=0, atol=1e-4)
    assert not graphs(own)


@pytest.mark.parametrize(("pays", "made"), [(SLICES + 1, 0), (SLICES, 1)])
def test_auto_makes_a_graph_only_where_it_pays(
    own: Path, scan: Path, pays: int, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "OPENING_PAYS", 1)
    monkeypatch.setattr(engines, "MAKING_PAYS", pays)
    found = probabilities(own, scan, "auto")
    assert len(graphs(own)) == made
    np.testing.assert_allclose(found, probabilities(own, scan, "torch"), rtol=0, atol=1e-4)


def test_auto_without_the_library_is_torch_and_onnx_says_what_to_install(
    own: Path, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(engines, "OPENING_PAYS", 1)
    monkeypatch.setattr(engines, "MAKING_PAYS", 1)
    assert np.array_equal(probabilities(own, scan, "auto"), probabilities(own, scan, "torch"))
    with pytest.raises(PFedSAMError, match=r"E31.*onnxruntime.*'export'"):
        Predictor(own, engine="onnx").open()


def test_an_engine_that_there_is_not_is_refused_before_the_model_is_read(tmp_path: Path, scan: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E16.*'tensorrt'.*auto, torch, onnx"):
        Predictor(tmp_path / "none", engine="tensorrt").open()
    words = ["infer", str(scan), "--model", str(tmp_path / "none"), "--out", str(tmp_path), "--engine", "x"]
    assert CliRunner().invoke(app, words).exception is not None


class Spoilt(nn.Module):
    """A network that no graph equals."""

    image_size, base_fingerprint = 8, "x"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(torch.nan))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image * self.weight


def test_where_there_can_be_no_graph_auto_goes_on_with_torch_and_says_so(
    own: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "OPENING_PAYS", 1)
    monkeypatch.setattr(engines, "MAKING_PAYS", 1)
    images = torch.rand(2, 3, 8, 8)
    assert Engine("auto", Spoilt(), own, {})(images).isnan().all()
    assert "computed by torch" in caplog.text and "E34" in caplog.text
    with pytest.raises(PFedSAMError, match="E34"):
        Engine("onnx", Spoilt(), own, {})(images)
    assert not graphs(own)


def test_a_graph_in_a_state_folder_is_no_state_and_is_deleted_with_it(model: Path, scan: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    folder = root / "federation" / "site" / "brain_lesion_mri-0123456789ab"
    folder.mkdir(parents=True)
    state = Path(shutil.copy(model, folder / "state.safetensors"))
    before = list_states(root)
    words = ["infer", str(scan), "--model", str(state), "--out", str(tmp_path / "out"), "--engine", "onnx"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert len(graphs(state)) == 1 and list_states(root) == before
    assert find_model(folder)[0] == state
    delete_state(before[0])
    assert not list(root.iterdir())
