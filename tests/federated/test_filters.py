"""The outgoing filter fails closed, the guard refuses, and both write down what passed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey, ReturnCode, ServerCommandKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.utils.task_utils import apply_filters
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants

from pfedsam.errors import PFedSAMError
from pfedsam.federated import filters
from pfedsam.federated.boundary import FINGERPRINT_KEY, GAP_KEY, METADATA_BY_WEIGHTS, ROUND_KEY
from pfedsam.federated.disabled import DISABLED_FILE
from pfedsam.federated.filters import (
    RECEIVED_FILE,
    SENT_FILE,
    IncomingGuard,
    PersonalisedFilter,
    require_outgoing_filter,
)
from pfedsam.federated.packing import PACKED, PackPayload
from pfedsam.federated.plan import Plan
from pfedsam.federated.privacy import ClipAndNoise
from pfedsam.federated.settings import SiteSettings
from pfedsam.parameters import TensorSpec
from pfedsam.storage.job_plan import PLAN_ID

TASKS = ("train", "submit_model", "validate", "configure")
A, D = "image_encoder.blocks.0.qkv.lora_a", "mask_decoder.mask_tokens.weight"
EXPERT = "image_encoder.blocks.0.mlp.experts.up"
SECRET = "patient-4711"
SHARED = {A: TensorSpec((2, 3), "float32"), D: TensorSpec((4,), "float32")}
PERSONAL = {EXPERT: TensorSpec((2, 2), "float32")}
FINGERPRINT = "ab" * 32
META = {ROUND_KEY: 1, MetaKey.NUM_STEPS_CURRENT_ROUND: 12, FINGERPRINT_KEY: FINGERPRINT}


class Engine:
    """What filters ask of NVFlare's engine: components by id, and the workspace."""

    def __init__(self, root, **components) -> None:
        self.root = root
        self.components = components

    def get_component(self, component_id):
        return self.components.get(component_id)

    def get_workspace(self):
        return self

    def get_root_dir(self):
        return str(self.root)

    def get_run_dir(self, job_id):
        return str(self.root / job_id)

    def get_site_config_dir(self):
        return str(self.root / "local")


def small_plan() -> Plan:
    plan = Plan("demo", "no_bundle_is_needed", {})
    plan._manifests = {"shared": SHARED, "personal": PERSONAL}
    return plan


def context(root, task="train", plan=None, chain=None, peer="site-1") -> FLContext:
    engine = Engine(root, **{PLAN_ID: small_plan() if plan is None else plan})
    fl_ctx = FLContextManager(engine=engine, identity_name="here", job_id="job").new_context()
    fl_ctx.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
    if chain is not None:
        table = {f"{name}/{FilterKey.OUT}": chain for name in TASKS}
        runner = SimpleNamespace(task_result_filters=table)
        fl_ctx.put(FLContextKey.RUNNER, runner, private=True, sticky=False)
    peer_ctx = FLContext()
    peer_ctx.put(ReservedKey.IDENTITY_NAME, peer, private=False, sticky=False)
    fl_ctx.set_peer_context(peer_ctx)
    return fl_ctx


def trained(personal=True, **meta) -> Shareable:
    state = {name: np.full(spec.shape, 0.5, np.float32) for name, spec in SHARED.items()}
    if personal:
        state[EXPERT] = np.ones((2, 2), np.float32)
    return DXO(DataKind.WEIGHT_DIFF, data=state, meta=META | meta).to_shareable()


def arrived(personal=False, **meta) -> Shareable:
    result = trained(personal, **meta)
    result.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: 1})
    result.set_peer_props({ReservedKey.IDENTITY_NAME: "site-1", "more": SECRET})
    return result


def lines(root, name):
    return [json.loads(line) for line in (root / "job" / name).read_text().splitlines()]


# --- the site's outgoing filter ---------------------------------------------------------------------------------------


def test_the_shared_part_leaves_and_the_experts_stay(tmp_path):
    sent = PersonalisedFilter().process(trained(), context(tmp_path))
    assert set(from_shareable(sent).data) == set(SHARED)
    assert sent.get_return_code() == ReturnCode.OK


