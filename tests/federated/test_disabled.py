"""A site that the administrator has disabled gets no model, and the others get theirs, by NVFlare's own server."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.impl.controller import Controller
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.server_engine_spec import ServerEngineSpec
from nvflare.apis.shareable import Shareable
from nvflare.private.fed.server.client_manager import ClientManager
from nvflare.private.fed.server.server_runner import ServerRunner, ServerRunnerConfig

from pfedsam.federated import disabled
from pfedsam.federated.disabled import DISABLED_FILE, tell_withheld
from pfedsam.federated.filters import IncomingGuard

SITES = ("site-1", "site-2")
WEIGHT = "image_encoder.blocks.0.qkv.lora_a"


class Rounds(Controller):
    """A workflow that broadcasts what it is told to."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        pass

    def stop_controller(self, fl_ctx: FLContext) -> None:
        pass

    def control_flow(self, abort_signal: Any, fl_ctx: FLContext) -> None:
        pass

    def process_result_of_unknown_task(self, client: Client, task_name: str, *_: Any) -> None:
        pass


@ServerEngineSpec.register
class Server:
    """NVFlare's runner of a job at the server with our guard, and what it asks of its engine."""

    def __init__(self, kit: Path) -> None:
        self.manager, self.guard = FLContextManager(engine=self, identity_name="server", job_id="job"), IncomingGuard()
        self.kit, self.rounds = kit, Rounds()
        self.rounds.communicator = communicator = WFCommServer()
        communicator.controller, communicator._engine = self.rounds, self
        config = ServerRunnerConfig(60, 0.1, [], {}, {}, handlers=[self.guard], components={})
        self.runner = ServerRunner(config, "job", self)
        self.runner.status, self.runner.current_wf = "started", SimpleNamespace(id="rounds", controller=self.rounds)

    def new_context(self) -> FLContext:
        fl_ctx = self.manager.new_context()
        fl_ctx.put(FLContextKey.RUNNER, self.runner, private=True, sticky=False)
        return fl_ctx

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        # NVFlare goes on when a handler fails
        self.guard.handle_event(event_type, fl_ctx)

    def register_aux_message_handler(self, **_: Any) -> None:
        pass

    def get_clients(self) -> list[Client]:
        return [Client(name, f"token of {name}") for name in SITES]

    def validate_targets(self, names: list[str]) -> tuple[list[Client], list[str]]:
        return [client for client in self.get_clients() if client.name in names], []

    def get_workspace(self) -> Server:
        return self

    def get_root_dir(self) -> str:
        return str(self.kit)

    @contextmanager
    def broadcast(self, name: str) -> Iterator[None]:
        """A task for all sites, with a model."""
        data = DXO(DataKind.WEIGHTS, {WEIGHT: np.ones((2, 3), np.float32)}, {"fingerprint": "ab"}).to_shareable()
        data.set_header("current_round", 1)
        task = Task(name=name, data=data)
        with self.new_context() as fl_ctx:
            self.rounds.communicator.broadcast(task, fl_ctx, min_responses=2)
            yield
            self.rounds.communicator.cancel_task(task, fl_ctx=fl_ctx)
            self.rounds.communicator._tasks.clear()

    def asked_by(self, site: str, calls_itself: str | None = None) -> Shareable:
        """What a site is sent when it asks for a task."""
        with self.new_context() as fl_ctx:
            peer = FLContext()
            peer.put(ReservedKey.IDENTITY_NAME, calls_itself or site, private=False, sticky=False)
            peer.put(ReservedKey.RUN_NUM, "job", private=False, sticky=False)
            fl_ctx.set_peer_context(peer)
            name, _, data = self.runner.process_task_request(Client(site, f"token of {site}"), fl_ctx)
            assert name in ("train", "validate", "configure")
            return data


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


@pytest.fixture
def console(tmp_path: Path) -> ClientManager:
    """What NVFlare's `disable_client` and `enable_client` call."""
    manager = ClientManager("server")
    manager.set_disabled_clients_file(str(tmp_path / DISABLED_FILE))
    return manager


def holds_model(data: Shareable) -> bool:
    """Whether a task's model can be read; if not, nothing of it may be in there at all."""
    try:
        return WEIGHT in from_shareable(data).data
    except ValueError:
        assert set(data) == {"__headers__"} and WEIGHT not in repr(data)
        return False


@pytest.mark.parametrize("task", ["train", "validate", "configure"])
def test_a_disabled_site_is_sent_no_model_from_then_on_and_the_others_are(
    task: str, server: Server, console: ClientManager
) -> None:
    with server.broadcast(task):
        assert holds_model(server.asked_by(SITES[0])) and holds_model(server.asked_by(SITES[1]))
    console.disable_client(SITES[0])
    with server.broadcast(task):
        kept_back = server.asked_by(SITES[0])
        assert not holds_model(kept_back)
        # what it needs to answer, so that no round waits for it
        assert kept_back.get_header("current_round") == 1 and kept_back.get_header("__task_id__")
        assert holds_model(server.asked_by(SITES[1]))
        assert not holds_model(server.asked_by(SITES[0])), "a task that is sent again"
    console.enable_client(SITES[0])
    with server.broadcast(task):
        assert holds_model(server.asked_by(SITES[0]))


def test_a_disabled_site_does_not_get_a_model_in_the_name_of_another(server: Server, console: ClientManager) -> None:
    console.disable_client(SITES[0])
    with server.broadcast("train"):
        assert not holds_model(server.asked_by(SITES[0], calls_itself=SITES[1]))
        assert holds_model(server.asked_by(SITES[1]))


def test_without_an_answer_who_is_disabled_nothing_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disabled, "_disabled", lambda _: 1 / 0)
    with server.broadcast("train"):
        assert not holds_model(server.asked_by(SITES[0]))


def test_the_site_is_told_why_its_task_is_empty(
    server: Server, console: ClientManager, caplog: pytest.LogCaptureFixture
) -> None:
    fl_ctx = FLContext()
    console.disable_client(SITES[0])
    with server.broadcast("train"), caplog.at_level(logging.ERROR):
        for site, told in ((SITES[1], False), (SITES[0], True)):
            fl_ctx.set_prop(FLContextKey.TASK_DATA, server.asked_by(site), private=True, sticky=False)
            tell_withheld(fl_ctx)
            assert ("has disabled this site" in caplog.text) == told
