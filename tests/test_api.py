"""The Python API: it gives what the commands give, loads nothing until it is asked, and says what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from image_files import head, nifti, series
from PIL import Image
from typer.testing import CliRunner

import pfedsam
from pfedsam.bundles import network_of
from pfedsam.cli import app
from pfedsam.comparison.compare import Comparison
from pfedsam.comparison.execute import execute
from pfedsam.data.arrays import picture_of
from pfedsam.data.phantom import write_phantom
from pfedsam.data.reader import load_picture
from pfedsam.deployment import simulator
from pfedsam.deployment.simulation import Simulation
from pfedsam.deployment.simulation_starts import newest_global_model
from pfedsam.files import append_line
from pfedsam.parameters import COPY, Roles, manifest
from pfedsam.storage.global_model import write_global_model
from pfedsam.storage.site_model import SiteModel, read
from pfedsam.storage.state import SiteState
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.federation import Federation, run_federation

torch.set_num_threads(1)
BUNDLE = "brain_lesion_mri"
TINY = {"backbone": "vit_test", "image_size": 64}
TINY_TRAINING = {
    **TINY,
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}
VALUES, AFFINE = head((32, 28, 5)), np.diag([4.0, 4.0, 5.0, 1.0])
SITES = ("site-1", "site-2")
#: Seconds that `import pfedsam` may take, as its documentation says.
IMPORT_SECONDS = 0.05


def made(roles: Roles | None = None, seed: int = 4, **info: Any) -> SiteModel:
    """A model with random values in everything that is trained."""
    random = torch.Generator().manual_seed(seed)
    model = SiteModel.of(network_of(BUNDLE, TINY), roles or Roles(), bundle=BUNDLE, overrides=TINY, round=3, **info)
    for part in (model.shared, model.personal):
        for name, tensor in part.items():
            part[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=random)
    return model


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "state.safetensors"
    made(final=True).save(path)
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> pfedsam.Model:
    return pfedsam.load_model(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "data"
    write_phantom(folder, sites=len(SITES), cases=6, shape=(32, 32, 6))
    return folder


# ---- the package --------------------------------------------------------------------------------------------------


def _import_alone() -> tuple[float, list[str]]:
    """Seconds of `import pfedsam` in a fresh interpreter, and the heavy libraries that came with it."""
    code = (
        "import sys, time; start = time.perf_counter(); import pfedsam; seconds = time.perf_counter() - start; "
        "heavy = [name for name in ('torch', 'monai', 'numpy', 'nvflare', 'pandas') if name in sys.modules]; "
        "assert 'load_model' in dir(pfedsam); print(__import__('json').dumps([seconds, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout))


def test_the_import_is_fast_and_loads_no_heavy_library() -> None:
    found = [_import_alone() for _ in range(5)]
    assert all(heavy == [] for _, heavy in found)
    assert min(seconds for seconds, _ in found) < IMPORT_SECONDS


def test_every_public_name_is_there_and_documented_and_no_other() -> None:
    for name in pfedsam.__all__:
        one = getattr(pfedsam, name)
        assert name == "__version__" or one.__doc__
    assert set(pfedsam.__all__) <= set(dir(pfedsam)) and pfedsam.SiteModel is SiteModel
    with pytest.raises(AttributeError, match="no attribute 'segment'"):
        _ = pfedsam.segment  # type: ignore[attr-defined]


# ---- a model on images --------------------------------------------------------------------------------------------


def test_a_path_an_array_and_the_command_give_the_same(model: pfedsam.Model, file: Path, tmp_path: Path) -> None:
    image = nifti(tmp_path / "scan.nii.gz", VALUES, AFFINE)
    found = model.segment(image)
    of_array = model.segment(VALUES, affine=AFFINE)
    assert found.label.shape == VALUES.shape and found.label.dtype == np.uint8 and found.label.any()
    assert found.probabilities.shape == (1, *VALUES.shape) and found.class_names == ("lesion",)
    np.testing.assert_array_equal(found.affine, AFFINE)
    np.testing.assert_array_equal(of_array.probabilities, found.probabilities)
    np.testing.assert_array_equal(of_array.label, found.label)
    command = ["infer", str(image), "--model", str(file), "--out", str(tmp_path / "out"), "--probabilities"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    for one in (found, of_array):
        saved = nibabel.load(one.save(tmp_path / "saved", force=True))
        written = nibabel.load(tmp_path / "out" / "scan_lesion.nii.gz")
        np.testing.assert_array_equal(np.asarray(saved.dataobj), np.asarray(written.dataobj))
        np.testing.assert_array_equal(saved.affine, written.affine)
    probabilities = nibabel.load(tmp_path / "out" / "scan_lesion_probability.nii.gz")
    np.testing.assert_array_equal(np.asarray(probabilities.dataobj), found.probabilities[0])


def test_a_picture_is_the_same_from_a_file_and_as_an_array(model: pfedsam.Model, tmp_path: Path) -> None:
    grey = np.ascontiguousarray(VALUES[..., 2].T.astype(np.uint8))
    for rows in (grey, np.stack([grey, grey // 2, grey // 3], axis=-1)):
        Image.fromarray(rows).save(tmp_path / "scan.png")
        array = np.asarray(rows).swapaxes(0, 1)
        read_, given = load_picture(tmp_path / "scan.png"), picture_of(array)
        assert (given.kind, given.white, given.is_colour) == (read_.kind, read_.white, read_.is_colour)
        of_file, of_array = model.segment(tmp_path / "scan.png"), model.segment(array)
        np.testing.assert_array_equal(of_array.probabilities, of_file.probabilities)
        assert of_array.label.shape == array.shape[:2] and of_array.affine is None
        path = of_array.save(tmp_path / "saved.png", force=True)
        np.testing.assert_array_equal(np.asarray(Image.open(path)).T, of_file.label)


def test_a_series_and_a_single_slice_are_taken_in_their_own_grid(model: pfedsam.Model, tmp_path: Path) -> None:
    assert model.segment(str(series(tmp_path / "dicom", VALUES))).label.shape == VALUES.shape
    single = model.segment(VALUES[..., 2], affine=AFFINE)
    assert single.label.shape == VALUES.shape[:2] and single.probabilities.shape == (1, *VALUES.shape[:2])
    assert nibabel.load(single.save(tmp_path / "single")).shape == VALUES.shape[:2]


def test_what_a_person_should_know_is_among_the_notes(model: pfedsam.Model) -> None:
    assert any("cubes of 1 mm" in note for note in model.segment(VALUES).notes)
    large = model.segment(head((128, 128, 2)), affine=AFFINE)
    assert any("75% of the image lies outside" in note for note in large.notes)


def test_many_images_are_read_one_at_a_time(model: pfedsam.Model) -> None:
    asked: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for number in range(3):
            asked.append(number)
            yield VALUES[..., number]

    results = model.segment_many(images())
    assert asked == []
    assert next(results).label.shape == VALUES.shape[:2] and asked == [0]
    assert len(list(results)) == 2 and asked == [0, 1, 2]


def test_the_global_model_is_that_of_the_command(file: Path, model: pfedsam.Model, tmp_path: Path) -> None:
    image = nifti(tmp_path / "scan.nii.gz", VALUES, AFFINE)
    found = pfedsam.load_model(file, which="global", device="cpu").segment(image)
    command = ["infer", str(image), "--model", str(file), "--out", str(tmp_path), "--global"]
    assert CliRunner().invoke(app, command).exit_code == 0
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "scan_lesion.nii.gz").dataobj), found.label)
    assert (found.probabilities != model.segment(image).probabilities).any()


def test_a_sites_copy_of_the_shared_tensors_is_its_personal_model(tmp_path: Path) -> None:
    """As in strategies that fine-tune a copy: the shared tensors alone are the global model."""
    kept, other = made(Roles(personal=())), made(Roles(personal=()), seed=5)
    kept.personal = {COPY + name: tensor for name, tensor in other.shared.items()}
    kept.save(tmp_path / "copy.safetensors")
    other.save(tmp_path / "other.safetensors")
    own = pfedsam.load_model(tmp_path / "copy.safetensors").segment(VALUES, affine=AFFINE)
    expected = pfedsam.load_model(tmp_path / "other.safetensors").segment(VALUES, affine=AFFINE)
    np.testing.assert_array_equal(own.probabilities, expected.probabilities)
    shared = pfedsam.load_model(tmp_path / "copy.safetensors", which="global").segment(VALUES, affine=AFFINE)
    assert (shared.probabilities != own.probabilities).any()


@pytest.mark.parametrize(
    ("image", "more", "told"),
    [
        ("nowhere.nii.gz", {}, r"E02.*nowhere\.nii\.gz"),
        (np.zeros(5), {}, r"E05.*float64\[5\].*\(x, y, z\)"),
        (np.zeros((4, 4, 2, 2)), {}, r"E05.*\[4, 4, 2, 2\]"),
        (np.zeros((0, 4)), {}, r"E05.*\[0, 4\]"),
        (np.zeros((8, 8, 3), np.float32), {}, r"E05.*affine"),
        (np.full((8, 8), "a"), {}, r"E05.*<U1"),
        (np.full((8, 8, 4), np.nan), {}, r"E09.*not finite"),
        (VALUES, {"affine": np.eye(3)}, r"E05.*\(4, 4\)"),
        (VALUES, {"affine": np.zeros((4, 4))}, r"E05.*\(4, 4\)"),
        ("nowhere.nii.gz", {"affine": AFFINE}, r"E32.*its own"),
        (VALUES, {"box": (0, 3, 0, 3, 0, 3)}, r"E32.*trained with boxes"),
    ],
)
def test_what_is_no_image_is_refused(model: pfedsam.Model, image: Any, more: dict[str, Any], told: str) -> None:
    with pytest.raises(pfedsam.PFedSAMError, match=told):
        model.segment(image, **more)


def test_a_box_outside_an_array_is_refused(file: Path) -> None:
    boxed = pfedsam.load_model(file, overrides={"box_probability": 0.5})
    with pytest.raises(pfedsam.PFedSAMError, match=r"E16.*not inside \[32, 28, 5\]"):
        boxed.segment(VALUES, box=(0, 32, 0, 3, 0, 3), affine=AFFINE)
    inside = boxed.segment(VALUES, box=(4, 20, 4, 20, 1, 2), affine=AFFINE)
    assert not inside.label[..., [0, 3, 4]].any()


def test_neither_a_path_nor_an_array_is_a_type_error(model: pfedsam.Model) -> None:
    with pytest.raises(TypeError, match="list"):
        model.segment([1, 2])  # type: ignore[arg-type]


def test_a_result_replaces_nothing_and_has_its_own_ending(model: pfedsam.Model, tmp_path: Path) -> None:
    image = nifti(tmp_path / "scan.nii.gz", VALUES, AFFINE)
    found = model.segment(image)
    for force in (False, True):
        with pytest.raises(pfedsam.PFedSAMError, match="E24"):
            found.save(image, force=force)
    assert found.save(tmp_path / "out" / "a") == tmp_path / "out" / "a.nii.gz"
    with pytest.raises(pfedsam.PFedSAMError, match="E24"):
        found.save(tmp_path / "out" / "a.nii.gz")
    with pytest.raises(pfedsam.PFedSAMError, match=r"E16.*\.nii\.gz"):
        found.save(tmp_path / "a.png")


# ---- where a model is ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a finished simulation leaves of two sites: one global model, experts of their own."""
    out = tmp_path_factory.mktemp("run")
    for number, site in enumerate(SITES):
        kept = read(file)
        kept.personal = {name: tensor + number for name, tensor in kept.personal.items()}
        state = SiteState(out / "state", "simulation", site, BUNDLE, str(kept.info["fingerprint"]))
        state.open()
        state.save(kept)
        state.close()
    return out