def test_what_left_is_written_down(tmp_path):
    sent = PersonalisedFilter().process(trained(), context(tmp_path))
    (line,) = lines(tmp_path, SENT_FILE)
    assert line["bytes"] == sum(array.nbytes for array in from_shareable(sent).data.values()) == 40
    assert line["by_group"] == {"lora_a": 24, "decoder_subset": 16}
    assert (line["task"], line["round"], line["tensors"], line["excluded"]) == ("train", 1, 2, 1)
    assert len(line["sha256"]) == 64
    assert line["metadata"] == sorted(META)


@pytest.mark.parametrize(
    "result",
    [
        None,
        "text",
        Shareable(),
        {"weights": 1},
        make_reply(ReturnCode.OK),
        DXO(DataKind.COLLECTION, data={"a": DXO(DataKind.WEIGHT_DIFF, data={})}).to_shareable(),
        trained(**{MetaKey.NUM_STEPS_CURRENT_ROUND: 10**12}),
        trained(**{MetaKey.INITIAL_METRICS: {"val_dice": SECRET}}),
    ],
)
def test_a_result_that_is_not_on_the_list_leaves_as_its_code_only(tmp_path, result):
    assert PersonalisedFilter().process(result, context(tmp_path)) == make_reply("SITE_REFUSED:E19")
    assert lines(tmp_path, SENT_FILE)[0]["reply"] == "SITE_REFUSED:E19"


def test_an_error_reply_loses_its_text(tmp_path):
    failed = make_reply(f"could not read {SECRET}", {ReservedHeaderKey.ERROR: SECRET})
    assert PersonalisedFilter().process(failed, context(tmp_path)) == make_reply(ReturnCode.EXECUTION_EXCEPTION)


def test_a_code_of_the_site_leaves(tmp_path):
    assert PersonalisedFilter().process(make_reply("SITE_REFUSED:E07"), context(tmp_path)) == make_reply(
        "SITE_REFUSED:E07"
    )


@pytest.mark.parametrize(
    ("plan", "code"),
    [(object(), "E29"), (Plan("demo", "no such bundle", {}), "E28"), (Plan("a/b", "x", {}), "E16")],
)
@pytest.mark.parametrize("result", [trained(), make_reply(ReturnCode.OK)])
def test_without_a_right_plan_nothing_leaves(tmp_path, plan, code, result):
    assert PersonalisedFilter().process(result, context(tmp_path, plan=plan)) == make_reply(f"SITE_REFUSED:{code}")


def test_an_unexpected_error_in_the_filter_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(filters, "check_result", lambda *_, **__: 1 / 0)
    assert PersonalisedFilter().process(trained(), context(tmp_path)) == make_reply("SITE_REFUSED:E19")


def test_without_a_context_nothing_leaves():
    assert PersonalisedFilter().process(trained(), None) == make_reply("SITE_REFUSED:E19")


def test_what_cannot_be_written_down_does_not_leave(tmp_path):
    (tmp_path / "job").write_text("a file where the run folder should be")
    assert PersonalisedFilter().process(trained(), context(tmp_path)) == make_reply("SITE_REFUSED:E19")


@pytest.mark.parametrize(
    ("settings", "reply"),
    [
        ('{"may_share": ["lora_a"]}', "SITE_REFUSED:E19"),
        ('{"may_share": []}', "SITE_REFUSED:E19"),
        ('{"may_share": ["lora_a", "decoder_subset"]}', ReturnCode.OK),
        ('{"data_root": "anything"}', ReturnCode.OK),
        ('{"may_share": "lora_a"}', "SITE_REFUSED:E01"),
        ('{"may_share": ["all"]}', "SITE_REFUSED:E01"),
        ('{"may_share": [[]]}', "SITE_REFUSED:E01"),
        ("[]", "SITE_REFUSED:E01"),
        ("no json", "SITE_REFUSED:E01"),
    ],
)
def test_the_site_s_own_ceiling_holds_and_a_wrong_one_lets_nothing_pass(tmp_path, settings, reply):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "pfedsam.json").write_text(settings)
    sent = PersonalisedFilter().process(trained(), context(tmp_path))
    assert sent.get_return_code() == reply
    assert ("DXO" in sent) == (reply == ReturnCode.OK)


