"""The events of a comparison are counted before it runs: as many are told, and shared rounds only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfedsam.comparison.execute import execute
from pfedsam.comparison.expected import Expected, rounds_done, simulated_events
from pfedsam.comparison.planned import planned_runs
from pfedsam.comparison.run import Run
from pfedsam.data.phantom import write_phantom
from pfedsam.training.strategy import Strategy

SETTINGS = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "positives_per_case": 1, "negatives_per_case": 1}
ROUNDS = 2
SHARING = ["fedavg_lora", "fedavg_lora_ft"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected") / "data"
    write_phantom(folder, sites=2, cases=4, shape=(32, 32, 4))
    return folder


def planned(data: Path, strategies: list[str], unseen: bool = False) -> list[Run]:
    return planned_runs(data, strategies, [0], ROUNDS, "brain_lesion_mri", SETTINGS, unseen, validate_every=2)


@pytest.mark.parametrize(
    ("strategies", "trained"),
    [
        # 2 sites in 2 rounds and the end of these, for both; then what each does itself
        (SHARING, (2 * 2 + 2) + 2 * 2),
        # the votes are of the models that the sites have alone; of the pooled data there is one
        pytest.param(["local_only", "ensemble_local", "centralised"], (2 * 2 + 2) + (2 + 1), marks=pytest.mark.slow),
    ],
    ids=lambda one: "+".join(one) if isinstance(one, list) else "",
)
def test_as_many_events_are_told_as_were_expected(
    strategies: list[str], trained: int, data: Path, tmp_path: Path
) -> None:
    runs = planned(data, strategies)
    expected, tests = Expected(runs, tmp_path), 2 * len(strategies)
    assert expected.total == trained + tests
    told, counted = 0, 0
    for place, run in enumerate(runs):
        lines: list[str] = []
        execute(run, tmp_path, lines.append)
        told += len(lines)
        counted += sum(expected.told(run) for _ in lines)
        assert expected.ended(run, done=True) == 0, run.name
        if not place:
            assert Expected(runs[1:], tmp_path).total == expected.total - told, "what is done is not counted again"
    assert told == counted == expected.total
    assert Expected(runs, tmp_path).total == tests, "trainings that are done are not told again"


@pytest.mark.slow
def test_an_unseen_site_is_counted_too(data: Path, tmp_path: Path) -> None:
    runs = [run for run in planned(data, ["fedavg_lora_ft", "local_only"], unseen=True) if run.held_out == "site-1"]
    expected, told = Expected(runs, tmp_path), 0
    for run in runs:
        lines: list[str] = []
        execute(run, tmp_path, lines.append)
        told += len(lines)
    assert told == expected.total


def test_what_a_failed_run_leaves_is_told_by_the_run_that_shares_it(data: Path, tmp_path: Path) -> None:
    first, second = planned(data, SHARING)
    expected = Expected([first, second], tmp_path)
    total = sum(expected.told(first) for _ in range(3))
    total += expected.ended(first, done=False)
    assert total == 3 + 2 + 2, "its own final phases and tests only"
    total += sum(expected.told(second) for _ in range(20)) + expected.ended(second, done=True)
    assert total == expected.total
    assert expected.told(second) == expected.ended(second, done=True) == 0


def test_a_simulation_counts_the_rounds_that_are_validated_and_left() -> None:
    phases = [{"name": name, "trains": ["shared"], "experts": False} for name in ("one", "two")]
    final = [{"name": "final", "trains": ["personal"], "experts": True}]
    strategy = Strategy.of({"phases": phases, "final": final, "validate_every": 3})
    # of each site: 2 validations, 2 phases in each of 7 rounds, the final phase and its end
    assert simulated_events(strategy, 4, 7, 0) == 4 * (2 + 14 + 2)
    assert simulated_events(strategy, 4, 7, 3) == 4 * (1 + 8 + 2)
    assert simulated_events(strategy, 4, 7, 7) == 4 * 2


def test_a_folder_without_a_global_model_has_done_no_round(tmp_path: Path) -> None:
    assert rounds_done(tmp_path) == 0