def test_a_run_has_the_model_of_each_site_and_one_global_model(run: Path, file: Path) -> None:
    one, two = (pfedsam.load_model(run, site=site) for site in SITES)
    assert (one.site, two.site) == SITES and one.file != two.file and one.bundle == BUNDLE and one.settings == TINY
    image = {"image": VALUES, "affine": AFFINE}
    assert (one.segment(**image).probabilities != two.segment(**image).probabilities).any()
    shared = pfedsam.load_model(run, which="global").segment(**image)
    expected = pfedsam.load_model(file, which="global").segment(**image)
    np.testing.assert_array_equal(shared.probabilities, expected.probabilities)
    for folder in (one.file.parent, one.file, run / "state"):
        known = {"site": "site-1"} if folder == run / "state" else {}
        assert pfedsam.load_model(folder, **known).file == one.file


def test_a_site_that_is_not_there_or_not_named_is_told_which_there_are(run: Path) -> None:
    for site in (None, "site-3"):
        with pytest.raises(pfedsam.PFedSAMError, match=r"E13.*There are: site-1, site-2\."):
            pfedsam.load_model(run, site=site)
    with pytest.raises(pfedsam.PFedSAMError, match=r"E32.*Leave the site out"):
        pfedsam.load_model(next(run.glob("state/*/site-1/*/state.safetensors")), site="site-2")


