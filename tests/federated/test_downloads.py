"""Each site gets its own download and no other's, by NVFlare's own server; it is what one process computes."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import Task
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import make_model_learnable, model_learnable_to_dxo
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.private.fed.server.client_manager import ClientManager
from test_aggregators import arrays, contribution
from test_disabled import Server

from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.jobs import export_job
from pfedsam.errors import PFedSAMError
from pfedsam.federated import downloads
from pfedsam.federated.aggregators import RobustAggregator
from pfedsam.federated.disabled import DISABLED_FILE
from pfedsam.federated.downloads import KEPT
from pfedsam.federated.plan import Plan
from pfedsam.federated.records import ROUNDS_FILE
from pfedsam.federated.settings import SiteSettings, require_unseen
from pfedsam.files import read_lines
from pfedsam.parameters import Manifest, TensorSpec
from pfedsam.storage.job_plan import SERVER, component_of
from pfedsam.training.site_downloads import SiteDownloads
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
SITES = tuple(f"site-{number}" for number in range(6))
DOWNLOADS = {"warmup_rounds": 1}


class Planned(Plan):
    """A plan that shares the tensors of the tests."""

    def shared(self) -> Manifest:
        random = np.random.default_rng(0)
        return {name: TensorSpec(value.shape, str(value.dtype)) for name, value in arrays(random).items()}


class Federation(Server):
    """A server with our aggregator, and the rounds of a `ScatterAndGather`."""

    def __init__(self, kit: Path, settings: dict[str, Any] | None = DOWNLOADS, begin: int = 0) -> None:
        super().__init__(kit)
        strategy = {} if settings is None else {"downloads": settings}
        self.plan, self.aggregator = Planned("demo", "brain_lesion_mri", strategy), RobustAggregator()
        self.number, self.random = begin, np.random.default_rng(0)
        self.theta = arrays(self.random)
        self.towards = [arrays(self.random, 0.2) for _ in range(2)]
        self.global_context = self.new_context()

    def start(self, theta: dict[str, np.ndarray] | None = None) -> None:
        self.theta = self.theta if theta is None else theta
        self.aggregator.handle_event(EventType.START_RUN, self.global_context)
        self.show()
        self.global_context.set_prop(AppConstants.START_ROUND, self.number, private=True, sticky=True)
        self.aggregator.handle_event(AppEventType.INITIAL_MODEL_LOADED, self.global_context)

    def show(self) -> None:
        model = make_model_learnable(self.theta, {"fingerprint": "ab"})
        self.global_context.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)
        self.global_context.set_prop(AppConstants.CURRENT_ROUND, self.number, private=True, sticky=True)

    def updates(self) -> dict[str, dict[str, np.ndarray]]:
        noise = {site: arrays(self.random, 0.02) for site in SITES}
        sign = {site: 1 if place % 2 else -1 for place, site in enumerate(SITES)}
        return {
            site: {name: (sign[site] * self.towards[0][name] + value).astype(np.float32) for name, value in own.items()}
            for site, own in noise.items()
        }

    def round(self, updates: dict[str, dict[str, np.ndarray]] | None = None) -> None:
        updates = self.updates() if updates is None else updates
        self.show()
        for site, update in updates.items():
            assert self.aggregator.accept(contribution(update, 5, site, self.number), self.global_context)
        change = from_shareable(self.aggregator.aggregate(self.global_context)).data
        self.theta = {name: value + change[name] for name, value in self.theta.items()}
        self.show()
        self.aggregator.handle_event(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE, self.global_context)
        self.number += 1

    def task(self, name: str = "train", number: int | None = None) -> Task:
        data = model_learnable_to_dxo(make_model_learnable(self.theta, {"fingerprint": "ab"})).to_shareable()
        data.set_header(AppConstants.CURRENT_ROUND, self.number if number is None else number)
        return Task(name=name, data=data)

    def sent(self, name: str = "train", sites: tuple[str, ...] = SITES, **how: Any) -> dict[str, Any]:
        """What each site gets, None for a task without a model; with `together` they ask at the same time."""
        task = self.task(name, how.pop("number", None))
        with self.new_context() as fl_ctx:
            self.rounds.communicator.broadcast(task, fl_ctx, min_responses=len(SITES))
            try:
                if how.pop("together", False):
                    barrier = threading.Barrier(len(sites))

                    def ask(site: str) -> Shareable:
                        barrier.wait()
                        return self.asked_by(site)

                    with ThreadPoolExecutor(len(sites)) as pool:
                        got = dict(zip(sites, pool.map(ask, sites), strict=True))
                else:
                    got = {site: self.asked_by(site, **how) for site in sites}
            finally:
                self.rounds.communicator.cancel_task(task, fl_ctx=fl_ctx)
                self.rounds.communicator._tasks.clear()
        return {site: tensors_of(data) for site, data in got.items()}

    def of(self, site: str) -> Any:
        own = self.aggregator._served._downloads.of(site)
        return self.theta if own is None else {name: tensor.numpy() for name, tensor in own.items()}

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().fire_event(event_type, fl_ctx)
        if event_type == EventType.BEFORE_TASK_DATA_FILTER:
            self.aggregator.handle_event(event_type, fl_ctx)

    def get_component(self, name: str) -> Any:
        return self.plan

    def get_run_dir(self, job: str) -> str:
        return str(self.kit / job)

    def get_clients(self) -> list[Client]:
        return [Client(name, f"token of {name}") for name in SITES]


def tensors_of(data: Shareable) -> dict[str, np.ndarray] | None:
    try:
        dxo = from_shareable(data)
    except ValueError:
        return None
    assert dxo.meta["fingerprint"] == "ab"
    return dxo.data


def same(one: Any, other: Any) -> bool:
    return one is not None and all(np.array_equal(one[name], other[name]) for name in other)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """With two groups of three sites."""
    found = Federation(tmp_path)
    found.start()
    for _ in range(3):
        found.round()
    assert not same(found.of(SITES[0]), found.of(SITES[1])) and not same(found.of(SITES[0]), found.theta)
    return found


@pytest.mark.parametrize("task", ["train", "configure"])
def test_sites_that_ask_at_the_same_time_get_their_own_and_no_array_of_another(
    task: str, federation: Federation
) -> None:
    before = {name: value.copy() for name, value in federation.theta.items()}
    for _ in range(30):
        got = federation.sent(task, together=True)
        assert all(same(got[site], federation.of(site)) for site in SITES)
        held = [id(value) for one in got.values() for value in one.values()]
        assert len(held) == len(set(held)), "two sites hold the same array"
        assert not any(np.shares_memory(one[name], federation.theta[name]) for one in got.values() for name in one)
        mates = (got[site] for site in SITES[::2])
        assert not any(np.shares_memory(one[k], two[k]) for one, two in itertools.pairwise(mates) for k in one)
    assert same(before, federation.theta)


def test_a_site_that_changes_what_it_got_changes_no_one_elses(federation: Federation) -> None:
    own = {site: {name: value.copy() for name, value in federation.of(site).items()} for site in SITES}
    for value in federation.sent()[SITES[0]].values():
        value[...] = np.nan
    assert all(same(one, own[site]) for site, one in federation.sent().items())


def test_a_site_that_asks_while_the_round_ends_gets_nothing_of_another_round(federation: Federation) -> None:
    stop = threading.Event()
    number, own = federation.number, {site: federation.of(site) for site in SITES}
    served = federation.aggregator._served._downloads
    later = {site: {name: torch.as_tensor(v) + 1 for name, v in own[site].items()} for site in SITES}
    now = served._next[1]

    def flip() -> None:
        while not stop.is_set():
            served._next = (number + 1, later)
            served._next = (number, now)

    flipping = threading.Thread(target=flip)
    flipping.start()
    try:
        got = [federation.sent(together=True) for _ in range(20)]
    finally:
        stop.set()
        flipping.join()
    sent = [(site, one) for each in got for site, one in each.items() if one is not None]
    assert sent and all(same(one, own[site]) for site, one in sent)
    served._next = (number, now)
    assert federation.sent(number=number - 1) == dict.fromkeys(SITES)


def test_the_evaluation_is_of_the_global_model(federation: Federation) -> None:
    assert all(same(one, federation.theta) for one in federation.sent("validate").values())


def test_who_is_not_known_or_calls_itself_another_gets_nothing(federation: Federation) -> None:
    assert federation.sent(sites=SITES[:1], calls_itself=SITES[1]) == {SITES[0]: None}
    assert same(federation.sent(sites=SITES[1:2])[SITES[1]], federation.of(SITES[1]))


def test_a_disabled_site_gets_nothing(federation: Federation) -> None:
    manager = ClientManager("server")
    manager.set_disabled_clients_file(str(federation.kit / DISABLED_FILE))
    manager.disable_client(SITES[0])
    got = federation.sent(together=True)
    assert got[SITES[0]] is None and all(same(got[site], federation.of(site)) for site in SITES[1:])


@pytest.mark.parametrize("damage", ["shape", "dtype", "name", "not finite"])
def test_what_does_not_fit_the_manifest_is_not_sent_and_the_others_get_theirs(
    damage: str, federation: Federation
) -> None:
    served = federation.aggregator._served._downloads
    number, thetas = served._next
    bad = dict(thetas[SITES[0]])
    if damage == "name":
        bad["experts.weight"] = bad.pop("hyper.weight")
    else:
        first = bad["hyper.weight"]
        changed = {"shape": first[:1], "dtype": first.double(), "not finite": first * float("nan")}
        bad["hyper.weight"] = changed[damage]
    served._next = number, {**thetas, SITES[0]: bad}
    got = federation.sent(together=True)
    assert got[SITES[0]] is None and all(same(got[site], federation.of(site)) for site in SITES[1:])


def test_when_it_fails_nothing_is_sent(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "addressed", lambda _: 1 / 0)
    assert federation.sent() == dict.fromkeys(SITES)


@pytest.mark.parametrize("kind", ["groups", "mixtures"])
def test_the_server_computes_what_one_process_does(kind: str, tmp_path: Path) -> None:
    settings = {**DOWNLOADS, "kind": kind, "peers_see_models": kind == "mixtures"}
    server = Federation(tmp_path, settings)
    server.start()
    reference = SiteDownloads(Strategy.of({"downloads": settings}).downloads, "norm_clipped")
    theta = start = {name: torch.as_tensor(value) for name, value in server.theta.items()}
    for number in range(4):
        updates = server.updates()
        as_tensors = {s: {n: torch.as_tensor(v) for n, v in one.items()} for s, one in updates.items()}
        server.round(updates)
        outcome = reference.next(number, theta, as_tensors, [5.0] * 6, start=start if number else None)
        theta = {name: (value.double() + outcome.change[name]).float() for name, value in theta.items()}
        got = server.sent()
        for site in SITES:
            wanted = reference.of(site) or theta
            for name in theta:
                np.testing.assert_allclose(got[site][name], wanted[name].numpy(), rtol=0, atol=2e-6)
                np.testing.assert_allclose(server.theta[name], theta[name].numpy(), rtol=0, atol=2e-6)
    record = read_lines(tmp_path / "job" / ROUNDS_FILE)[-1]
    assert record["downloads"] == outcome.told
    if kind == "groups":
        assert record["downloads"]["groups"] == [list(SITES[::2]), list(SITES[1::2])]


def test_a_job_that_goes_on_from_its_global_model_finds_what_each_site_had(federation: Federation) -> None:
    again = Federation(federation.kit, begin=federation.number)
    again.random = np.random.default_rng(5)
    federation.random = np.random.default_rng(5)
    again.start(federation.theta)
    for _ in range(2):
        got, wanted = again.sent(), federation.sent()
        assert all(same(got[site], wanted[site]) for site in SITES)
        # the way of the model begins anew where a job is resumed; no update points back, so they are judged alike
        again.round(updates := federation.updates())
        federation.round(updates)


@pytest.mark.parametrize("change", ["model", "round", "file"])
def test_another_model_another_round_or_a_damaged_file_begin_from_the_global_model(
    change: str, federation: Federation
) -> None:
    again = Federation(federation.kit, begin=federation.number + (change == "round"))
    if change == "file":
        (federation.kit / KEPT / "demo.safetensors").write_bytes(b"nothing")
    theta = {name: value + (change == "model") for name, value in federation.theta.items()}
    again.start(theta)
    assert all(same(one, theta) for one in again.sent().values())


def test_without_downloads_nothing_is_done_and_nothing_written(tmp_path: Path) -> None:
    server = Federation(tmp_path, None)
    server.start()
    for _ in range(2):
        server.round()
    got = server.sent()
    assert all(same(one, server.theta) for one in got.values())
    shared = {id(value) for value in got[SITES[0]].values()}
    assert all({id(value) for value in one.values()} == shared for one in got.values()), "NVFlare's one copy"
    assert not (tmp_path / KEPT).exists()
    assert "downloads" not in read_lines(tmp_path / "job" / ROUNDS_FILE)[-1]


@pytest.mark.parametrize(
    ("settings", "agreed", "simulated", "refused"),
    [
        (None, None, False, False),
        ({}, None, False, False),
        ({"kind": "mixtures", "peers_see_models": True}, None, False, True),
        ({"kind": "mixtures", "peers_see_models": True}, False, True, True),
        ({"kind": "mixtures", "peers_see_models": True}, True, False, False),
        ({"kind": "mixtures", "peers_see_models": True}, None, True, False),
        ({"least_size": 2, "peers_see_models": True}, None, False, True),
        ({"least_size": 2, "peers_see_models": True}, True, False, False),
    ],
)
def test_what_tells_a_sites_model_needs_the_sites_own_word(
    settings: Any, agreed: bool | None, simulated: bool, refused: bool
) -> None:
    strategy = Strategy.of({"downloads": settings})
    site = SiteSettings(peers_see_my_model=agreed)
    if not refused:
        require_unseen(strategy, site, simulated)
        return
    with pytest.raises(PFedSAMError, match="E35") as caught:
        require_unseen(strategy, site, simulated)
    assert caught.value.as_reply() == "SITE_REFUSED:E35"


def test_a_job_with_downloads_has_our_aggregator_and_is_not_encrypted(tmp_path: Path) -> None:
    from pfedsam.deployment.job_files import server_settings

    for settings, ours in ((None, False), ({}, True)):
        strategy = {"aggregation": "mean", "downloads": settings}
        job = export_job(find_job("fedavg_lora"), tmp_path / str(ours), plan={"strategy": strategy})
        path = component_of(server_settings(job), "aggregator")["path"]
        assert path.startswith("pfedsam.") == ours
    with pytest.raises(PFedSAMError, match=r"E32.*alike"):
        privacy = Privacy(encrypt=True)
        export_job(find_job("fedavg_lora"), tmp_path / "c", plan={"strategy": strategy}, privacy=privacy)
    assert (tmp_path / "True" / "app" / "config" / SERVER).is_file()