def test_applied_by_site_and_job_the_filter_counts_once(tmp_path):
    chain = [PersonalisedFilter(), PersonalisedFilter()]
    fl_ctx = context(tmp_path, chain=chain)
    table = fl_ctx.get_prop(FLContextKey.RUNNER).task_result_filters
    sent = apply_filters("task_result_filters", trained(), fl_ctx, table, "train", FilterKey.OUT)
    assert set(from_shareable(sent).data) == set(SHARED)
    assert len(lines(tmp_path, SENT_FILE)) == 1


def test_applied_by_site_and_job_a_refusal_counts_once_too(tmp_path):
    fl_ctx = context(tmp_path, chain=[PersonalisedFilter(), PersonalisedFilter()])
    table = fl_ctx.get_prop(FLContextKey.RUNNER).task_result_filters
    unknown = DXO(DataKind.WEIGHT_DIFF, data={"spy": np.ones(3, np.float32)}, meta=META).to_shareable()
    sent = apply_filters("task_result_filters", unknown, fl_ctx, table, "train", FilterKey.OUT)
    (line,) = lines(tmp_path, SENT_FILE)
    assert line["reply"] == sent.get_return_code() == "SITE_REFUSED:E19"


@pytest.mark.parametrize("task", ["train", "validate"])
def test_without_a_filter_behind_ours_what_leaves_has_the_digest_of_what_was_checked(tmp_path, task):
    ours = PersonalisedFilter()
    fl_ctx = context(tmp_path, task=task, chain=[ours])
    metrics = {"val_dice": 0.5}
    validated = DXO(DataKind.METRICS, data=metrics).to_shareable()
    sent = ours.process(trained(initial_metrics=metrics) if task == "train" else validated, fl_ctx)
    fl_ctx.set_prop(FLContextKey.TASK_RESULT, sent, private=True, sticky=False)
    ours.handle_event(EventType.AFTER_TASK_RESULT_FILTER, fl_ctx)
    checked, left = lines(tmp_path, SENT_FILE)
    assert (checked["stage"], left["stage"]) == ("checked", "left")
    assert (left["sha256"], left["bytes"]) == (checked["sha256"], checked["bytes"])
    wanted = ["val_dice"] if task == "validate" else sorted([*META, "initial_metrics.val_dice"])
    assert left["metadata"] == checked["metadata"] == wanted


def test_what_leaves_after_the_filters_behind_ours_is_written_down_as_it_is(tmp_path):
    chain = [PersonalisedFilter(), ClipAndNoise(1.0, 0.5), PackPayload("int8")]
    fl_ctx = context(tmp_path, chain=chain)
    table = fl_ctx.get_prop(FLContextKey.RUNNER).task_result_filters
    sent = apply_filters("task_result_filters", trained(), fl_ctx, table, "train", FilterKey.OUT)
    fl_ctx.set_prop(FLContextKey.TASK_RESULT, sent, private=True, sticky=False)
    for one in chain:
        one.handle_event(EventType.AFTER_TASK_RESULT_FILTER, fl_ctx)
    checked, left = lines(tmp_path, SENT_FILE)
    assert checked["filters"] == [
        "PersonalisedFilter()",
        "ClipAndNoise(clip=1.0, noise_multiplier=0.5)",
        "PackPayload(precision='int8')",
    ]
    assert (checked["stage"], left["stage"], left["round"]) == ("checked", "left", 1)
    assert left["bytes"] == checked["bytes"] / 4 and left["sha256"] != checked["sha256"]
    assert left["metadata"] == sorted([*checked["metadata"], PACKED])


def test_the_sentence_stays_in_the_site_s_log(tmp_path, caplog):
    sent = PersonalisedFilter().process(DXO(DataKind.METRICS, data={"val_dice": 1.0}).to_shareable(), context(tmp_path))
    assert "data kind" in caplog.text
    assert sent == make_reply("SITE_REFUSED:E19")


class Lenient(PersonalisedFilter):
    pass