def test_a_global_model_with_a_head_of_the_site_is_asked_for_by_site(tmp_path: Path) -> None:
    roles = Roles(("lora_a", "lora_b"), ("experts", "decoder_subset"))
    for site in SITES:
        kept = made(roles)
        state = SiteState(tmp_path / "state", "simulation", site, BUNDLE, str(kept.info["fingerprint"]))
        state.open()
        state.save(kept)
        state.close()
    with pytest.raises(pfedsam.PFedSAMError, match=r"E13.*There are: site-1, site-2\."):
        pfedsam.load_model(tmp_path, which="global")
    assert pfedsam.load_model(tmp_path, "site-2", "global").site == "site-2"


def test_what_is_no_model_is_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(pfedsam.PFedSAMError, match=r"E13.*nowhere"):
        pfedsam.load_model(tmp_path / "nowhere")
    with pytest.raises(pfedsam.PFedSAMError, match=r"E13.*holds no model"):
        pfedsam.load_model(tmp_path)
    with pytest.raises(pfedsam.PFedSAMError, match=r"E16.*'gpu'"):
        pfedsam.load_model(file, device="gpu")
    with pytest.raises(pfedsam.PFedSAMError, match=r"E16.*'local'"):
        pfedsam.load_model(file, which="local")  # type: ignore[arg-type]
    with pytest.raises(pfedsam.PFedSAMError, match="E11"):
        pfedsam.load_model(file, overrides={"image_size": 96})


