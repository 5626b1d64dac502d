"""Scalars go around the filters: their tags come from a list, never from a job."""

from __future__ import annotations

import inspect
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContextManager

from pfedsam.federated.records import SCALARS, SENT_FILE
from pfedsam.federated.scalars import EVENT, LISTED, ListedScalars, phase_tag
from pfedsam.files import read_lines
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.strategy import Strategy


def test_a_job_can_give_the_sender_nothing() -> None:
    assert list(inspect.signature(ListedScalars).parameters) == []


def test_a_phase_that_a_job_has_named_is_told_by_its_place() -> None:
    phase = {"trains": ["shared"], "experts": False}
    strategy = Strategy.of({"phases": [{"name": "global", **phase}, {"name": "radiology", **phase}]})
    assert [phase_tag(strategy, one.name) for one in strategy.phases] == ["global", "phase_1"]
    assert not LISTED.fullmatch("loss/radiology")


@pytest.mark.parametrize("name", ["pfedsam", "fedavg_lora", "ditto", "local_phase_each_round"])
def test_the_usual_phases_keep_their_names(name: str) -> None:
    strategy = find_strategy(name).checked()
    for phase in (*strategy.phases, *strategy.final):
        assert phase_tag(strategy, phase.name) == phase.name


class Run:
    """A run that has started: what was sent and what was written down."""

    def __init__(self, root: Path) -> None:
        self.root, self.sent = root, []
        workspace = SimpleNamespace(get_run_dir=lambda job: str(root / job))
        manager = FLContextManager(identity_name="site-1", job_id="job")
        manager.engine = SimpleNamespace(
            new_context=manager.new_context,
            get_workspace=lambda: workspace,
            fire_event=lambda event, fl_ctx: self.sent.append(
                (event, fl_ctx.get_prop("__event_data__")["DXO"]["data"])
            ),
        )
        self.new_context = manager.new_context
        self.scalars = ListedScalars()

    def event(self, name: str) -> None:
        self.scalars.handle_event(name, self.new_context())

    def recorded(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for one in read_lines(self.root / "job" / SENT_FILE):
            assert one["stage"] == SCALARS
            counts.update(one["tags"])
        return counts


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path)
    run.event(EventType.ABOUT_TO_START_RUN)
    return run


def test_one_event_with_one_finite_number_under_a_listed_tag(run: Run) -> None:
    run.scalars.send("loss/global", float("nan"), 0)
    run.scalars.send("loss/global", 0.25, 3)
    ((event, data),) = run.sent
    assert event == EVENT and (data["track_key"], data["track_value"]) == ("loss/global", 0.25)
    assert run.scalars.sent == {"loss/global": 1}
    with pytest.raises(ValueError, match="not listed"):
        run.scalars.send("loss/radiology", 0.5, 0)


def test_nothing_is_sent_before_the_run_has_started(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.scalars.send("loss/global", 0.5, 0)
    assert run.sent == [] and not run.recorded()


@pytest.mark.parametrize("tag", ["val_dice_global", "val_dice_personal"])
def test_a_dice_is_sent_as_in_a_result(run: Run, tag: str) -> None:
    run.scalars.send(tag, 2 * 1234 / 5677, 0)
    assert [data["track_value"] for _, data in run.sent] == [0.43]
    with pytest.raises(ValueError, match="from 0 to 1"):
        run.scalars.send(tag, 1.5, 0)
    assert len(run.sent) == 1


def test_a_run_that_is_killed_has_written_down_every_tag_that_it_has_sent(run: Run) -> None:
    for tag in ("loss/global", "val_dice_global", "loss/global"):
        run.scalars.send(tag, 0.5, 0)
    assert run.recorded() == {"loss/global": 1, "val_dice_global": 1}


def test_at_the_end_of_a_run_it_is_written_down_how_often_each_tag_was_sent(run: Run) -> None:
    for _ in range(2):  # NVFlare may build a site anew for each task
        for tag in ("loss/global", "val_dice_global", "loss/global"):
            run.scalars.send(tag, 0.5, 0)
        run.event(EventType.END_RUN)
    assert run.recorded() == {"loss/global": 4, "val_dice_global": 2}


def test_what_cannot_be_written_down_is_not_sent(run: Run) -> None:
    (run.root / "job").write_text("a file where the run folder should be")
    with pytest.raises(OSError):
        run.scalars.send("loss/global", 0.5, 0)
    assert run.sent == []