@pytest.mark.parametrize("chain", [None, [], [Lenient()], [IncomingGuard(), PersonalisedFilter()]])
def test_a_job_whose_first_outgoing_filter_is_not_ours_is_refused(tmp_path, chain):
    with pytest.raises(PFedSAMError, match="E15"):
        require_outgoing_filter(context(tmp_path, chain=chain), TASKS)


def test_a_job_that_filters_only_some_tasks_is_refused(tmp_path):
    fl_ctx = context(tmp_path, chain=[PersonalisedFilter()])
    require_outgoing_filter(fl_ctx, TASKS)
    del fl_ctx.get_prop(FLContextKey.RUNNER).task_result_filters["validate/out"]
    with pytest.raises(PFedSAMError, match="'validate'"):
        require_outgoing_filter(fl_ctx, TASKS)


def test_a_filter_of_the_site_scope_is_enough(tmp_path):
    fl_ctx = context(tmp_path, chain=[])
    scope = SimpleNamespace(task_result_filters={FilterKey.OUT: [PersonalisedFilter()]})
    fl_ctx.put(FLContextKey.SCOPE_OBJECT, scope, private=True, sticky=False)
    require_outgoing_filter(fl_ctx, TASKS)


# --- the server's guard -----------------------------------------------------------------------------------------------


def test_the_guard_rebuilds_the_result_with_the_headers_that_aggregation_needs(tmp_path):
    result = arrived()
    result.set_header("note", SECRET)
    kept = IncomingGuard().process(result, context(tmp_path))
    assert kept is not result and SECRET not in repr(kept)
    assert kept.get_cookie(AppConstants.CONTRIBUTION_ROUND) == 1
    assert kept.get_peer_prop(ReservedKey.IDENTITY_NAME, "?") == "site-1"
    (line,) = lines(tmp_path, RECEIVED_FILE)
    assert (line["client"], line["round"], line["bytes"], line["accepted"]) == ("site-1", 1, 40, True)


def test_what_the_site_sent_is_what_the_server_received(tmp_path):
    sent = PersonalisedFilter().process(trained(), context(tmp_path))
    IncomingGuard().process(sent, context(tmp_path))
    assert lines(tmp_path, SENT_FILE)[0]["sha256"] == lines(tmp_path, RECEIVED_FILE)[0]["sha256"]


@pytest.mark.parametrize(
    "result",
    [
        arrived(personal=True),
        arrived(**{MetaKey.NUM_STEPS_CURRENT_ROUND: 10**12}),
        Shareable(),
        DXO(DataKind.WEIGHTS, data={A: np.zeros((2, 3), np.float32)}).to_shareable(),
        None,
    ],
)
def test_the_guard_refuses_with_its_code_and_writes_it_down(tmp_path, result):
    with pytest.raises(PFedSAMError, match="E20"):
        IncomingGuard().process(result, context(tmp_path))
    (line,) = lines(tmp_path, RECEIVED_FILE)
    assert (line["client"], line["accepted"], line["code"]) == ("site-1", False, "E20")


def test_an_unexpected_error_in_the_guard_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(filters, "check_headers", lambda *_, **__: 1 / 0)
    with pytest.raises(PFedSAMError, match="E20"):
        IncomingGuard().process(arrived(), context(tmp_path))


def test_a_site_cannot_change_its_weight_in_the_average_by_more_than_a_factor_of_ten(tmp_path):
    guard = IncomingGuard()
    fl_ctx = context(tmp_path)
    for steps in (12, 120, 2):
        guard.process(arrived(**{MetaKey.NUM_STEPS_CURRENT_ROUND: steps}), fl_ctx)
    for steps in (121, 1):
        with pytest.raises(PFedSAMError, match="training cases"):
            guard.process(arrived(**{MetaKey.NUM_STEPS_CURRENT_ROUND: steps}), fl_ctx)
    guard.process(arrived(**{MetaKey.NUM_STEPS_CURRENT_ROUND: 900}), context(tmp_path, peer="site-2"))
    guard.handle_event(EventType.START_RUN, fl_ctx)
    guard.process(arrived(**{MetaKey.NUM_STEPS_CURRENT_ROUND: 121}), fl_ctx)