def test_a_model_file_is_read_as_it_was_written(file: Path, tmp_path: Path) -> None:
    kept = pfedsam.SiteModel.load(file)
    kept.save(tmp_path / "again.safetensors")
    again = read(tmp_path / "again.safetensors")
    assert again.info == kept.info and all(torch.equal(again.shared[name], one) for name, one in kept.shared.items())


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "site-1"
    told: list[str] = []
    kept = pfedsam.train_site(data / "site-1", out, rounds=1, settings=TINY_TRAINING, event=told.append)
    assert kept.info["final"] and kept.info["strategy"] == "local_only" and len(told) == 2
    assert kept.moments == {} and read(out / "model.safetensors").info == kept.info
    return out


def test_a_notebook_trains_a_site_and_segments_with_its_model(data: Path, trained: Path) -> None:
    image = next((data / "site-2" / "images").iterdir())
    found = pfedsam.load_model(trained).segment(image)
    assert found.label.shape == (32, 32, 6) and found.class_names == ("lesion",)
    rows = pfedsam.evaluate(data / "site-1", trained)
    assert list(rows.columns[:4]) == ["site", "case", "model", "class"] and set(rows["class"]) == {"lesion"}
    assert set(rows.site) == {"site-1"} and set(rows.model) == {"global", "personal"}
    assert rows.dice.between(0, 1).all() and rows.attrs["notes"] == []
    loaded = pfedsam.evaluate(data / "site-1", pfedsam.load_model(trained))
    pd.testing.assert_frame_equal(loaded, rows)


def test_a_model_that_was_trained_is_replaced_by_force_only(data: Path, trained: Path) -> None:
    before = read(trained / "model.safetensors")
    with pytest.raises(pfedsam.PFedSAMError, match="E24"):
        pfedsam.train_site(data / "site-1", trained, rounds=1, settings=TINY_TRAINING)
    told: list[str] = []
    again = pfedsam.train_site(
        data / "site-1", trained, rounds=1, settings=TINY_TRAINING, force=True, event=told.append
    )
    assert told == [] and again.info == before.info  # it was done before
    assert all(torch.equal(again.personal[name], tensor) for name, tensor in before.personal.items())


def test_a_site_is_not_trained_where_that_cannot_be(data: Path, tmp_path: Path) -> None:
    with pytest.raises(pfedsam.PFedSAMError, match=r"E32.*kind 'federated'"):
        pfedsam.train_site(data / "site-1", tmp_path / "out", strategy="pfedsam")
    with pytest.raises(pfedsam.PFedSAMError, match="E02"):
        pfedsam.train_site(data / "site-3", tmp_path / "out")
    with pytest.raises(pfedsam.PFedSAMError, match="E18"):
        pfedsam.train_site(data / "site-1", tmp_path / "out", settings={"checkpoint": "here"})
    assert not (tmp_path / "out").exists()


