"""The server stops a job whose round has fewer sites than the plan promises, and a job promises what it waits for."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.job_def import JobMetaKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.job_files import META, find_job, plan_settings, server_settings
from pfedsam.deployment.jobs import PROMISED, export_job
from pfedsam.errors import PFedSAMError
from pfedsam.federated.least_sites import LeastSites, require_enough_sites, sites_of
from pfedsam.federated.plan import Plan
from pfedsam.federated.records import SITES_FILE
from pfedsam.federated.rounds import attendance, remarks
from pfedsam.files import read_lines
from pfedsam.storage.job_plan import PLAN_ID, SERVER
from pfedsam.training.catalogue import find_strategy


class Server:
    """A server's run with a plan, of a job that was handed to these sites: it notes the events that are fired."""

    def __init__(
        self,
        folder: Path,
        least: int | None,
        *,
        sites: tuple[str, ...] = ("site-1", "site-2", "site-3"),
        min_clients: int | None = None,
        missing_sites: str = "warn",
    ) -> None:
        strategy = find_strategy("pfedsam").strategy
        plan = Plan("lesions", "brain_lesion_mri", strategy, least_sites=least, missing_sites=missing_sites)
        self.folder, self.sites = folder, list(sites)
        meta = {} if min_clients is None else {JobMetaKey.MIN_CLIENTS.value: min_clients}
        self.events: list[tuple[str, str]] = []
        manager = FLContextManager(identity_name="server", job_id="job")
        manager.engine = SimpleNamespace(
            get_component=lambda name: plan if name == PLAN_ID else None,
            fire_event=lambda event, fl_ctx: self.events.append((event, str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)))),
            get_clients=lambda: [SimpleNamespace(name=site) for site in self.sites],
            get_workspace=lambda: SimpleNamespace(get_run_dir=lambda job: str(folder)),
        )
        self.new_context = manager.new_context
        self.component = LeastSites()
        with self.new_context() as fl_ctx:
            fl_ctx.set_prop(FLContextKey.JOB_META, meta, private=True, sticky=True)
        self.fire(EventType.START_RUN)
        self.fire(AppEventType.ROUND_STARTED)

    def fire(self, event: str, fl_ctx: FLContext | None = None) -> None:
        self.component.handle_event(event, fl_ctx or self.new_context())

    def contributes(self, site: str, accepted: bool = True) -> None:
        fl_ctx, peer = self.new_context(), FLContext()
        peer.set_prop(ReservedKey.IDENTITY_NAME, site)
        fl_ctx.set_peer_context(peer)
        fl_ctx.set_prop(AppConstants.AGGREGATION_ACCEPTED, accepted, private=True, sticky=False)
        self.fire(AppEventType.AFTER_CONTRIBUTION_ACCEPT, fl_ctx)

    def stopped(self) -> str:
        """Close the round: what the job is stopped with, or an empty text."""
        self.events.clear()
        self.fire(AppEventType.BEFORE_AGGREGATION)
        return next((told for event, told in self.events if event == EventType.FATAL_SYSTEM_ERROR), "")


def test_a_round_with_too_few_sites_stops_the_job_and_names_those_that_were_there(tmp_path: Path) -> None:
    server = Server(tmp_path, 3)
    for site in ("site-1", "site-2"):
        server.contributes(site)
    # neither a refused contribution nor a second one of a site counts
    server.contributes("site-3", accepted=False)
    server.contributes("site-2")
    told = server.stopped()
    assert told.startswith("E27") and "['site-1', 'site-2']" in told and "at least 3" in told


def test_each_round_is_counted_for_itself(tmp_path: Path) -> None:
    server = Server(tmp_path, 2)
    for site in ("site-1", "site-2"):
        server.contributes(site)
    assert not server.stopped()
    server.fire(AppEventType.ROUND_STARTED)
    server.contributes("site-1")
    assert server.stopped()


