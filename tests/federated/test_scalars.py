"""Scalars go around the filters: their tags come from a list, never from a job."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContextManager

from pfedsam.federated.scalars import EVENT, LISTED, ListedScalars, phase_tag
from pfedsam.strategies import find_strategy
from pfedsam.training.phases import Strategy


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


def test_one_event_with_one_finite_number_under_a_listed_tag() -> None:
    fired: list = []
    manager = FLContextManager(engine=SimpleNamespace(fire_event=lambda *a: None), identity_name="site-1", job_id="job")
    engine = SimpleNamespace(
        new_context=manager.new_context,
        fire_event=lambda event, fl_ctx: fired.append((event, fl_ctx.get_prop("__event_data__"))),
    )
    manager.engine = engine
    scalars = ListedScalars()
    scalars.send("val_dice_global", 0.5, 0)
    assert not fired, "not started"
    scalars.handle_event(EventType.ABOUT_TO_START_RUN, manager.new_context())
    scalars.send("val_dice_global", float("nan"), 0)
    scalars.send("loss/global", 0.25, 3)
    ((event, data),) = fired
    assert event == EVENT and data["DXO"]["data"]["track_key"] == "loss/global"
    assert scalars.sent == {"loss/global": 1}
    with pytest.raises(ValueError, match="not listed"):
        scalars.send("loss/radiology", 0.5, 0)
