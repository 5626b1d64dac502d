"""Nothing personal reaches the server, by value: a recorder at the server keeps all that arrives in real runs."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from recorder import Item, Needles, personal_arrays, texts_in, words_in
from scenarios import LEAKS, SECRET, TROUBLES, canary_of
from simulated import BUNDLE, INTERPOLATION, TINY, Run, component

from pfedsam.errors import code_of_reply
from pfedsam.federated.boundary import GAP_KEY, METRICS
from pfedsam.federated.scalars import LISTED
from pfedsam.storage.site_model import read
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.site import SiteTrainer

RUNS = ("clean_run", "resumed_run", "troubled_run")
SITES = ("site-1", "site-2")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Run:
    return request.getfixturevalue(request.param)


# ---- the recorder itself ------------------------------------------------------------------------------------------


def test_the_search_finds_every_window_at_any_offset() -> None:
    array = np.random.default_rng(0).normal(size=256).astype(np.float32)
    wanted = Needles.of([array])
    assert len(wanted) > 64
    for offset in range(9):
        assert len(wanted.in_(b"x" * offset + array.tobytes() + b"tail")) == 64
    assert not wanted.in_(np.random.default_rng(1).bytes(100_000))
    assert not wanted.in_(b"")


@pytest.mark.parametrize("form", ["halves", "doubles", "hexadecimal", "list"])
def test_the_search_finds_other_forms_of_the_values(form: str) -> None:
    import msgpack

    array = np.random.default_rng(0).normal(size=64).astype(np.float32)
    data = {
        "halves": array.astype(np.float16).tobytes(),
        "doubles": array.astype(np.float64).tobytes(),
        "hexadecimal": array.tobytes().hex().encode(),
        "list": msgpack.packb(array.tolist()),
    }[form]
    assert Needles.of([array]).in_(data)


def test_constants_are_no_needles() -> None:
    assert not len(Needles.of([np.zeros(64, np.float32), np.full(64, 0.1, np.float32), np.arange(64)]))


@pytest.mark.parametrize("run", ["clean_run", "resumed_run"], indirect=True)
def test_the_recorder_sees_what_may_pass(run: Run) -> None:
    for site in SITES:
        (result,) = run.results(site)
        sent = [value for _, value in result.leaves if isinstance(value, np.ndarray)]
        shared = Needles.of(sent, forms=False)
        # the values that do travel are found in the frames: the recorder is not blind
        assert len(shared) > 100
        assert len(shared.in_(run.frames)) > 0.95 * len(shared)
        assert b"val_dice_global" in run.frames, "events do not pass the filters and must be seen"
        assert len(run.results(site, "configure")) == 1
        assert run.results(site, "validate")
    assert {one.kind for one in run.items} >= {"result", "fed.analytix_log_stats"}


@pytest.mark.parametrize("run", ["clean_run", "resumed_run"], indirect=True)
def test_every_personal_tensor_is_searched_for(run: Run) -> None:
    assert np.frexp(INTERPOLATION)[0] == 0.5, "a power of two, see Run.needles"
    for site in SITES:
        arrays = personal_arrays(run.state_folder(site) / "state.safetensors")
        assert {name.partition("/")[0] for name in arrays} == {"personal", "moments"}
        for name, array in arrays.items():
            assert array.size == 1 or len(Needles.of([array])), f"{name} gives nothing to look for"
        assert len(list((run.folder / "states" / site).iterdir())) >= 2, "a state after each task"


# ---- the real learner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["clean_run", "resumed_run"], indirect=True)
@pytest.mark.parametrize("site", SITES)
def test_no_personal_value_reaches_the_server(run: Run, site: str) -> None:
    wanted = run.needles(site)
    assert len(wanted) > 10_000
    assert run.found(wanted) == []


@pytest.mark.parametrize("run", ["clean_run", "resumed_run"], indirect=True)
@pytest.mark.parametrize("site", SITES)
def test_no_voxel_of_any_case_reaches_the_server_with_a_label_or_without(run: Run, site: str, tmp_path: Path) -> None:
    assert "of the voxels without a label got one" in run.site_log(site), "the site has learnt from such cases"
    images = sorted((run.data / site / "images").iterdir())
    assert "without-outline.nii.gz" in {path.name for path in images}
    local = SiteTrainer(BUNDLE, run.data / site, find_strategy("pseudo_labels").checked(), TINY, tmp_path)
    local.open()
    assert len(local.unlabelled_cases) == 1
    data = local.trainer.data_loader.dataset
    prepared = [data[item]["image"].numpy() for item in range(len(data))]
    raw = [np.asarray(nib.load(path).dataobj, np.float32) for path in images]
    assert all(len(Needles.of([values])) > 1000 for values in (*raw, *prepared))
    assert run.found(Needles.of([*raw, *prepared])) == []


@pytest.mark.parametrize("number", [0, 1])
def test_no_canary_reaches_the_server(resumed_run: Run, number: int) -> None:
    site = SITES[number]
    model = read(resumed_run.state_folder(site) / "state.safetensors")
    name = min(name for name in model.personal if name.endswith("up_bias"))
    # the site did go on from the planted values: training moved them, but not far; then they were interpolated
    assert np.abs(model.personal[name].numpy().ravel() / INTERPOLATION - canary_of(number)).max() < 0.5
    wanted = Needles.of([canary_of(number), canary_of(number) * np.float32(INTERPOLATION)])
    assert len(wanted) > 64
    assert resumed_run.found(wanted) == []


@pytest.mark.parametrize("run", ["clean_run", "resumed_run"], indirect=True)
def test_a_result_holds_shared_tensors_and_listed_values_only(run: Run) -> None:
    for one in run.items:
        if one.kind != "result":
            continue
        arrays = {where.split("/")[-1] for where, value in one.leaves if isinstance(value, np.ndarray)}
        assert not any("experts" in name for name in arrays)
        assert bool(arrays) == (one.task == "train")
        gaps = [value for where, value in one.leaves if where.endswith(f"/{GAP_KEY}")]
        assert len(gaps) == (one.task == "train") and all(type(gap) is float and 0 < gap <= 1 for gap in gaps)
        metrics = {where.split("/")[-1] for where, _ in one.leaves if "/initial_metrics/" in where}
        if one.task == "validate":
            metrics = {where.split("/")[-1] for where, _ in one.leaves if where.startswith("/DXO/data/")}
            assert "val_dice" in metrics
        assert metrics <= set(METRICS)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_scalars_have_listed_tags_and_numbers(run: Run) -> None:
    events = [one for one in run.items if one.kind != "result"]
    assert {one.kind for one in events} <= {"fed.analytix_log_stats"}
    tags = [value for one in events for where, value in one.leaves if where.endswith("/track_key")]
    assert len(tags) == len(events)
    assert all(LISTED.fullmatch(tag) for tag in tags)
    values = [value for one in events for where, value in one.leaves if where.endswith("/track_value")]
    assert len(values) == len(events)
    assert all(isinstance(value, float) for value in values)


def private_texts(run: Run) -> list[str]:
    """Case names, and every folder that only a site knows.

    The workspace is not among them as such: in a simulation the server's folder lies beside those of the sites, and its
    own log names its own files. The folders of the sites in it are.
    """
    cases = {path.name.split(".")[0] for path in run.data.glob("*/*/*.nii.gz")}
    assert len(cases) >= 6
    folders = [run.data, run.state_root, run.home, *(run.workspace / site.name for site in run.data.glob("site-*"))]
    return [*sorted(cases), *map(str, folders), "safetensors.", "nii.gz"]


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_no_case_name_and_no_path_of_a_site_reaches_the_server(run: Run) -> None:
    for where, data in run.everything.items():
        assert texts_in(private_texts(run), data) == [], where


def test_no_variable_of_a_site_reaches_the_server(troubled_run: Run) -> None:
    """site-4 was sent a job that names one where NVFlare fills it in."""
    for where, data in troubled_run.everything.items():
        assert texts_in([SECRET], data) == [], where


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_no_traceback_reaches_the_server(run: Run) -> None:
    for where, data in run.everything.items():
        assert texts_in(["Traceback", 'File "/'], data) == [], where


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_no_host_name_reaches_the_server(run: Run) -> None:
    """In what the sites sent: the server's TensorBoard files bear the server's own name, which is the same here."""
    host = socket.gethostname()
    assert words_in(host, [text for one in run.items for text in one.texts()]) == []
    if len(host) >= 6 and host != "localhost":  # a shorter name is found in any bytes
        assert texts_in([host], run.frames) == []


def test_an_error_reaches_the_server_as_its_code_only(troubled_run: Run) -> None:
    for site, (_, code) in TROUBLES.items():
        assert [one.return_code for one in troubled_run.results(site)] == [f"SITE_REFUSED:{code}"]
        sentences = set(re.findall(rf"{code}: (.+)", troubled_run.site_log(site)))
        assert sentences, f"{site} does not say in its own log what is wrong"
        for where, data in troubled_run.everything.items():
            assert texts_in([*sentences, *(one[:40] for one in sentences)], data) == [], where


# ---- a site that wants to leak ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(leaking_run: Run) -> dict[str, Needles]:
    """Windows that belong to one site alone: an expert that was not trained yet is the same at all sites."""
    sites = (*LEAKS, "site-4")
    return {
        site: leaking_run.needles(site) - [leaking_run.needles(other) for other in sites if other != site]
        for site in sites
    }


def leaked(run: Run, site: str, number: int) -> Item:
    (result,) = (one for one in run.results(site) if one.number == number)
    return result


UNFILTERED = [(site, number, LEAKS[site][number]) for site in ("site-1", "site-2") for number in range(4)]


@pytest.mark.parametrize(("site", "number", "way"), UNFILTERED, ids=[f"{site}-{way}" for site, _, way in UNFILTERED])
def test_the_recorder_turns_red_without_the_filter(
    leaking_run: Run, own: dict[str, Needles], site: str, number: int, way: str
) -> None:
    """site-1 has no filter, site-2 one whose `tasks` are wrong."""
    found = own[site].in_(leaked(leaking_run, site, number).blob())
    assert found, f"the recorder does not see a leak by {way}"
    if way != "listed":  # the blob has the doubles of a list side by side, the frames as MessagePack writes them
        assert Needles(found).in_(leaking_run.frames)


@pytest.mark.parametrize("number", range(4), ids=LEAKS["site-3"])
def test_the_filter_stops_the_leak(leaking_run: Run, own: dict[str, Needles], number: int) -> None:
    assert len(own["site-3"]) > 10_000
    result = leaked(leaking_run, "site-3", number)
    assert not own["site-3"].in_(result.blob())
    assert not any("notes" in where for where, _ in result.leaves)
    refused = LEAKS["site-3"][number] in ("raw", "name")
    assert result.return_code == ("SITE_REFUSED:E19" if refused else "OK")
    assert leaking_run.sent("site-3")[number]["reply"] == result.return_code


def test_nothing_of_a_filtered_site_is_in_any_frame_or_file(leaking_run: Run, own: dict[str, Needles]) -> None:
    for site in ("site-3", "site-4"):
        assert leaking_run.found(own[site]) == []


def test_the_guard_keeps_the_leaks_off_the_servers_disk(leaking_run: Run, own: dict[str, Needles]) -> None:
    for site in ("site-1", "site-2"):
        for name, data in leaking_run.server_files.items():
            assert not own[site].in_(data), name


def test_the_guard_refuses_what_it_cannot_rebuild(leaking_run: Run) -> None:
    by_site = {site: [one for one in leaking_run.received() if one["client"] == site] for site in LEAKS}
    # hidden beside good tensors: the tensors are rebuilt and the rest is dropped; else refused
    assert [one["accepted"] for one in by_site["site-1"]] == [True, True, False, True]
    assert [one["accepted"] for one in by_site["site-2"]] == [False, False, True, False]
    assert by_site["site-2"][2]["reply"] == "EXECUTION_EXCEPTION", "the text of the return code is dropped"
    assert {one["code"] for one in by_site["site-1"] + by_site["site-2"] if not one["accepted"]} == {"E20"}


def test_the_real_learner_refuses_to_train_without_the_filter(leaking_run: Run) -> None:
    assert {one.return_code for one in leaking_run.results("site-5")} == {"SITE_REFUSED:E15"}
    log = leaking_run.site_log("site-5")
    assert "E15: the first outgoing filter of task 'train' is not pfedsam.federated.filters.PersonalisedFilter" in log
    assert "steps, mean loss" not in log, "it trained"
    assert not (leaking_run.state_root / "phantom-demo" / "site-5").exists()
    assert "SITE_REFUSED:E15" in leaking_run.server_log()
    assert code_of_reply("SITE_REFUSED:E15") == "E15"


def test_the_checked_in_job_names_every_task_of_its_filters() -> None:
    """A filter without the right `tasks` is silently never applied (see site-2 above)."""
    from simulated import Job

    job = Job()
    (executor,) = job.client["executors"]
    (ours,) = job.client["task_result_filters"]
    (guard,) = job.server["task_result_filters"]
    assert set(ours["tasks"]) == set(executor["tasks"]) == set(guard["tasks"])
    assert component(job.client, "learner")["path"] == "pfedsam.federated.learner.PFedSAMLearner"


def test_the_recording_lies_outside_the_workspace(clean_run: Run) -> None:
    assert Path(clean_run.folder / "record") not in clean_run.workspace.parents
    assert not list(clean_run.workspace.rglob("frames.bin"))