def test_a_plan_that_promises_nothing_stops_nothing(tmp_path: Path) -> None:
    assert not Server(tmp_path, None).stopped()


@pytest.mark.parametrize(("there", "stopped"), [(2, True), (3, False)])
def test_a_round_of_fewer_sites_than_the_job_asks_for_stops_it_whatever_is_promised(
    there: int, stopped: bool, tmp_path: Path
) -> None:
    server = Server(tmp_path, None, min_clients=3)
    for site in server.sites[:there]:
        server.contributes(site)
    told = server.stopped()
    assert told.startswith("E27") == stopped
    if stopped:
        assert "['site-1', 'site-2']" in told and "at least 3 sites (min_clients)" in told


@pytest.mark.parametrize(("missing_sites", "stopped"), [("warn", False), ("fail", True)])
def test_a_site_that_is_missing_is_named_and_stops_the_job_if_the_plan_says_so(
    missing_sites: str, stopped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, 2, min_clients=2, missing_sites=missing_sites)
    for site in ("site-1", "site-3"):
        server.contributes(site)
    told = server.stopped()
    assert "2 of 3 sites took part: site-1, site-3; missing: site-2" in caplog.text
    assert told.startswith("E27") == stopped and ("['site-2']" in told) == stopped


def test_who_took_part_in_each_round_is_written_down_and_counted(tmp_path: Path) -> None:
    server = Server(tmp_path, None)
    for number in range(3):
        if number == 2:
            # NVFlare has given it up
            server.sites.remove("site-3")
        with server.new_context() as fl_ctx:
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=True)
        server.fire(AppEventType.ROUND_STARTED)
        for site in ("site-1", "site-2", "site-3")[: 3 if number == 0 else 2]:
            server.contributes(site)
        assert not server.stopped()
    records = [(one["round"], one["sites"], one["missing"]) for one in read_lines(tmp_path / SITES_FILE)]
    assert records[0] == (0, ["site-1", "site-2", "site-3"], [])
    assert records[1:] == [(number, ["site-1", "site-2"], ["site-3"]) for number in (1, 2)]
    assert attendance([tmp_path]) == "site-1 3 of 3 rounds, site-2 3 of 3 rounds, site-3 1 of 3 rounds"
    assert remarks([tmp_path]) == ["site-3: it was missing, in rounds 1, 2"]
    assert attendance([tmp_path / "nothing"]) == ""


@pytest.mark.parametrize("meta", [None, "text", {}, {"job_clients": None}, {"job_clients": ["site-1", {"name": 3}]}])
def test_what_the_server_does_not_say_counts_as_no_site(meta: object) -> None:
    fl_ctx = FLContextManager(identity_name="site-1", job_id="job").new_context()
    fl_ctx.set_prop(FLContextKey.JOB_META, meta, private=True, sticky=True)
    assert sites_of(fl_ctx) == frozenset()


@pytest.mark.parametrize("least", [0, -1, True, 2.0, "3"])
def test_a_promise_is_a_whole_number(least: object) -> None:
    plan = Plan("lesions", "brain_lesion_mri", find_strategy("pfedsam").strategy, least_sites=least)  # type: ignore[arg-type]
    with pytest.raises(PFedSAMError, match=r"E16.*least_sites"):
        plan.checked()


@pytest.mark.parametrize("missing_sites", ["stop", "", None, True])
def test_what_happens_without_a_site_is_one_of_two_words(missing_sites: object) -> None:
    plan = Plan("lesions", "brain_lesion_mri", find_strategy("pfedsam").strategy, missing_sites=missing_sites)  # type: ignore[arg-type]
    with pytest.raises(PFedSAMError, match=r"E16.*missing_sites.*warn, fail"):
        plan.checked()


def promised(job: Path) -> int | None:
    """What the plan promises."""
    return plan_settings(job).get("least_sites")


