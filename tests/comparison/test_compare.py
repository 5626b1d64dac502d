"""`pfedsam compare`: what is done is kept, what was killed goes on, what fails is named."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from leftovers import left_of

from pfedsam import bundles
from pfedsam.bundles import network_of
from pfedsam.comparison.compare import Comparison, read_records
from pfedsam.comparison.execute import execute, run_card
from pfedsam.comparison.provenance import case_hash, code_version
from pfedsam.comparison.run import Run
from pfedsam.comparison.unseen import case_counts
from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.nvflare_runner import run_simulated
from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.site import Ensemble
from pfedsam.files import append_line
from pfedsam.networks.weights import file_of
from pfedsam.storage.site_model import SiteModel, read, write
from pfedsam.training.federation import run_federation
from pfedsam.training.site import SiteTrainer

SETTINGS = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "positives_per_case": 2, "negatives_per_case": 1}
SITES = ("site-1", "site-2")
ROUNDS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "data"
    write_phantom(folder, sites=2, cases=6, shape=(32, 32, 6))
    return folder


def command(data: Path, out: Path, strategies: str = "fedavg_lora,pfedsam", *more: str) -> list[str]:
    pairs = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    options = ["--strategies", strategies, "--rounds", str(ROUNDS), "--workers", "2", "--validate-every", "1", *more]
    return [sys.executable, "-m", "pfedsam.cli", "compare", str(data), "--out", str(out), *options, *pairs]


def run(data: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(data, out, *more), capture_output=True, text=True, timeout=400)


def stopped(data: Path, out: Path, by: signal.Signals, early: bool = False) -> subprocess.CompletedProcess[str]:
    """Start a comparison and stop it: in its second round or later, or `early`, when it has just started a worker.

    Also sees that nothing of it is left: at once, or, where it could not see to it itself, within seconds.
    """
    out.mkdir(parents=True, exist_ok=True)
    said = out.with_name(f"{out.name}.txt")
    with said.open("w") as file:
        process = subprocess.Popen(
            command(data, out),
            stdout=file,
            stderr=subprocess.STDOUT,
            # a shell without job control leaves Ctrl-C ignored in what it starts in the background
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    above = psutil.Process(process.pid)
    limit = time.monotonic() + 300
    try:
        while not (_workers(above) if early else list(out.glob("rounds/*/global.safetensors"))):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < limit
            time.sleep(0.05)
        below = above.children(recursive=True)
    finally:
        process.send_signal(by)
        code = process.wait(60)
    assert left_of(below, 20 if by == signal.SIGKILL else 2) == []
    return subprocess.CompletedProcess(process.args, code, said.read_text())


def _workers(process: psutil.Process) -> list[psutil.Process]:
    return [one for one in process.children() if any("spawn_main" in word for word in one.cmdline())]


@pytest.fixture(scope="module")
def killed_and_resumed(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A comparison that was killed, then started again; and what was there at the kill."""
    out = tmp_path_factory.mktemp("killed")
    stopped(data, out, signal.SIGKILL)
    before = {path.parent.name: path.read_bytes() for path in out.glob("rounds/*/history.jsonl")}
    done = run(data, out)
    return out, before, done


def test_a_killed_comparison_goes_on_with_the_next_round(killed_and_resumed) -> None:
    out, before, done = killed_and_resumed
    assert done.returncode == 0, done.stdout + done.stderr
    records = {record["strategy"]: record for record in read_records(out / "runs.jsonl")}
    assert set(records) == {"fedavg_lora", "pfedsam"}
    # also without the default strategy among them one is what the others are tested against
    assert "pfedsam against each other" in " ".join(done.stdout.split())
    assert before
    for key, text in before.items():
        # what was noted before the kill is still there: nothing began anew
        assert (out / "rounds" / key / "history.jsonl").read_bytes().startswith(text)
    for record in records.values():
        assert [(n["round"], n["site"]) for n in record["history"]] == [
            (number, site) for number in range(ROUNDS + 1) for site in SITES
        ]


