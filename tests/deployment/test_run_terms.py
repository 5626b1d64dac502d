"""What decides a run's result is kept with it, and what differs is told in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfedsam.data.phantom import write_phantom
from pfedsam.data.splitting import write_datalist
from pfedsam.deployment import run_terms
from pfedsam.deployment.job_files import find_job, plan_settings
from pfedsam.deployment.job_terms import job_terms
from pfedsam.deployment.jobs import make_job
from pfedsam.deployment.run_terms import differences, keep_terms, kept_terms, require_same, terms_of, with_data
from pfedsam.errors import PFedSAMError
from pfedsam.storage.job_plan import SERVER

SETTINGS = {"backbone": "vit_test", "image_size": 64}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terms") / "data"
    write_phantom(folder, sites=2, cases=6, shape=(16, 16, 4))
    return folder


def content(data: Path, kept: Any = None, job: Path | None = None, **plan: Any) -> dict[str, Any]:
    job = job or find_job("pfedsam")
    told = {**plan_settings(job), "federation": "one", "overrides": SETTINGS, **plan}
    sites = {path.name: path for path in sorted(data.glob("site-*"))}
    return with_data(terms_of(told, job_terms(job)), sites, kept)


def test_what_was_kept_is_found_again_and_the_same(phantom: Path, tmp_path: Path) -> None:
    assert kept_terms(tmp_path) is None
    first = content(phantom)
    keep_terms(tmp_path, first)
    again = content(phantom, kept_terms(tmp_path))
    assert again["digest"] == first["digest"] and again["files"] == first["files"]
    require_same("the run", kept_terms(tmp_path), again["terms"], "")


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ({"overrides": {**SETTINGS, "image_size": 96}}, "setting image_size: 64 then, 96 now"),
        ({"overrides": {**SETTINGS, "experts": 2}}, "setting experts: 4 then, 2 now"),
        ({"overrides": {**SETTINGS, "batch_size": 3}}, "setting batch_size"),
        ({"federation": "two"}, 'federation: "one" then, "two" now'),
        ({"bundle": "prostate_mri"}, 'bundle: "brain_lesion_mri" then, "prostate_mri" now'),
        ({"strategy": {**plan_settings(find_job("pfedsam"))["strategy"], "validate_every": 7}}, "validate_every"),
    ],
)
def test_another_plan_is_told_by_its_key(plan: dict[str, Any], told: str, phantom: Path) -> None:
    found = differences(content(phantom)["terms"], content(phantom, **plan)["terms"])
    assert any(told in one for one in found), found


def test_another_seed_is_another_split(phantom: Path) -> None:
    other = content(phantom, overrides={**SETTINGS, "seed": 1})
    found = differences(content(phantom)["terms"], other["terms"])
    assert "setting seed: 0 then, 1 now" in found
    for site in ("site-1", "site-2"):
        assert any(one.startswith(f"{site}: ") and "in another section of the split" in one for one in found)


def test_memory_and_the_place_of_the_weights_change_nothing(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(phantom)["terms"]
    assert differences(before, content(phantom, overrides={**SETTINGS, "cache_limit_gb": 9})["terms"]) == []
    copy = shutil.copytree(phantom, tmp_path / "elsewhere")
    assert differences(before, content(copy)["terms"]) == []


def test_other_base_weights_are_told(phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFEDSAM_CHECKPOINT", str(tmp_path / "own.pth"))
    weighty = {**SETTINGS, "backbone": "lite_medsam"}
    (tmp_path / "own.pth").write_bytes(b"one")
    before = content(phantom, overrides=weighty)["terms"]
    (tmp_path / "own.pth").write_bytes(b"other")
    assert differences(before, content(phantom, overrides=weighty)["terms"]) == ["the base weights have changed"]


def drop(site: Path) -> None:
    for kind in ("images", "labels"):
        sorted((site / kind).iterdir())[0].unlink()


def add(site: Path) -> None:
    for kind in ("images", "labels"):
        shutil.copy(sorted((site / kind).iterdir())[0], site / kind / "new-case.nii.gz")


def change(site: Path) -> None:
    label = sorted((site / "labels").iterdir())[0]
    label.write_bytes(label.read_bytes() + b"\0")


def move(site: Path) -> None:
    names = sorted(path.name.split(".")[0] for path in (site / "images").iterdir())
    listed = {"training": names[:4], "validation": names[4:5], "test": names[5:]}
    (site / "datalist.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (drop, "site-2: 1 case(s) are gone (s2-case-01)"),
        (add, "site-2: 1 case(s) are new (new-case)"),
        (change, "site-2: 1 case(s) have another image or label (s2-case-01)"),
        (move, "are in another section of the split"),
        (shutil.rmtree, "site-2 took part then"),
    ],
)
def test_other_data_are_told_by_site_and_case(
    act: Callable[[Path], None], told: str, phantom: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(phantom, tmp_path / "data")
    before = content(data)
    act(data / "site-2")
    if act in (drop, add):
        write_datalist(data / "site-2")
    found = differences(before["terms"], content(data, before)["terms"])
    assert any(told in one for one in found), found
    assert not any("site-1" in one for one in found)


def test_a_file_that_did_not_change_is_not_read_again(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(phantom, tmp_path / "data")
    before = content(data)
    read: list[str] = []
    hashed = run_terms.content_hash
    monkeypatch.setattr(run_terms, "content_hash", lambda path: (read.append(path.name), hashed(path))[1])
    assert content(data, before)["digest"] == before["digest"] and read == []
    label = sorted((data / "site-1" / "labels").iterdir())[0]
    os.utime(label, (1, 1))  # of another time, with the same content
    assert content(data, before)["digest"] == before["digest"] and read == [label.name]


def test_another_aggregator_is_told_and_another_patience_is_not(phantom: Path, tmp_path: Path) -> None:
    job = make_job("pfedsam", tmp_path / "job")
    before = content(phantom, job=job)["terms"]
    file = job / "app" / "config" / SERVER
    config = json.loads(file.read_text())
    config |= {"num_rounds": 9, "min_clients": 2, "validation_timeout": 1, "final_phase_timeout": 1}
    config["workflows"][0]["args"]["wait_time_after_min_received"] = 99
    file.write_text(json.dumps(config))
    assert differences(before, content(phantom, job=job)["terms"]) == []
    next(one for one in config["components"] if one["id"] == "aggregator")["path"] = "another.Aggregator"
    file.write_text(json.dumps(config))
    (told,) = differences(before, content(phantom, job=job)["terms"])
    assert told.startswith("job server.components.aggregator.path: ") and "another.Aggregator" in told


def test_a_run_without_terms_is_of_an_earlier_version(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E25.*earlier version.*--fresh"):
        require_same("the run", kept_terms(tmp_path), content(phantom)["terms"], "Give --fresh.")


def test_many_differences_are_counted(phantom: Path) -> None:
    kept = content(phantom)
    other = {
        "overrides": {**SETTINGS, "seed": 1, "image_size": 96, "experts": 2, "lora_rank": 2},
        "bundle": "prostate_mri",
        "federation": "two",
    }
    with pytest.raises(PFedSAMError, match=r"E25.*; and \d+ more\."):
        require_same("the run", kept, content(phantom, **other)["terms"], "")