def test_an_exported_job_promises_what_the_server_waits_for_up_to_three(tmp_path: Path) -> None:
    source = find_job("pfedsam")
    waits = json.loads((source / "app" / "config" / SERVER).read_text())["min_clients"]
    assert waits > PROMISED
    assert promised(export_job(source, tmp_path / "three", server={"min_clients": 3})) == 3
    other = export_job(source, tmp_path / "two", server={"min_clients": 3}, plan={"least_sites": 2})
    assert promised(other) == 2
    assert promised(export_job(source, tmp_path / "none")) is None
    for options, number in (([], 3), (["--min-clients", "2"], 2), (["--least-sites", "5"], 5)):
        out = tmp_path / f"job-{number}"
        assert CliRunner().invoke(app, ["job", "export", "pfedsam", str(out), *options]).exit_code == 0
        assert promised(out) == number


@pytest.mark.parametrize("number", [2, 3, 5])
def test_the_number_of_sites_that_was_asked_for_decides_at_the_start_and_in_each_round(
    number: int, tmp_path: Path
) -> None:
    words = ["--min-clients", str(number), "--missing-sites", "fail"]
    out = tmp_path / "job"
    assert CliRunner().invoke(app, ["job", "export", "pfedsam", str(out), *words]).exit_code == 0
    assert json.loads((out / META).read_text())["min_clients"] == server_settings(out)["min_clients"] == number
    assert plan_settings(out)["missing_sites"] == "fail"
    # a resumed job is a copy of it
    again = export_job(out, tmp_path / "again", server={"num_rounds": 1})
    assert json.loads((again / META).read_text())["min_clients"] == number


def test_a_word_that_says_nothing_of_missing_sites_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["job", "export", "pfedsam", str(tmp_path / "job"), "--missing-sites", "stop"])
    assert done.exit_code != 0 and not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("rule", "count", "least", "refused"),
    [
        ("norm_clipped", 3, 3, False),
        ("mean", 2, 2, False),
        ("krum", 9, 3, True),
        ("median", 9, 3, True),
        ("median", 9, None, False),
        ("trimmed_mean", 4, 3, True),
        ("trimmed_mean", 5, 3, False),
    ],
)
def test_a_rule_that_tells_the_numbers_of_single_sites_is_refused(
    rule: str, count: int, least: int | None, refused: bool
) -> None:
    plan = Plan("demo", "brain_lesion_mri", {"aggregation": rule}, least_sites=least)
    listed = [{"name": f"site-{number}"} for number in range(count)]
    fl_ctx = FLContext()
    fl_ctx.put(FLContextKey.JOB_META, {JobMetaKey.JOB_CLIENTS.value: listed}, private=True, sticky=False)
    if not refused:
        require_enough_sites(fl_ctx, plan, least)
        return
    with pytest.raises(PFedSAMError, match=rf"E27.*'{rule}'"):
        require_enough_sites(fl_ctx, plan, least)


@pytest.mark.parametrize(
    ("downloads", "least", "refused"),
    [
        ({}, 3, False),
        ({}, 4, True),
        ({}, None, False),
        ({"least_size": 4}, 4, False),
        ({"kind": "mixtures", "peers_see_models": True}, 4, False),  # of another agreement
    ],
)
def test_groups_that_may_be_smaller_than_a_site_asks_for_are_refused(
    downloads: dict[str, object], least: int | None, refused: bool
) -> None:
    plan = Plan("demo", "brain_lesion_mri", {"downloads": downloads}, least_sites=least)
    fl_ctx = FLContext()
    listed = [{"name": f"site-{number}"} for number in range(8)]
    fl_ctx.put(FLContextKey.JOB_META, {JobMetaKey.JOB_CLIENTS.value: listed}, private=True, sticky=False)
    if not refused:
        require_enough_sites(fl_ctx, plan, least)
        return
    with pytest.raises(PFedSAMError, match=r"E27.*groups may be of 3.*least_size"):
        require_enough_sites(fl_ctx, plan, least)