def _in_this_process(simulation: Simulation, job: Path, log: Path, event: Callable[[str], None]) -> None:
    """What NVFlare's simulator leaves, trained without it: the states of the sites and the global model."""
    plan = simulation.plan
    strategy, rounds = find_strategy("pfedsam").checked(), simulation.rounds_in_all
    sites = {site: simulation.data / site for site in simulation.sites}
    ours = Federation(plan["bundle"], sites, strategy, simulation.out / "ours", rounds, plan["overrides"])
    run_federation(ours, event)
    network = network_of(plan["bundle"], plan["overrides"])
    for site in sites:
        kept = read(ours.model_of(site))
        folder = SiteState(simulation.state_root, simulation.federation, site, plan["bundle"], network.base_fingerprint)
        folder.open()
        folder.save(kept)
        folder.close()
    path = newest_global_model(simulation)
    path.parent.mkdir(parents=True)
    shared = manifest(network, strategy.roles, "shared")
    write_global_model(path, ours.global_model()[0], network.base_fingerprint, shared, rounds - 1)


def test_a_simulation_gives_its_paths_and_the_table_of_dice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "_simulate", _in_this_process)
    told: list[str] = []
    found = pfedsam.simulate(data, tmp_path / "run", rounds=1, settings=TINY_TRAINING, event=told.append)
    assert told and list(found.dice.index) == list(SITES) == list(found.states)
    assert list(found.dice.columns) == ["cases", "global", "personal", "gain"]
    np.testing.assert_allclose(found.dice.gain, found.dice.personal - found.dice["global"])
    means = found.cases[found.cases.model == "personal"].groupby("site").dice.mean()
    np.testing.assert_allclose(means, found.dice.personal)
    results = json.loads(found.results.read_text())
    assert {site: one["dice_personal"] for site, one in results["sites"].items()} == dict(found.dice.personal)
    assert found.global_model.is_file()
    assert pfedsam.load_model(found.out, site="site-2").file == found.states["site-2"]
    rows = pfedsam.evaluate(data / "site-2", found.out)
    assert rows[rows.model == "personal"].dice.mean() == pytest.approx(found.dice.personal["site-2"])
    with pytest.raises(pfedsam.PFedSAMError, match=r"E25.*seed: 0 then, 1 now"):
        pfedsam.simulate(data, tmp_path / "run", rounds=1, seed=1, settings=TINY_TRAINING)
    with pytest.raises(pfedsam.PFedSAMError, match=r"E32.*needs no server"):
        pfedsam.simulate(data, tmp_path / "other", strategy="local_only", settings=TINY_TRAINING)
    assert not (tmp_path / "other").exists()


def test_a_comparison_gives_a_row_for_each_case_and_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_after_the_other(comparison: Comparison, workers: int, event: Callable[[str, int], None]) -> None:
        for one in comparison.missing():
            append_line(comparison.record_file, execute(one, comparison.out, lambda line: event(line, 1)))

    monkeypatch.setattr("pfedsam.comparison.compare.compare", one_after_the_other)
    asked = {"seeds": [0], "out": tmp_path / "compare", "rounds": 1, "settings": TINY_TRAINING}
    told: list[str] = []
    rows = pfedsam.compare(data, ["local_only"], event=told.append, **asked)
    assert told and set(rows.site) == set(SITES) and set(rows.strategy) == {"local_only"}
    told.clear()
    pd.testing.assert_frame_equal(pfedsam.compare(data, ["local_only"], event=told.append, **asked), rows)
    assert told == []
    with pytest.raises(pfedsam.PFedSAMError, match="E28"):
        pfedsam.compare(data, ["nothing"], **asked)
    with pytest.raises(pfedsam.PFedSAMError, match="E02"):
        pfedsam.compare(tmp_path, ["local_only"], **asked)


def test_runs_that_fail_are_told_with_the_code_of_the_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(comparison: Comparison, workers: int, event: Any) -> None:
        comparison.failed |= {"a, seed 0": "E17: loss is not finite.", "b, seed 0": "RuntimeError: no memory"}

    monkeypatch.setattr("pfedsam.comparison.compare.compare", fail)
    with pytest.raises(pfedsam.PFedSAMError, match=r"E17: 2 of 1 runs failed: a, seed 0.*b, seed 0"):
        pfedsam.compare(data, ["local_only"], out=tmp_path / "compare", settings=TINY_TRAINING)
