"""Runs of the simulator that several tests look at. Each starts when the first test asks for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock
from scenarios import LEAKS, LOCKED_CLASSES, SECRET, TROUBLES, canary_of
from simulated import FEDERATION, SOURCE, Job, Run, component, simulate

from pfedsam.data.phantom import write_phantom
from pfedsam.data.site_folder import site_names
from pfedsam.data.splitting import write_datalist
from pfedsam.deployment.allowed_classes import allow_classes
from pfedsam.storage.site_model import read, write

#: Value of a voxel that nobody has outlined, in `open_federation`.
UNKNOWN_HERE = 254


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phantom sites."""
    folder = tmp_path_factory.mktemp("federation") / "phantom"
    write_phantom(folder, sites=2, cases=6, shape=(48, 48, 8))
    return folder


@pytest.fixture(scope="session")
def open_federation(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two sites, each with a case without a label, and a label that is known in part."""
    data = tmp_path_factory.mktemp("open") / "phantom"
    shutil.copytree(federation, data)
    for number, site in enumerate(data / name for name in site_names(data)):
        first, second = sorted((site / "images").iterdir())[:2]
        volume = nib.load(first)
        noise = np.random.default_rng(number).normal(size=volume.shape)
        values = (np.asarray(volume.dataobj) * (1 + 0.1 * noise)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, volume.affine), site / "images" / "without-outline.nii.gz")
        write_datalist(site)
        label = nib.load(site / "labels" / second.name)
        known = np.asarray(label.dataobj).astype(np.uint8)
        known[:, : known.shape[1] // 2] = UNKNOWN_HERE
        nib.save(nib.Nifti1Image(known, label.affine), site / "labels" / second.name)
        content = json.loads((site / "datalist.json").read_text())
        (site / "datalist.json").write_text(json.dumps({**content, "unknown": UNKNOWN_HERE}))
    return data


def curious_job() -> Job:
    """The job, whose shared phase learns from voxels without a label and against restyled slices, too.

    And whose sites send the one number more that a strategy can ask for.
    """
    job = Job()
    (phase,) = (one for one in job.plan["strategy"]["phases"] if one["name"] == "global")
    phase |= {"pseudo": {"warmup_rounds": 0}, "smooth": {}, "adversary": {}}
    job.plan["strategy"]["weights"] = "gaa"
    return job


@pytest.fixture(scope="session")
def clean_run(open_federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One round of two sites, with everything on: aggregation, final phase, evaluation, TensorBoard."""
    return simulate(tmp_path_factory.mktemp("clean"), curious_job(), open_federation, forked=False)


@pytest.fixture(scope="session")
def resumed_run(clean_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Round 1 of the same federation, from the global model of the first run, with a canary in each site's state."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(clean_run.state_root, folder / "kept")
    for number, site in enumerate(("site-1", "site-2")):
        plant_canary(clean_run.state_folder(site), folder / "kept", number)
    job = curious_job()
    job.server["start_round"] = 1
    job.custom["start.safetensors"] = clean_run.global_model.read_bytes()
    component(job.server, "persistor")["args"]["source_ckpt_file_full_name"] = "start.safetensors"
    return simulate(folder, job, clean_run.data)


def plant_canary(source: Path, state_root: Path, number: int) -> None:
    """Put the canary into the first `up_bias` of a copied state."""
    target = state_root / FEDERATION / source.parent.name / source.name
    (target / "previous.safetensors").unlink()
    model = read(source / "state.safetensors")
    name = min(name for name in model.personal if name.endswith("up_bias"))
    bias = model.personal[name].numpy()
    bias[...] = canary_of(number).reshape(bias.shape)
    write(target / "state.safetensors", model)


@pytest.fixture(scope="session")
def troubled_run(clean_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sites with a trouble each (see `TROUBLES`); two of them with a state of an earlier run."""
    folder = tmp_path_factory.mktemp("troubled")
    names = list(TROUBLES)
    data = folder / "data"
    for name in names:
        shutil.copytree(clean_run.data / "site-1", data / name)
        if name in ("site-3", "site-7"):
            source = clean_run.state_folder("site-1")
            shutil.copytree(source, folder / "kept" / FEDERATION / name / source.name)
    job = Job(sites=len(names))
    job.server["min_clients"] = 1
    job.server["workflows"][0]["args"]["wait_time_after_min_received"] = 120
    _out_of_range(sorted((data / "site-1" / "labels").iterdir())[0])
    sorted((data / "site-2" / "images").iterdir())[0].write_bytes(b"this is no image")
    job.site_plan("site-4")["strategy"]["phases"][0]["name"] = "{$TEST_SECRET}"
    job.site_plan("site-5")["strategy"]["phases"][0]["learnin_rate"] = 0.1
    job.site_plan("site-6")["overrides"]["lora_rank"] = 2
    rates = dict.fromkeys(("lora_a", "lora_b", "decoder_subset", "experts"), 1000)
    for phase in job.site_plan("site-7")["strategy"]["phases"]:
        phase |= {"learning_rate": 10, "rates": rates, "epochs": 3}
    (state,) = (folder / "kept" / FEDERATION / "site-3").iterdir()
    with FileLock(state / "lock"):
        return simulate(folder, job, data, environment={"TEST_SECRET": SECRET})


def _out_of_range(label: Path) -> None:
    image = nib.load(label)
    values = np.asarray(image.dataobj).astype(np.uint8)
    values[0, 0, 0] = 9
    nib.save(nib.Nifti1Image(values, image.affine), label)


@pytest.fixture(scope="session")
def leaking_run(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four rounds of leaky sites (see `LEAKS`), an honest one, and site-5: the real learner without the filter."""
    folder = tmp_path_factory.mktemp("leaking")
    data = folder / "data"
    # every site trains on data of its own, so that its experts are like no other's
    sources = {"site-1": (1, 1), "site-2": (2, 2), "site-3": (1, 2), "site-4": (2, 1), "site-5": (1, 1)}
    for name, (first, second) in sources.items():
        _mixed(federation / f"site-{first}", federation / f"site-{second}", data / name)
    job = Job(sites=len(sources))
    job.server["num_rounds"], job.server["min_clients"] = 4, 1
    job.server["workflows"] = job.server["workflows"][:1]
    job.server["workflows"][0]["args"]["wait_time_after_min_received"] = 120
    for name, leaks in LEAKS.items():
        client = job.site(name)
        component(client, "learner")["path"] = "leaky.LeakyLearner"
        executor = client["executors"][0]["executor"]
        executor["path"], executor["args"] = "leaky.LeakyExecutor", {"learner_id": "learner", "leaks": leaks}
    job.site("site-1")["task_result_filters"] = job.site("site-5")["task_result_filters"] = []
    job.site("site-2")["task_result_filters"][0]["tasks"] = ["training"]
    return simulate(folder, job, data)


def _mixed(first: Path, second: Path, out: Path) -> None:
    """A site folder with the first half of one site's cases and the second half of another's."""
    for kind in ("images", "labels"):
        (out / kind).mkdir(parents=True)
        for number, (one, other) in enumerate(
            zip(*(sorted((p / kind).iterdir()) for p in (first, second)), strict=True)
        ):
            source = one if number < 3 else other
            shutil.copyfile(source, out / kind / source.name)
    write_datalist(out)


@pytest.fixture(scope="session")
def locked_run(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The locked form, where the classes were listed by what an administrator calls once, `pfedsam job allow`."""
    folder = tmp_path_factory.mktemp("locked")
    _, added = allow_classes(SOURCE, folder / "ws")
    assert tuple(added) == LOCKED_CLASSES
    return simulate(folder, Job(recorded=False), federation, locked=True)


@pytest.fixture(scope="session")
def one_thread_run(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One thread for two sites: NVFlare starts a process, and builds the learner anew, for every single task."""
    return simulate(tmp_path_factory.mktemp("one_thread"), Job(recorded=False), federation, threads=1)


@pytest.fixture(scope="session")
def refused_run(federation: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The locked form where nobody lists our classes."""
    return simulate(tmp_path_factory.mktemp("refused"), Job(recorded=False), federation, locked=True)