def test_a_site_on_other_base_weights_is_refused(tmp_path):
    fl_ctx = context(tmp_path)
    model = make_model_learnable({}, {FINGERPRINT_KEY: "cd" * 32})
    fl_ctx.put(AppConstants.GLOBAL_MODEL, model, private=True, sticky=False)
    with pytest.raises(PFedSAMError, match="other base weights"):
        IncomingGuard().process(arrived(), fl_ctx)


def test_a_site_that_nvflare_has_disabled_does_not_count_in_the_job_that_runs(tmp_path):
    from nvflare.private.fed.server.client_manager import ClientManager

    manager, guard, fl_ctx = ClientManager("server"), IncomingGuard(), context(tmp_path)
    manager.set_disabled_clients_file(str(tmp_path / DISABLED_FILE))
    guard.process(arrived(), fl_ctx)
    manager.disable_client("site-1")
    with pytest.raises(PFedSAMError, match="E20: the administrator has disabled site 'site-1'"):
        guard.process(arrived(), fl_ctx)
    guard.process(arrived(), context(tmp_path, peer="site-2"))
    manager.enable_client("site-1")
    guard.process(arrived(), fl_ctx)


def test_a_list_of_disabled_sites_that_cannot_be_read_is_told_and_stops_no_job(tmp_path, caplog):
    (tmp_path / DISABLED_FILE).write_text("{")
    IncomingGuard().process(arrived(), context(tmp_path))
    assert DISABLED_FILE in caplog.text


def test_a_site_cannot_speak_in_the_name_of_another(tmp_path):
    result = arrived()
    result.set_header(ServerCommandKey.FL_CLIENT, Client("site-2", "secret-token"))
    with pytest.raises(PFedSAMError, match="site-2"):
        IncomingGuard().process(result, context(tmp_path))
    result.set_header(ServerCommandKey.FL_CLIENT, Client("site-1", "secret-token"))
    assert "secret-token" not in repr(IncomingGuard().process(result, context(tmp_path)))


def test_a_failed_site_passes_the_guard_as_its_code(tmp_path):
    failed = make_reply("SITE_REFUSED:E07", {ReservedHeaderKey.COOKIE_JAR: {AppConstants.MODEL_OWNER: "SRV_x"}})
    kept = IncomingGuard().process(failed, context(tmp_path, task="validate"))
    assert kept.get_return_code() == "SITE_REFUSED:E07"
    assert kept.get_cookie(AppConstants.MODEL_OWNER) == "SRV_x"


@pytest.mark.parametrize(("number", "cookie"), [(0, 0), (0, 1), (1, 0), (2, 2)])
def test_an_update_of_another_round_is_refused(tmp_path, number, cookie):
    fl_ctx = context(tmp_path)
    fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 1, private=True, sticky=True)
    IncomingGuard().process(arrived(), fl_ctx)
    old = arrived(**{ROUND_KEY: number})
    old.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: cookie})
    with pytest.raises(PFedSAMError, match=r"E20.*this is round 1"):
        IncomingGuard().process(old, fl_ctx)


def test_more_cases_than_were_agreed_on_count_as_those(tmp_path, caplog):
    plan = small_plan()
    plan.most_cases = {"site-1": 10}
    kept = IncomingGuard().process(arrived(), context(tmp_path, plan=plan))
    assert from_shareable(kept).get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND) == 10
    assert from_shareable(kept).get_meta_prop(FINGERPRINT_KEY) == FINGERPRINT
    assert kept.get_cookie(AppConstants.CONTRIBUTION_ROUND) == 1
    (line,) = lines(tmp_path, RECEIVED_FILE)
    assert (line["cases"], line["counted"], line["norm"]) == (12, 10, pytest.approx(0.5 * 10**0.5))
    assert "12 training cases, 10 were agreed on" in caplog.text
    plan.most_cases = 12
    kept = IncomingGuard().process(arrived(), context(tmp_path, plan=plan))
    assert from_shareable(kept).get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND) == 12


