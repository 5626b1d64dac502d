"""The server's aggregator is the reference, its selector listens to no single site, and the records name who tried."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.analytix import AnalyticsDataType  # noqa: F401  registers NVFlare's types
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from pfedsam.federated.aggregators import ProductAggregator, RobustAggregator, RobustModelSelector
from pfedsam.federated.boundary import GAP_KEY, METRICS
from pfedsam.federated.plan import Plan
from pfedsam.federated.records import ROUNDS_FILE
from pfedsam.storage.job_plan import PLAN_ID
from pfedsam.training.aggregation import RULES, aggregate, combine
from pfedsam.training.gap_weights import GapWeights
from pfedsam.training.reported_weights import WeightsByReport
from pfedsam.training.server_settings import ServerStep
from pfedsam.training.server_step import ServerSteps
from pfedsam.training.site_weights import SiteWeights

SHAPES = {"qkv.lora_a": (2, 4, 12), "qkv.lora_b": (2, 9, 4), "hyper.weight": (5, 3)}


class Server:
    """A round of a server: an engine with a plan, and a context."""

    def __init__(self, folder: Path, rule: str, most_cases: Any = None, **strategy: Any) -> None:
        plan = Plan("demo", "brain_lesion_mri", {"aggregation": rule, **strategy}, most_cases=most_cases)
        self.folder = folder
        workspace = SimpleNamespace(get_run_dir=lambda job: str(folder / job))
        engine = SimpleNamespace(
            get_component={PLAN_ID: plan}.get, get_workspace=lambda: workspace, fire_event=self._fired
        )
        self.context: FLContext = FLContextManager(engine=engine, identity_name="server", job_id="job").new_context()
        self.events: list[str] = []

    def _fired(self, event: str, fl_ctx: FLContext) -> None:
        self.events.append(event)

    def start(self, number: int, theta: dict[str, np.ndarray]) -> None:
        self.context.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=True)
        model = make_model_learnable(dict(theta), {})
        self.context.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "job" / ROUNDS_FILE).read_text().splitlines()]


def contribution(delta: dict[str, np.ndarray], weight: int, site: str, number: int = 0, **metrics: float) -> Shareable:
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: weight, **({MetaKey.INITIAL_METRICS: metrics} if metrics else {})}
    shareable = DXO(DataKind.WEIGHT_DIFF, dict(delta), meta).to_shareable()
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, number)
    return shareable


def arrays(random: np.random.Generator, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Tensors with a part in common, as updates of sites that learn the same."""
    return {name: (scale * (1 + random.normal(size=shape))).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("rule", [*RULES, "of old jobs"])
def test_the_servers_aggregation_is_the_references(rule: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    theta = start = arrays(random)
    server = Server(tmp_path, "mean" if rule == "of old jobs" else rule)
    aggregator = ProductAggregator(expected_data_kind="WEIGHT_DIFF") if rule == "of old jobs" else RobustAggregator()
    for number in range(2):
        deltas, weights = [arrays(random, 0.2) for _ in range(3)], [4, 9, 2]
        deltas[1] = {name: 5 * value for name, value in deltas[1].items()}
        server.start(number, theta)
        # in another order than that of their names
        for place in (2, 0, 1):
            assert aggregator.accept(
                contribution(deltas[place], weights[place], f"site-{place}", number), server.context
            )
        change = from_shareable(aggregator.aggregate(server.context)).data
        wanted = aggregate(
            *_tensors(theta, deltas), weights, "svd" if rule == "of old jobs" else rule, _start(start, number)
        )
        got = {name: theta[name] + change[name] for name in theta}
        assert all(change[name].dtype == np.float32 for name in theta)
        for name, tensor in wanted.items():
            torch.testing.assert_close(torch.as_tensor(got[name]), tensor, rtol=0, atol=1e-6)
        theta = got
        aggregator.reset(server.context)


def test_what_is_no_update_of_this_round_is_not_held(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    theta, delta = arrays(random), arrays(random)
    server, aggregator = Server(tmp_path, "norm_clipped"), RobustAggregator()
    server.start(3, theta)
    failed = make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR)
    failed.set_peer_props({ReservedKey.IDENTITY_NAME: "site-9"})
    assert not aggregator.accept(failed, server.context)
    assert not aggregator.accept(contribution(delta, 5, "site-1", 2), server.context), "of the round before"
    assert aggregator.accept(contribution(delta, 5, "site-1", 3), server.context)
    assert not aggregator.accept(contribution(delta, 5, "site-1", 3), server.context), "a site counts once in a round"
    change = from_shareable(aggregator.aggregate(server.context)).data
    for name in theta:
        np.testing.assert_allclose(change[name], delta[name], atol=1e-6)
    nothing = from_shareable(aggregator.aggregate(server.context)).data
    assert all(not value.any() for value in nothing.values())


def test_the_log_and_the_records_name_the_site_that_claims_too_much(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random = np.random.default_rng(0)
    theta = arrays(random)
    server, aggregator = Server(tmp_path, "norm_clipped"), RobustAggregator()
    server.start(0, theta)
    for number in range(4):
        delta = arrays(random, 1000.0 if number == 2 else 1.0)
        aggregator.accept(contribution(delta, 10**6 if number == 3 else 5, f"site-{number}"), server.context)
    aggregator.aggregate(server.context)
    (record,) = server.records()
    assert record["round"] == 0
    assert record["sites"]["site-3"]["cases"] == 10**6
    assert record["sites"]["site-3"]["counted"] == 15
    assert record["sites"]["site-2"]["counted"] == 0
    assert record["sites"]["site-2"]["norm"] > 1000
    warned = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert len(warned) == 2
    assert any("site-2" in line and "left out" in line for line in warned)
    assert any("site-3" in line and "counted as 15" in line for line in warned)


def test_an_agreed_number_of_cases_is_not_held_to_what_others_have(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    server, aggregator = Server(tmp_path, "norm_clipped", {"site-0": 400}), RobustAggregator()
    server.start(0, arrays(random))
    for number, cases in enumerate((400, 5, 5)):
        aggregator.accept(contribution(arrays(random), cases, f"site-{number}"), server.context)
    aggregator.aggregate(server.context)
    assert [one["counted"] for one in server.records()[0]["sites"].values()] == [400, 5, 5]


@pytest.mark.parametrize("rule", ["norm_clipped", "mean"])
def test_no_single_site_chooses_the_best_model(tmp_path: Path, rule: str) -> None:
    """site-3 says 1.0 in the round in which the others got worse, with a million cases."""
    random = np.random.default_rng(0)
    theta, delta = arrays(random), arrays(random)
    server, selector = Server(tmp_path, rule), RobustModelSelector()
    dice = {0: (0.9, 0.9, 0.9, 0.9), 1: (0.5, 0.4, 0.6, 0.1), 2: (0.2, 0.1, 0.3, 1.0), 3: (0.6, 0.5, 0.7, 0.0)}
    best = []
    for number, told in dice.items():
        server.start(number, theta)
        selector.handle_event(AppEventType.ROUND_STARTED, server.context)
        for site, value in enumerate(told):
            result = contribution(delta, 10**6 if site == 3 else 5, f"site-{site}", number, val_dice=value)
            server.context.set_prop(AppConstants.TRAINING_RESULT, result, private=True, sticky=False)
            selector.handle_event(AppEventType.BEFORE_CONTRIBUTION_ACCEPT, server.context)
        server.events.clear()
        selector.handle_event(AppEventType.BEFORE_AGGREGATION, server.context)
        best.append(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE in server.events)
    assert best == [False, True, False, True]
    assert selector.best_val_metric == pytest.approx(0.55, abs=0.06)


def test_rounds_without_validation_choose_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    server, selector = Server(tmp_path, "norm_clipped"), RobustModelSelector()
    server.start(1, arrays(random))
    for told in ({}, {"val_dice": float("nan")}):
        result = contribution(arrays(random), 5, "site-1", 1, **told)
        server.context.set_prop(AppConstants.TRAINING_RESULT, result, private=True, sticky=False)
        selector.handle_event(AppEventType.BEFORE_CONTRIBUTION_ACCEPT, server.context)
    selector.handle_event(AppEventType.BEFORE_AGGREGATION, server.context)
    assert not server.events


def _start(theta: dict, number: int) -> dict | None:
    return _tensors(theta, [])[0] if number else None


def _tensors(theta: dict, deltas: list[dict]) -> tuple[dict, list[dict]]:
    as_tensors = [{name: torch.as_tensor(value) for name, value in one.items()} for one in (theta, *deltas)]
    return as_tensors[0], as_tensors[1:]


def test_the_servers_weights_are_those_that_follow_from_the_dice_that_the_sites_sent(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    theta = start = arrays(random)
    server, aggregator, reference = Server(tmp_path, "norm_clipped", weights="dro"), RobustAggregator(), SiteWeights()
    for number in range(3):
        deltas = [arrays(random, 0.2) for _ in range(3)]
        dice = {"site-0": 0.9, "site-1": 0.1 + 0.1 * number, "site-2": None}
        server.start(number, theta)
        for place in (2, 0, 1):
            told = {} if dice[f"site-{place}"] is None else {METRICS[0]: dice[f"site-{place}"]}
            assert aggregator.accept(contribution(deltas[place], 1, f"site-{place}", number, **told), server.context)
        change = from_shareable(aggregator.aggregate(server.context)).data
        weights = list(reference.next(dice).values())
        assert weights[1] > 1 > weights[0]
        wanted = aggregate(*_tensors(theta, deltas), weights, "norm_clipped", _start(start, number))
        theta = {name: theta[name] + change[name] for name in theta}
        for name, tensor in wanted.items():
            torch.testing.assert_close(torch.as_tensor(theta[name]), tensor, rtol=0, atol=1e-6)
    counted = {site: one["cases"] for site, one in server.records()[-1]["sites"].items()}
    assert counted == {f"site-{place}": pytest.approx(weight, rel=1e-3) for place, weight in enumerate(weights)}


@pytest.mark.parametrize("rule", ["norm_clipped", "mean"])
def test_the_servers_momentum_is_that_of_a_federation_in_one_process(tmp_path: Path, rule: str) -> None:
    random = np.random.default_rng(0)
    theta = start = arrays(random)
    server, aggregator = Server(tmp_path, rule, server={"momentum": 0.5, "rate": 1.5}), RobustAggregator()
    steps = ServerSteps(ServerStep(momentum=0.5, rate=1.5))
    for number in range(3):
        deltas = [arrays(random, 0.2) for _ in range(3)]
        server.start(number, theta)
        for place in (2, 0, 1):
            assert aggregator.accept(contribution(deltas[place], 1, f"site-{place}", number), server.context)
        change = from_shareable(aggregator.aggregate(server.context)).data
        mean, _ = combine(*_tensors(theta, deltas), [1, 1, 1], rule, start=_start(start, number))
        wanted = steps.next(mean)
        for name, value in change.items():
            torch.testing.assert_close(torch.as_tensor(value), wanted[name].float(), rtol=0, atol=1e-6)
        theta = {name: theta[name] + change[name] for name in theta}
    aggregator.handle_event(EventType.START_RUN, server.context)
    assert aggregator._steps is None, "another run begins without momentum"


@pytest.mark.parametrize("start", [0, 2])
def test_the_servers_weights_by_gaps_are_those_of_a_federation_in_one_process(tmp_path: Path, start: int) -> None:
    random = np.random.default_rng(0)
    theta = first = arrays(random)
    server, aggregator, reference = Server(tmp_path, "norm_clipped", weights="gaa"), RobustAggregator(), GapWeights()
    in_process = WeightsByReport()
    # as NVFlare's workflow says it: where this run begins, and how many rounds it has
    server.context.set_prop(AppConstants.START_ROUND, start, private=True, sticky=True)
    server.context.set_prop(AppConstants.NUM_ROUNDS, 5 - start, private=True, sticky=False)
    for number in range(start, 5):
        deltas = [arrays(random, 0.2) for _ in range(3)]
        gaps = {"site-0": 0.01, "site-1": 0.1 + 0.1 * number, "site-2": None}
        server.start(number, theta)
        for place in (2, 0, 1):
            result = contribution(deltas[place], 1, f"site-{place}", number)
            if gaps[f"site-{place}"] is not None:
                dxo = from_shareable(result)
                dxo.meta[GAP_KEY] = gaps[f"site-{place}"]
                dxo.update_shareable(result)
            assert aggregator.accept(result, server.context)
        change = from_shareable(aggregator.aggregate(server.context)).data
        weights = in_process.next("gaa", gaps, number, 5)
        assert weights == list(reference.next(gaps, number / 5).values()) and weights[1] > 1 > weights[0]
        rule_start = _start(first, number - start)
        wanted = aggregate(*_tensors(theta, deltas), weights, "norm_clipped", rule_start)
        theta = {name: theta[name] + change[name] for name in theta}
        for name, tensor in wanted.items():
            torch.testing.assert_close(torch.as_tensor(theta[name]), tensor, rtol=0, atol=1e-6)
    counted = {site: one["cases"] for site, one in server.records()[-1]["sites"].items()}
    assert counted == {f"site-{place}": pytest.approx(weight, rel=1e-3) for place, weight in enumerate(weights)}
