"""The server's momentum: the formula, the federation in one process, and what it does not go with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.jobs import export_job, make_job
from pfedsam.errors import PFedSAMError
from pfedsam.storage.job_plan import component_of
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.server_settings import ServerStep
from pfedsam.training.server_step import ServerSteps
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
TINY: dict[str, Any] = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "augmentations": 1, "experts": 0}
ROUND = {"name": "train", "trains": ["shared"], "experts": False, "epochs": 1}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("data")
    write_phantom(root, sites=2, cases=6, shape=(32, 32, 4))
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}


def federation(sites: Mapping[str, Path], out: Path, server: Any, rounds: int = 3) -> Federation:
    settings = {"personal": [], "phases": [ROUND], "server": server, "aggregation": "mean"}
    return Federation("brain_lesion_mri", sites, Strategy.of(settings), out, rounds, TINY)


def theta_of(run: Federation) -> dict[str, torch.Tensor]:
    run_federation(run)
    theta, rounds = run.global_model()
    assert rounds == run.rounds
    return theta


def test_a_step_is_the_change_and_a_part_of_the_steps_before() -> None:
    steps = ServerSteps(ServerStep(momentum=0.5, rate=2.0))
    changes = [torch.tensor([1.0, -4.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    found = [steps.next({"a": change})["a"].tolist() for change in changes]
    assert found == [[2.0, -8.0], [3.0, -4.0], [1.5, 2.0]]


def test_without_momentum_at_rate_1_it_is_the_plain_mean_bit_for_bit(sites: Mapping[str, Path], tmp_path: Path) -> None:
    plain, same = theta_of(federation(sites, tmp_path / "a", None)), theta_of(federation(sites, tmp_path / "b", {}))
    assert all(torch.equal(tensor, same[name]) for name, tensor in plain.items())
    assert not (tmp_path / "a" / "server_step").exists()


def test_momentum_moves_the_model_further_and_a_stop_changes_nothing(sites: Mapping[str, Path], tmp_path: Path) -> None:
    settings = {"momentum": 0.5}
    plain, whole = (theta_of(federation(sites, tmp_path / str(one), one)) for one in (None, settings))
    start = theta_of(federation(sites, tmp_path / "start", {"rate": 1e-12}, rounds=1))
    way = [sum(float((one[name] - start[name]).square().sum()) for name in start) for one in (plain, whole)]
    assert way[1] > 1.2 * way[0]
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 2 * len(sites) + 1:  # in the third round
            raise KeyboardInterrupt

    stopped = federation(sites, tmp_path / "b", settings)
    with pytest.raises(KeyboardInterrupt):
        run_federation(stopped, stop)
    for name, tensor in theta_of(stopped).items():
        # a training that was stopped is equal up to rounding
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-5)


def test_rounds_whose_steps_are_gone_are_not_gone_on_with(sites: Mapping[str, Path], tmp_path: Path) -> None:
    run_federation(federation(sites, tmp_path, {"momentum": 0.5}, rounds=1))
    (kept,) = (tmp_path / "server_step").iterdir()
    kept.unlink()
    with pytest.raises(PFedSAMError, match="E33"):
        run_federation(federation(sites, tmp_path, {"momentum": 0.5}, rounds=2))


@pytest.mark.parametrize(
    "settings",
    [
        {"server": {"momentum": 1.0}},
        {"server": {"rate": 0.0}},
        {"server": {}, "aggregation": "median"},
        {"server": {}, "aggregation": "alternate"},
        {"server": {}, "downloads": {}},
        {"server": {}, "shared": [], "personal": ["lora_a", "lora_b"]},
    ],
    ids=str,
)
def test_what_it_does_not_go_with_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError) as caught:
        Strategy.of(settings)
    assert caught.value.code == "E16"


def test_a_job_of_the_plain_mean_with_momentum_has_our_aggregator(tmp_path: Path) -> None:
    content = find_strategy("server_momentum").model_dump()
    content["strategy"]["aggregation"] = "mean"
    (tmp_path / "mine.json").write_text(json.dumps(content))
    job = make_job(str(tmp_path / "mine.json"), tmp_path / "job")
    config = json.loads((job / "app/config/config_fed_server.json").read_text())
    assert component_of(config, "aggregator")["path"].endswith("RobustAggregator")
    component_of(config, "aggregator")["path"] = "somebodys.own.Aggregator"
    (job / "app/config/config_fed_server.json").write_text(json.dumps(config))
    with pytest.raises(PFedSAMError, match=r"E32.*an aggregator of its own.*server"):
        export_job(job, tmp_path / "other")