@pytest.mark.parametrize("most", [0, -1, True, "10", {"site-1": 0}, {"site-1": 1.5}])
def test_an_agreement_on_cases_is_whole_numbers(most):
    with pytest.raises(PFedSAMError, match=r"E16.*most_cases"):
        Plan("demo", "brain_lesion_mri", {}, most_cases=most).checked()


def test_widgets_of_the_server_see_what_the_guard_has_checked(tmp_path):
    """NVFlare's widgets take a result from the peer's context, where it is as it was submitted."""
    fl_ctx = context(tmp_path)
    submitted = arrived(**{MetaKey.INITIAL_METRICS: {"val_dice": 0.123456}})
    fl_ctx.get_peer_context().set_prop(FLContextKey.SHAREABLE, submitted, private=True, sticky=True)
    kept = IncomingGuard().process(submitted, fl_ctx)
    assert fl_ctx.get_peer_context().get_prop(FLContextKey.SHAREABLE) is kept
    forged = arrived(**{MetaKey.INITIAL_METRICS: {"val_dice": 1e9}})
    fl_ctx.get_peer_context().put(FLContextKey.SHAREABLE, forged, private=True, sticky=True)
    with pytest.raises(PFedSAMError):
        IncomingGuard().process(forged, fl_ctx)
    shown = fl_ctx.get_peer_context().get_prop(FLContextKey.SHAREABLE)
    assert "1000000000" not in repr(shown)
    assert shown.get_return_code() == ReturnCode.TASK_RESULT_FILTER_ERROR


# --- a number that one kind of weights asks for -----------------------------------------------------------------------


def weighing(weights: str) -> Plan:
    plan = small_plan()
    plan.strategy = {"weights": weights}
    return plan


@pytest.mark.parametrize("weights", ["cases", "uniform", "dro", "gaa"])
def test_the_gap_leaves_and_is_taken_in_exactly_one_kind_of_strategy(tmp_path, weights):
    fine = weights == "gaa"
    fl_ctx = context(tmp_path, plan=weighing(weights))
    sent = PersonalisedFilter().process(trained(**{GAP_KEY: 0.123}), fl_ctx)
    assert sent.get_return_code() == (ReturnCode.OK if fine else "SITE_REFUSED:E19")
    if fine:
        assert from_shareable(sent).meta[GAP_KEY] == 0.12
        assert GAP_KEY in lines(tmp_path, SENT_FILE)[0]["metadata"]
        taken = IncomingGuard().process(arrived(**{GAP_KEY: 0.123}), fl_ctx)
        assert from_shareable(taken).meta[GAP_KEY] == 0.12
        return
    with pytest.raises(PFedSAMError, match=f"E20.*{GAP_KEY}"):
        IncomingGuard().process(arrived(**{GAP_KEY: 0.123}), fl_ctx)


@pytest.mark.parametrize(
    ("settings", "reply"),
    [
        ('{"may_tell": []}', "SITE_REFUSED:E19"),
        ('{"may_tell": ["pfedsam_gap"]}', ReturnCode.OK),
        ("{}", ReturnCode.OK),
        ('{"may_tell": ["val_dice"]}', "SITE_REFUSED:E01"),
        ('{"may_tell": "pfedsam_gap"}', "SITE_REFUSED:E01"),
    ],
)
def test_a_site_that_does_not_tell_the_gap_lets_none_pass(tmp_path, settings, reply):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "pfedsam.json").write_text(settings)
    fl_ctx = context(tmp_path, plan=weighing("gaa"))
    assert PersonalisedFilter().process(trained(**{GAP_KEY: 0.1}), fl_ctx).get_return_code() == reply


def test_a_site_can_name_every_number_that_a_strategy_may_ask_for():
    names = [name for kind in METADATA_BY_WEIGHTS.values() for name in kind]
    assert SiteSettings(may_tell=names).allowed(names) == tuple(names)
    assert SiteSettings().allowed(names) == tuple(names) and SiteSettings(may_tell=()).allowed(names) == ()
    # a site that asks for noise tells no number without noise, unless it says so
    assert SiteSettings(least_noise=1.0).allowed(names) == ()
    assert SiteSettings(least_noise=1.0, may_tell=names).allowed(names) == tuple(names)