@pytest.mark.slow
def test_ctrl_c_ends_all_its_processes_at_once_and_keeps_what_was_done(data: Path, tmp_path: Path) -> None:
    assert stopped(data, tmp_path, signal.SIGINT).returncode == 128 + signal.SIGINT
    (notes,) = tmp_path.glob("rounds/*/history.jsonl")
    before = notes.read_bytes()
    time.sleep(3)
    assert notes.read_bytes() == before, "a worker went on"
    (lock,) = tmp_path.glob("rounds/*/lock")
    with FileLock(lock, timeout=0):
        pass
    done = run(data, tmp_path, "fedavg_lora")
    assert done.returncode == 0, done.stderr
    assert notes.read_bytes().startswith(before)
    assert [one["strategy"] for one in read_records(tmp_path / "runs.jsonl")] == ["fedavg_lora"]


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def test_workers_that_only_begin_end_with_what_has_started_them(by: signal.Signals, data: Path, tmp_path: Path) -> None:
    stopped(data, tmp_path / "out", by, early=True)


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda one: one.name)
def test_every_signal_ends_a_comparison_and_its_last_line_says_how_to_go_on(
    by: signal.Signals, data: Path, tmp_path: Path
) -> None:
    done = stopped(data, tmp_path / "out", by)
    assert done.returncode == 128 + by
    last = done.stdout.splitlines()[-1]
    assert last == f"stopped by {by.name}. To go on: {shlex.join(['pfedsam', *command(data, tmp_path / 'out')[3:]])}"
    assert "Traceback" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def test_the_simulator_of_a_comparison_ends_with_it(by: signal.Signals, data: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(data, tmp_path, "pfedsam", "--nvflare"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    above = psutil.Process(process.pid)
    limit = time.monotonic() + 300
    while not (sites := [one for one in above.children(recursive=True) if "simulator_worker".startswith(one.name())]):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.2)
    below = above.children(recursive=True)
    assert set(sites) <= set(below)
    process.send_signal(by)
    process.wait(60)
    assert left_of(below, 20 if by == signal.SIGKILL else 2) == []


@pytest.mark.slow
def test_it_gives_the_numbers_of_a_run_that_was_not_killed(killed_and_resumed, data: Path, tmp_path: Path) -> None:
    out, *_ = killed_and_resumed
    whole = run(data, tmp_path, "pfedsam")
    assert whole.returncode == 0, whole.stderr
    (wanted,) = read_records(tmp_path / "runs.jsonl")
    (got,) = [one for one in read_records(out / "runs.jsonl") if one["strategy"] == "pfedsam"]
    assert got["key"] == wanted["key"]
    for mine, theirs in zip(got["cases"], wanted["cases"], strict=True):
        assert mine["case"] == theirs["case"]
        assert mine["dice"] == pytest.approx(theirs["dice"], abs=1e-5)


def test_what_is_done_is_not_done_again(killed_and_resumed, data: Path) -> None:
    out, *_ = killed_and_resumed
    records = (out / "runs.jsonl").read_bytes()
    again = run(data, out)
    assert again.returncode == 0
    assert "2 runs, 2 done before" in again.stdout
    assert (out / "runs.jsonl").read_bytes() == records
    assert "Strategies on the test cases" in again.stdout
    assert "Missing" not in (out / "tables.md").read_text()


def test_records_alone_are_enough_for_the_tables(killed_and_resumed, data: Path, tmp_path: Path) -> None:
    out, *_ = killed_and_resumed
    told = ("fedavg_lora,pfedsam,fedprox", "--table", "--records", str(out / "runs.jsonl"))
    shown = run(data, tmp_path / "new", *told)
    assert shown.returncode == 0, shown.stderr
    assert "3 runs, 2 done before" in shown.stdout and "fedprox, seed 0" in shown.stdout
    assert "Missing: fedprox, seed 0" in (tmp_path / "new" / "tables.md").read_text()
    assert not (tmp_path / "new" / "trainings").exists()


def test_another_setting_is_another_run(data: Path, tmp_path: Path) -> None:
    common = {"data": str(data), "sites": SITES, "bundle": "brain_lesion_mri", "strategy": "pfedsam", "rounds": 2}
    base = Run(**common, seed=0, overrides=SETTINGS)
    others = [
        Run(**common, seed=1, overrides=SETTINGS),
        Run(**common, seed=0, overrides={**SETTINGS, "image_size": 48}),
        Run(**{**common, "rounds": 3}, seed=0, overrides=SETTINGS),
        Run(**{**common, "strategy": "feddpa"}, seed=0, overrides=SETTINGS),
        Run(**common, seed=0, overrides=SETTINGS, held_out="site-1"),
        Run(**common, seed=0, overrides=SETTINGS, simulator=True),
    ]
    assert len({one.key() for one in (base, *others)}) == 7
    same = Run(**common, seed=0, overrides={**SETTINGS, "val_batch_size": 2})
    assert same.key() == base.key()
    assert Comparison([base], tmp_path).missing() == [base]


def test_ensemble_and_local_only_share_their_training(data: Path) -> None:
    keys = [
        Run(str(data), SITES, "brain_lesion_mri", name, 0, 2, dict(SETTINGS))
        for name in ("local_only", "ensemble_local")
    ]
    assert keys[0].training_key() == keys[1].training_key()
    assert keys[0].key() != keys[1].key()


def test_an_ensemble_is_the_mean_of_the_probabilities_of_all_sites(data: Path, tmp_path: Path, monkeypatch) -> None:
    members: list[int] = []

    class Counted(Ensemble):
        def __init__(self, network, models, personal) -> None:
            members.append(len(models))
            super().__init__(network, models, personal)

    monkeypatch.setattr("pfedsam.evaluation.site.Ensemble", Counted)

    def done(name: str) -> dict:
        return execute(Run(str(data), SITES, "brain_lesion_mri", name, 0, 1, dict(SETTINGS)), tmp_path)

    alone, together = done("local_only"), done("ensemble_local")
    assert [row["case"] for row in together["cases"]] == [row["case"] for row in alone["cases"]]
    assert members == [len(SITES)] * len(SITES), "all sites' models at each site, none in local_only"
    assert together["bytes_per_round"] == alone["bytes_per_round"] == 0
    models = [read(path) for path in sorted(tmp_path.glob("trainings/*/models/1/*.safetensors"))]
    assert len(models) == len(SITES)
    network = network_of("brain_lesion_mri", {**SETTINGS, "experts": 0})
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = []
        for model in models:
            model.load_into(network)
            wanted.append(network(images).sigmoid())
        assert not torch.equal(*wanted)
        got = Ensemble(network, models, personal=True)(images).sigmoid()
    torch.testing.assert_close(got, torch.stack(wanted).mean(0), rtol=0, atol=1e-5)


def test_the_pooled_data_are_those_of_all_sites_and_nothing_is_sent(data: Path, tmp_path: Path) -> None:
    record = execute(Run(str(data), SITES, "brain_lesion_mri", "centralised", 0, 1, dict(SETTINGS)), tmp_path)
    (pooled,) = tmp_path.glob("trainings/*/pooled")
    for kind in ("images", "labels"):
        links = {path.name: path.resolve() for path in (pooled / kind).iterdir()}
        assert set(links.values()) == {path.resolve() for site in SITES for path in (data / site / kind).iterdir()}
    listed = json.loads((pooled / "datalist.json").read_text())
    assert {name.split("__")[0] for name in listed["training"]} == set(SITES)
    assert {(row["site"], row["model"]) for row in record["cases"]} == {(site, "personal") for site in SITES}
    assert record["bytes_per_round"] == 0 and record["steps"] > 0


def test_a_record_of_other_defaults_or_inputs_is_named(data: Path, tmp_path: Path, monkeypatch) -> None:
    one = Run(str(data), SITES, "brain_lesion_mri", "local_only", 0, 1, dict(SETTINGS))
    comparison = Comparison([one], tmp_path)

    def noted(card: dict) -> dict[str, list[str]]:
        append_line(comparison.record_file, {"key": one.key(), "card": card})
        return comparison.outdated()

    assert noted({}) == {}, "records from before this was noted"
    assert noted(run_card(one)) == {}
    monkeypatch.setenv("PFEDSAM_CHECKPOINT", str(tmp_path / "weights.pth"))
    assert comparison.outdated() == {}, "where the weights lie is no setting"
    assert noted({**run_card(one), "defaults": "others"}) == {"defaults": ["local_only, seed 0"]}
    assert noted({**run_card(one), "inputs": "others"}) == {"inputs": ["local_only, seed 0"]}
    assert comparison.missing() == []
    assert noted({**run_card(one), "bundle": "another"}) == {"bundle": ["local_only, seed 0"]}
    assert replace(comparison, fresh=True).missing() == [one]
    assert noted(run_card(one)) == {} and replace(comparison, fresh=True).missing() == []


def test_records_of_other_images_are_refused_before_anything_runs_and_named_before_a_table(
    killed_and_resumed, data: Path, tmp_path: Path
) -> None:
    out, *_ = killed_and_resumed
    changed = shutil.copytree(data, tmp_path / "data")
    label = next((changed / "site-2" / "labels").iterdir())
    label.write_bytes(label.read_bytes() + b"\0")
    records = shutil.copy(out / "runs.jsonl", tmp_path / "runs.jsonl")
    before = records.read_bytes()
    told = ("fedavg_lora,pfedsam", "--records", str(records))
    refused = run(changed, tmp_path / "out", *told)
    assert refused.returncode == 1 and refused.stdout == ""
    for words in ("E25", "2 record(s) are of other images, labels", "--fresh", "--records", "--table"):
        assert words in refused.stderr
    assert records.read_bytes() == before and not (tmp_path / "out").exists()
    shown = run(changed, tmp_path / "out", *told, "--table")
    assert shown.returncode == 1
    assert 0 < shown.stdout.find("2 record(s) are of other images") < shown.stdout.find("Strategies on the test cases")
    assert "2 record(s) are of other images" in (tmp_path / "out" / "tables.md").read_text()


def test_other_content_or_weights_are_another_training(data: Path, tmp_path: Path, monkeypatch) -> None:
    def folders(**settings) -> tuple[str, Path, Path]:
        one = Run(str(tmp_path / "data"), SITES, "brain_lesion_mri", "pfedsam", 0, 2, {**SETTINGS, **settings})
        return one.inputs(), one.training_folder(tmp_path), one.shared_folder(tmp_path)

    def differ(one: tuple, other: tuple) -> bool:
        return all(a != b for a, b in zip(one, other, strict=True))

    shutil.copytree(data, tmp_path / "data")
    before = folders()
    assert folders() == before
    label = next((tmp_path / "data" / "site-2" / "labels").iterdir())
    content = label.read_bytes()
    label.write_bytes(content + b"\0")
    assert differ(folders(), before)
    label.write_bytes(content)
    assert folders() == before
    published = folders(backbone="lite_medsam")
    own = tmp_path / "own.pth"
    shutil.copy(file_of("lite_medsam"), own)
    monkeypatch.setenv("PFEDSAM_CHECKPOINT", str(own))
    assert folders(backbone="lite_medsam") == published, "the same weights elsewhere"
    own.write_bytes(b"others")
    assert differ(folders(backbone="lite_medsam"), published)


def test_rounds_of_other_base_weights_are_not_gone_on_with(data: Path, tmp_path: Path) -> None:
    one = Run(str(data), SITES, "brain_lesion_mri", "fedprox", 0, 1, dict(SETTINGS))
    execute(one, tmp_path)
    begun = one.federation(tmp_path).shared_rounds or one.federation(tmp_path)
    # the fingerprint tells base weights and settings of the network apart; here it is the size of the input
    other = replace(begun, rounds=2, overrides={**begun.overrides, "image_size": 64})
    with pytest.raises(PFedSAMError, match="E11"):
        run_federation(other)


def test_runs_that_differ_in_what_is_personal_share_their_rounds(data: Path, tmp_path: Path) -> None:
    def shared(name: str, **changes) -> Path:
        about = {"seed": 0, "rounds": 2, "overrides": dict(SETTINGS), **changes}
        return Run(str(data), SITES, "brain_lesion_mri", name, **about).shared_folder(tmp_path)

    alike = {shared(name) for name in ("pfedsam", "fedavg_lora", "fedavg_lora_ft", "one_adapter", "gate_token")}
    assert len(alike) == 1
    assert shared("all_of_sam_shared") == shared("fedsam")
    # something personal takes part in these rounds, or the rounds are others
    apart = [shared(name) for name in ("feddpa", "local_phase_each_round", "ditto", "fedprox", "local_only")]
    changes = ({"seed": 1}, {"rounds": 3}, {"overrides": {**SETTINGS, "lora_rank": 2}})
    others = [shared("pfedsam", **one) for one in changes]
    assert len({*alike, *apart, *others}) == 1 + len(apart) + len(others)


@pytest.mark.parametrize("name", ["pfedsam", "local_only"])
def test_a_training_of_other_defaults_of_the_bundle_is_not_gone_on_with(
    name: str, data: Path, tmp_path: Path, monkeypatch
) -> None:
    one = Run(str(data), SITES, "brain_lesion_mri", name, 0, 2, dict(SETTINGS))
    before = one.shared_folder(tmp_path), one.training_folder(tmp_path), one.key()
    shutil.copytree(bundles.find_bundle(one.bundle), tmp_path / one.bundle)
    monkeypatch.setattr(bundles, "find_bundle", lambda name: tmp_path / name)
    assert (one.shared_folder(tmp_path), one.training_folder(tmp_path), one.key()) == before
    file = tmp_path / one.bundle / "configs" / "train.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "bottleneck": config["bottleneck"] + 1}))
    assert one.shared_folder(tmp_path) != before[0] and one.training_folder(tmp_path) != before[1]
    assert one.key() == before[2], "its record is kept, and `compare` says of which defaults it is"


def test_a_failing_run_is_named_and_the_others_are_done(data: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    rates = dict.fromkeys(("lora_a", "lora_b", "decoder_subset"), 1000)
    phase = {"name": "train", "trains": ["shared"], "experts": False, "learning_rate": 10, "rates": rates}
    strategy = {"name": "wrong", "shared": ["lora_a", "lora_b", "decoder_subset"], "personal": [], "phases": [phase]}
    wrong.write_text(json.dumps({"description": "Diverges.", "strategy": strategy, "overrides": {"experts": 0}}))
    done = run(data, tmp_path / "out", f"{wrong},fedavg_lora")
    assert done.returncode == 1
    assert "E17" in done.stdout
    assert [one["strategy"] for one in read_records(tmp_path / "out" / "runs.jsonl")] == ["fedavg_lora"]
    assert "missing: 1 run(s)" in done.stdout


@pytest.mark.slow
def test_an_unseen_hospital_is_scored_with_its_global_and_personal_models(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path, "pfedsam", "--unseen")
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(tmp_path / "runs.jsonl")
    assert {one["held_out"] for one in records} == set(SITES)
    for record in records:
        assert {note["site"] for note in record["history"]} == set(SITES) - {record["held_out"]}
        assert {row["site"] for row in record["cases"]} == {record["held_out"]}
        assert {row["model"] for row in record["cases"]} == {"global", "personal_3"}
    assert "Unseen hospital" in done.stdout


def unseen_run(data: Path, strategy: str) -> Run:
    return Run(str(data), SITES, "brain_lesion_mri", strategy, 0, 1, dict(SETTINGS), 1, held_out="site-2")


def test_alone_an_unseen_hospital_trains_through_all_rounds_without_the_others(data: Path, tmp_path: Path) -> None:
    record = execute(unseen_run(data, "local_only"), tmp_path)
    # the site has 3 cases to train on, so no model may be called one of 5
    assert {(row["site"], row["model"]) for row in record["cases"]} == {("site-2", "alone_3")}
    assert [(note["site"], note["round"], note["cases"]) for note in record["history"]] == [
        ("site-2", 0, 3),
        ("site-2", 1, 3),
    ]
    assert all(note["phases"] for note in record["history"])
    assert not list(tmp_path.glob("trainings/*/models/*"))


def test_the_pooled_model_of_the_others_is_the_global_one_of_an_unseen_hospital(data: Path, tmp_path: Path) -> None:
    record = execute(unseen_run(data, "centralised"), tmp_path)
    assert {(row["site"], row["model"]) for row in record["cases"]} == {("site-2", "global")}
    assert {note["site"] for note in record["history"]} == {"pooled"}
    (pooled,) = tmp_path.glob("trainings/*/pooled/images")
    assert {path.name.split("__")[0] for path in pooled.iterdir()} == {"site-1"}


def test_a_federation_has_a_global_and_a_personal_model_for_an_unseen_hospital(data: Path, tmp_path: Path) -> None:
    record = execute(unseen_run(data, "pfedsam"), tmp_path)
    assert {(row["site"], row["model"]) for row in record["cases"]} == {("site-2", "global"), ("site-2", "personal_3")}
    assert {note["site"] for note in record["history"]} == {"site-1"}


@pytest.mark.parametrize("name", ["fedrep", "ditto"])
def test_the_global_model_of_an_unseen_hospital_has_nothing_fitted_there(
    name: str, data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("pfedsam.comparison.unseen.UNSEEN_CASES", (1, 2))
    files: list[tuple[str, SiteModel]] = []
    monkeypatch.setattr(
        "pfedsam.comparison.unseen.write", lambda file, model: (files.append((file.name, model)), write(file, model))
    )
    record = execute(unseen_run(data, name), tmp_path)
    assert {row["model"] for row in record["cases"]} == {"global", "personal_1", "personal_2"}
    (_, first), *fitted = files
    assert not first.info["final"] and len(fitted) == 2
    network = network_of("brain_lesion_mri", first.info["overrides"])
    assert all(tensor.equal(network.state_dict()[tensor_name]) for tensor_name, tensor in first.personal.items())
    assert all(model.info["final"] and model.personal for _, model in fitted)


def test_without_a_final_phase_an_unseen_hospital_has_the_global_model_only(data: Path, tmp_path: Path) -> None:
    record = execute(unseen_run(data, "fedavg_lora"), tmp_path)
    assert {row["model"] for row in record["cases"]} == {"global"}


def test_an_ensemble_has_nothing_for_an_unseen_hospital(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E32.*ensemble_local.*centralised.*local_only"):
        execute(unseen_run(data, "ensemble_local"), tmp_path)
    told = run(data, tmp_path / "out", "pfedsam,ensemble_local", "--unseen")
    assert told.returncode == 1 and "E32" in told.stderr
    assert list(tmp_path.iterdir()) == []  # not even of the strategy that can


def test_a_model_of_some_cases_was_trained_on_no_more(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pfedsam.comparison.unseen.UNSEEN_CASES", (1, 2))
    counted: list[int] = []
    started = SiteTrainer.finish

    def finish(local: SiteTrainer, *args):
        counted.append(len(local.cases))
        return started(local, *args)

    monkeypatch.setattr(SiteTrainer, "finish", finish)
    record = execute(unseen_run(data, "pfedsam"), tmp_path)
    assert {row["model"] for row in record["cases"]} == {"global", "personal_1", "personal_2"}
    assert counted[:-2] and set(counted[:-2]) == {3}, "the other site with all its cases"
    assert counted[-2:] == [1, 2], "then the unseen one"


def test_a_model_of_an_unseen_hospital_has_the_true_number_of_cases() -> None:
    assert [case_counts(n) for n in (3, 5, 12, 40)] == [[3], [5], [5, 10], [5, 10, 20]]


def test_a_record_tells_which_cases_are_of_one_patient(data: Path, tmp_path: Path) -> None:
    site = shutil.copytree(data / "site-1", tmp_path / "data" / "site-1")
    names = sorted(path.name.split(".")[0] for path in (site / "images").iterdir())
    patients = dict(zip(names, ("p", "p", "q", "r", "s", "t"), strict=True))
    listed = {"patients": patients, "training": names[3:5], "validation": names[5:], "test": names[:3]}
    (site / "datalist.json").write_text(json.dumps(listed))
    one = Run(str(site.parent), ("site-1",), "brain_lesion_mri", "local_only", 0, 1, dict(SETTINGS))
    rows = execute(one, tmp_path / "out")["cases"]
    assert {(row["case"], row["patient"]) for row in rows} == {
        (case_hash("site-1", name), case_hash("site-1", patients[name])) for name in names[:3]
    }
    assert len({row["patient"] for row in rows}) == 2


@pytest.mark.slow
def test_nvflare_trains_any_strategy_and_what_needs_no_server_is_trained_here(data: Path, tmp_path: Path) -> None:
    def told(strategy: str) -> dict:
        about = (str(data), SITES, "brain_lesion_mri", strategy, 0, 1, dict(SETTINGS), 1)
        return execute(Run(*about, simulator=True), tmp_path, simulator=run_simulated)

    # an ablation, which has no job of its own
    record = told("aggregation_svd")
    assert record["simulator"]
    assert {row["site"] for row in record["cases"]} == set(SITES)
    assert {row["model"] for row in record["cases"]} == {"global", "personal"}
    assert record["bytes_per_round"] > 0
    assert record["steps"] is record["teacher_passes"] is None
    assert {note["site"]: note["phases"] for note in record["history"]} == dict.fromkeys(SITES)
    alone = told("local_only")
    assert not alone["simulator"]
    assert alone["steps"] > 0 and alone["bytes_per_round"] == 0


def test_only_a_change_of_code_changes_the_version(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(("git", *who, *words), cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    for folder in ("custom", "jobs", "bundles", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("log", "-1", "--format=%h").strip()
    assert code_version(tmp_path) == first
    (tmp_path / "tests" / "file").write_text("a line of results")
    assert code_version(tmp_path) == first
    git("commit", "-qam", "results")
    assert code_version(tmp_path) == first
    (tmp_path / "custom" / "new.py").write_text("1")
    assert code_version(tmp_path) == f"{first}+"
    assert code_version(tmp_path / "nowhere") == ""


def test_records_name_no_case(killed_and_resumed, data: Path) -> None:
    out, *_ = killed_and_resumed
    text = (out / "runs.jsonl").read_text()
    names = [path.name.split(".")[0] for path in data.glob("*/images/*")]
    assert names
    assert not [name for name in names if name in text]
    assert str(data) not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


@pytest.mark.slow
def test_phantom_with_three_strategies(tmp_path: Path) -> None:
    """Bar: on the phantom, 3 strategies and 1 seed finish in under 10 minutes on 2 cores."""
    root = Path(__file__).resolve().parents[2]
    started = time.monotonic()
    names = "local_only,fedavg_lora,pfedsam"
    subprocess.run(
        [sys.executable, "-m", "pfedsam.cli", "phantom", tmp_path / "data", "--cases", "9", "--slices", "12"],
        check=True,
    )
    pairs = ["image_size=64", "batch_size=2", "augmentations=1", "adapted_blocks=1", "positives_per_case=4"]
    options = [word for pair in pairs for word in ("--set", pair)]
    line = [sys.executable, "-m", "pfedsam.cli", "compare", tmp_path / "data", "--out", tmp_path / "out"]
    subprocess.run([*line, "--strategies", names, "--rounds", "4", "--workers", "2", *options], check=True, cwd=root)
    minutes = (time.monotonic() - started) / 60
    print(f"3 strategies on the phantom: {minutes:.1f} minutes")
    assert minutes < 10
    assert len(read_records(tmp_path / "out" / "runs.jsonl")) == 3


@pytest.mark.slow
def test_ctrl_c_ends_the_simulators_processes_too(data: Path, tmp_path: Path) -> None:
    workspace = f"{tmp_path}/trainings"

    def left() -> list[str]:
        found = subprocess.run(("pgrep", "-af", workspace), capture_output=True, text=True).stdout.splitlines()
        return [line for line in found if "nvflare" in line]

    process = subprocess.Popen(
        command(data, tmp_path, "fedavg_lora", "--nvflare"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    limit = time.monotonic() + 300
    try:
        while len(left()) < 3:  # the simulator and its sites
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    limit = time.monotonic() + 30
    while left() and time.monotonic() < limit:
        time.sleep(0.5)
    assert not left()
