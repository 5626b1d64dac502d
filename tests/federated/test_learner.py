"""The learner between NVFlare and a site's training: what it refuses at the start, and what it hands over."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import nvflare
import pytest
import torch
from nvflare.apis.client import Client
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.executors.model_learner_executor import ModelLearnerExecutor

from pfedsam import __version__
from pfedsam.errors import PFedSAMError
from pfedsam.federated import learner as module
from pfedsam.federated import settings as settings_module
from pfedsam.federated.boundary import FINGERPRINT_KEY, GAP_KEY, METADATA, check_result, told_names
from pfedsam.federated.global_dice import fall
from pfedsam.federated.learner import STARTED, PFedSAMLearner
from pfedsam.federated.plan import Plan
from pfedsam.federated.scalars import ListedScalars
from pfedsam.federated.versions import VERSIONS_KEY, installed_versions
from pfedsam.parameters import COPY, TensorSpec
from pfedsam.storage.job_plan import CLIENT, PLAN_ID
from pfedsam.storage.site_model import SiteModel, read
from pfedsam.storage.state import SiteState
from pfedsam.storage.state_files import BEST, CURRENT
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.round_result import RoundResult

SITE, JOB, BUNDLE, FEDERATION = "site-1", "job", "brain_lesion_mri", "lesions"
A, EXPERT = "image_encoder.blocks.0.qkv.lora_a", "image_encoder.blocks.0.mlp.experts.up"
SHARED = {A: TensorSpec((2, 3), "float32")}
FINGERPRINT = "ab" * 32
GLOBAL_DICE, PERSONAL_DICE = 0.123456, 0.654321


class Training:
    """What the learner asks of `SiteTrainer`."""

    fingerprint, weight = FINGERPRINT, 4
    network = trainer = SimpleNamespace(state=SimpleNamespace(device="cpu"))
    cases, validation_cases = [1, 2, 3, 4], [5, 6]
    answers, global_dice = True, GLOBAL_DICE

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.restored: list[SiteModel] = []
        self.validated: list[bool] = []

    def open(self) -> None:
        pass

    def restore(self, model: SiteModel) -> None:
        self.restored.append(model)

    def receive(self, theta: Any, fingerprint: str | None) -> None:
        assert fingerprint == FINGERPRINT

    def validates(self, number: int) -> bool:
        return (number + 1) % self.strategy.validate_every == 0

    def validate(self, experts: bool, in_round: bool = False) -> dict[str, float]:
        self.validated.append(in_round)
        return {"val_dice": PERSONAL_DICE if experts else type(self).global_dice}

    def personal_dice(self, number: int) -> float | None:
        return PERSONAL_DICE

    def train(self, number: int) -> RoundResult:
        return RoundResult({A: torch.ones(2, 3)}, {EXPERT: torch.ones(2, 2)})

    finish = train

    def model(self, **info: Any) -> SiteModel:
        return saved(self.strategy.name, **info)


def saved(strategy: str, copy: bool = False, **info: Any) -> SiteModel:
    """A state of a strategy, with tensors of any name."""
    roles = find_strategy(strategy).checked().roles
    told = {"roles": {"shared": list(roles.shared), "personal": list(roles.personal)}, "strategy": strategy}
    own = {f"{COPY}{A}": torch.ones(2)} if copy else {}
    return SiteModel({A: torch.ones(2)}, own, {}, {"fingerprint": FINGERPRINT, "round": 0, **told, **info})


class Engine:
    """NVFlare's engine and workspace of a site in one."""

    def __init__(self, root: Path, **components: Any) -> None:
        self.root, self.components = root, components

    def get_component(self, name: str) -> Any:
        return self.components.get(name)

    def fire_event(self, event: str, fl_ctx: FLContext) -> None:
        pass

    def get_workspace(self) -> Engine:
        return self

    def get_root_dir(self) -> str:
        return str(self.root)

    def get_run_dir(self, job: str) -> str:
        return str(self.root / job)

    def get_app_dir(self, job: str) -> str:
        return str(self.root / job / "app")

    def get_site_config_dir(self) -> str:
        return str(self.root / "local")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The workspace of a site with a job's configuration, and nothing of `pfedsam site init`."""
    for folder in ("startup", "local", "job/app/config"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "job" / "app" / "config" / CLIENT).write_text("{}")
    return tmp_path


def context(root: Path, strategy: str = "pfedsam", simulated: bool = False, **changes: Any) -> FLContext:
    plan = Plan(FEDERATION, BUNDLE, {**find_strategy(strategy).strategy, **changes})
    engine = Engine(root, **{PLAN_ID: plan})
    fl_ctx = FLContextManager(engine=engine, identity_name=SITE, job_id=JOB).new_context()
    fl_ctx.set_prop(FLContextKey.WORKSPACE_ROOT, str(root), private=True, sticky=True)
    fl_ctx.set_prop(FLContextKey.CURRENT_RUN, JOB, private=False, sticky=True)
    fl_ctx.set_prop(FLContextKey.SIMULATE_MODE, simulated, private=True, sticky=True)
    return fl_ctx


def executor() -> ModelLearnerExecutor:
    made = ModelLearnerExecutor("learner")
    made.learner = PFedSAMLearner()
    return made


def run(
    made: ModelLearnerExecutor,
    fl_ctx: FLContext,
    task: str,
    number: int | None = None,
    versions: str | None = installed_versions(),
) -> Shareable:
    """The result of a task as NVFlare makes it of what the learner returns."""
    told = {FINGERPRINT_KEY: FINGERPRINT, **({} if versions is None else {VERSIONS_KEY: versions})}
    data = DXO(DataKind.WEIGHTS, data={A: np.zeros((2, 3), np.float32)}, meta=told).to_shareable()
    # as NVFlare's client runner does
    fl_ctx.set_prop(FLContextKey.TASK_DATA, data, private=True, sticky=False)
    if number is not None:
        data.set_header(AppConstants.CURRENT_ROUND, number)
    return made.execute(task, data, fl_ctx, Signal())


# a site whose logs would leave ----------------------------------------------------------------------------------------


def set_streaming(root: Path, allowed: bool) -> None:
    (root / "local" / "resources.json").write_text(json.dumps({"allow_log_streaming": allowed}))


@pytest.mark.parametrize("task", ["train", "validate"])
def test_a_site_that_nobody_has_made_ready_refuses_before_anything_else(
    site: Path, task: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("require_literal", "require_trainable", "site_folder"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something else came first"))
    reply = run(executor(), context(site), task, 0).get_return_code()
    assert reply == "SITE_REFUSED:E01"
    assert "pfedsam site init <kit>" in caplog.text
    # the sentence leaves with the log that it is in
    assert str(site) not in caplog.text and "Traceback" not in caplog.text


def test_a_kit_that_was_provisioned_with_log_streaming_is_refused(site: Path) -> None:
    set_streaming(site, True)
    assert run(executor(), context(site), "train", 0).get_return_code() == "SITE_REFUSED:E01"


def test_a_site_that_still_runs_with_its_settings_of_before_is_refused(site: Path) -> None:
    set_streaming(site, False)
    sender = {"id": "auto_log_streamer", "path": "nvflare.app_common.logging.job_log_streamer.JobLogStreamer"}
    (site / JOB / "app" / "config" / CLIENT).write_text(json.dumps({"components": [sender]}))
    assert run(executor(), context(site), "train", 0).get_return_code() == "SITE_REFUSED:E01"


@pytest.mark.parametrize("simulated", [True, False])
def test_where_no_log_leaves_and_in_the_simulator_the_next_question_is_the_filter(site: Path, simulated: bool) -> None:
    if not simulated:
        set_streaming(site, False)
    assert run(executor(), context(site, simulated=simulated), "train", 0).get_return_code() == "SITE_REFUSED:E15"


def test_rounds_may_be_validated_on_a_draw_and_the_rest_on_all_cases(ready: Path, curves: list[Any]) -> None:
    made, fl_ctx = executor(), context(ready)
    validated = {}
    for task, number in (
        (AppConstants.TASK_TRAIN, 0),
        (AppConstants.TASK_CONFIGURE, 1),
        (AppConstants.TASK_VALIDATION, None),
    ):
        run(made, fl_ctx, task, number)
        validated[task] = set(made.learner._local.validated)
        made.learner._local.validated.clear()
    assert validated == {"train": {True}, "configure": {False}, "validate": {False}}


@pytest.mark.parametrize("least", [3, 25])
def test_what_the_site_says_of_its_data_reaches_the_training(ready: Path, monkeypatch, curves, least: int) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "require_trainable", lambda *_, **more: given.update(more))
    monkeypatch.setattr(
        module, "SiteTrainer", lambda bundle, folder, strategy, *_, **more: given.update(more) or Training(strategy)
    )
    set_site(ready, prepared_root=str(ready / "prepared"), labels={"7": "lesion"}, least_validation_cases=least)
    run(executor(), context(ready), AppConstants.TASK_TRAIN, 0)
    folder = ready / "prepared" / SITE
    assert given["prepared"] == folder and given["label_map"] == {"7": "lesion"}
    assert folder.stat().st_mode & 0o777 == 0o700 and given["least_validated"] == max(least, 10)


# another version at the server ----------------------------------------------------------------------------------------

OTHER = installed_versions().replace(__version__, "99.0")


@pytest.mark.parametrize("versions", [OTHER, installed_versions().replace(nvflare.__version__, "2.7.0"), None])
@pytest.mark.parametrize("task", ["train", "validate", "configure"])
def test_a_site_of_another_version_refuses_before_it_reads_the_plan_or_data(
    ready: Path, task: str, versions: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("plan_of", "require_trainable", "site_folder"):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something else came first"))
    reply = run(executor(), context(ready), task, 0, versions).get_return_code()
    # NVFlare gives a failed `configure` a code of its own; the sentence stays in the site's log
    assert reply == ("EXECUTION_EXCEPTION" if task == "configure" else "SITE_REFUSED:E22")
    assert installed_versions() in caplog.text and (versions or "an earlier one") in caplog.text


def test_a_job_of_another_version_stays_refused(ready: Path, curves: list[Any]) -> None:
    made, fl_ctx = executor(), context(ready)
    for versions in (OTHER, installed_versions()):
        assert run(made, fl_ctx, "train", 0, versions).get_return_code() == "SITE_REFUSED:E22"


# what leaves of the validation ----------------------------------------------------------------------------------------


@pytest.fixture
def ready(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site that is ready to train, with `Training` in the place of the real one."""
    set_streaming(site, False)
    monkeypatch.setattr(module, "require_outgoing_filter", lambda *_: None)
    monkeypatch.setattr(module, "outgoing_filters", lambda *_: [])
    monkeypatch.setattr(module, "require_trainable", lambda *_, **__: None)
    monkeypatch.setattr(module, "SiteTrainer", lambda bundle, folder, strategy, *_, **__: Training(strategy))
    (site / "data" / "images").mkdir(parents=True)
    set_site(site)
    return site


def set_site(root: Path, **more: Any) -> None:
    told = {"data_root": str(root / "data"), "state_root": str(root / "states"), "threads": 1, **more}
    (root / "local" / "pfedsam.json").write_text(json.dumps(told))


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Every scalar that the learner sends."""
    sent: list[tuple[str, float]] = []
    sender = SimpleNamespace(send=lambda tag, value, step: sent.append((tag, value)))
    monkeypatch.setattr(PFedSAMLearner, "_find_scalars", lambda *_: sender)
    return sent


def passed(result: Shareable, task: str) -> list[str]:
    """Names of what has passed the allow-list beside the tensors."""
    found = check_result(result, task, shared=SHARED, personal=[EXPERT], code="E19")
    assert found.shareable.get_return_code() == "OK"
    return told_names(found.metadata)


def test_of_a_validated_round_the_dice_leaves_and_no_number_of_cases(ready: Path, curves: list[Any]) -> None:
    made, fl_ctx = executor(), context(ready)
    result = run(made, fl_ctx, "train", 0)
    assert from_shareable(result).meta[MetaKey.INITIAL_METRICS] == {"val_dice": GLOBAL_DICE}
    assert passed(result, "train") == sorted([*METADATA, "initial_metrics.val_dice"])
    assert passed(run(made, fl_ctx, "validate"), "validate") == ["val_dice"]
    assert [tag for tag, _ in curves] == ["val_dice_global", "val_dice_personal"]


def test_of_a_round_that_is_not_validated_the_update_alone_leaves(
    ready: Path, curves: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    result = run(executor(), context(ready, validate_every=3), "train", 0)
    assert passed(result, "train") == sorted(METADATA)
    # NVFlare takes it for no mistake
    assert "metrics" not in caplog.text


@pytest.mark.parametrize(("may_tell", "told"), [(None, True), ([GAP_KEY], True), ([], False)])
def test_the_gap_goes_with_the_update_unless_the_site_leaves_it_out(
    ready: Path, curves: list[Any], monkeypatch: pytest.MonkeyPatch, may_tell: Any, told: bool
) -> None:
    monkeypatch.setattr(Training, "train", lambda *_: RoundResult({A: torch.ones(2, 3)}, {}, gap=0.12))
    set_site(ready, **({} if may_tell is None else {"may_tell": may_tell}))
    result = run(executor(), context(ready, weights="gaa"), "train", 0)
    assert result.get_return_code() == "OK" and from_shareable(result).meta.get(GAP_KEY) == (0.12 if told else None)


@pytest.mark.parametrize(("least", "told"), [(2, True), (3, False)])
def test_a_site_with_too_few_validation_cases_tells_no_dice(
    ready: Path, curves: list[Any], least: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    set_site(ready, least_validation_cases=least)
    made, fl_ctx = executor(), context(ready)
    assert ("initial_metrics.val_dice" in passed(run(made, fl_ctx, "train", 0), "train")) == told
    assert passed(run(made, fl_ctx, "validate"), "validate") == ["val_dice"] * told
    run(made, fl_ctx, "configure", 1)
    assert len([tag for tag, _ in curves if tag.startswith("val_dice")]) == (4 if told else 0)
    # the site itself has it
    assert "global Dice 0.123, personal Dice 0.654" in caplog.text
    entry = SiteState(ready / "states", FEDERATION, SITE, BUNDLE, FINGERPRINT).load()
    assert entry is not None and entry.info["val_dice_personal"] == PERSONAL_DICE


@pytest.mark.parametrize(("simulated", "told"), [(False, False), (True, True)])
def test_a_global_model_that_predicts_nothing_or_everything_gets_no_answer(
    ready: Path,
    curves: list[Any],
    simulated: bool,
    told: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Training, "answers", False)
    made, fl_ctx = executor(), context(ready, simulated=simulated)
    assert ("initial_metrics.val_dice" in passed(run(made, fl_ctx, "train", 0), "train")) == told
    assert passed(run(made, fl_ctx, "validate"), "validate") == ["val_dice"] * told
    run(made, fl_ctx, "configure", 1)
    assert len([tag for tag, _ in curves if tag.startswith("val_dice")]) == (4 if told else 0)
    assert ("it is not sent" in caplog.text) != told


@pytest.mark.parametrize(
    ("asked", "simulated", "sent"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_curves_are_off_outside_the_simulator_unless_the_site_says_otherwise(
    ready: Path, asked: bool | None, simulated: bool, sent: bool
) -> None:
    if asked is not None:
        set_site(ready, curves=asked)
    made, fl_ctx, scalars = executor(), context(ready, simulated=simulated), ListedScalars()
    fl_ctx.get_engine().components["scalars"] = scalars
    assert run(made, fl_ctx, "train", 0).get_return_code() == "OK"
    assert (made.learner._scalars is scalars) == sent


# a global model that was spoilt ---------------------------------------------------------------------------------------


def test_a_global_model_that_is_far_worse_than_before_is_told_in_the_log_and_nowhere_else(
    ready: Path, curves: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    for number, dice in enumerate((0.6, 0.45, 0.2, 0.5)):
        monkeypatch.setattr(Training, "global_dice", dice)
        caplog.clear()
        # a site that starts again for each round has the value from its state
        made, fl_ctx = executor(), context(ready)
        left.append(passed(run(made, fl_ctx, "train", number), "train"))
        made.learner.finalize()
        warned = "is 0.200, it was 0.600 at best" in caplog.text
        assert warned == (dice == 0.2) and ("made to do harm" in caplog.text) == warned
    assert left == [sorted([*METADATA, "initial_metrics.val_dice"])] * 4
    assert {tag for tag, _ in curves} == {"val_dice_global", "val_dice_personal"}


@pytest.mark.parametrize(
    ("dice", "best", "fell"),
    [
        (0.1, None, False),
        (0.1, 0.0, False),
        (0.04, 0.13, False),
        (0.02, 0.13, True),
        (0.31, 0.6, False),
        (0.0, 1.0, True),
    ],
)
def test_a_fall_is_below_half_of_the_best_and_by_a_tenth(dice: float, best: float | None, fell: bool) -> None:
    assert bool(fall(dice, best)) == fell


def test_a_round_that_is_not_validated_is_not_validated_for_the_comparison(
    ready: Path, curves: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "validate", lambda *_, **__: pytest.fail("nobody has asked"))
    made, fl_ctx = executor(), context(ready, validate_every=3)
    assert run(made, fl_ctx, "train", 0).get_return_code() == "OK"
    entry = made.learner._state.load()
    assert (
        entry is not None and "val_dice_global" not in entry.info and entry.info["val_dice_personal"] == PERSONAL_DICE
    )


def test_the_state_of_a_validated_round_has_both_dice_and_is_kept_as_the_best(ready: Path, curves: list[Any]) -> None:
    made, fl_ctx = executor(), context(ready)
    run(made, fl_ctx, "train", 0)
    info = read(made.learner._state.folder / BEST).info
    assert (info["val_dice_global"], info["val_dice_personal"], info["round"]) == (GLOBAL_DICE, PERSONAL_DICE, 0)


# a federation of too few sites ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "sites", "promised", "code"),
    [
        (None, 0, None, "OK"),
        (3, 3, 3, "OK"),
        (2, 3, 2, "OK"),
        (3, 2, 3, "SITE_REFUSED:E27"),
        (3, 3, 2, "SITE_REFUSED:E27"),
        (3, 3, None, "SITE_REFUSED:E27"),
        # the server says nothing
        (3, 0, 3, "SITE_REFUSED:E27"),
    ],
)
def test_a_site_takes_part_with_as_many_sites_as_it_asks_for(
    ready: Path, curves: list[Any], least: int | None, sites: int, promised: int | None, code: str
) -> None:
    set_site(ready, **({} if least is None else {"least_sites": least}))
    fl_ctx = context(ready)
    fl_ctx.get_engine().get_component(PLAN_ID).least_sites = promised
    if sites:
        meta = {"job_clients": [Client(f"site-{number}", "token").to_dict() for number in range(sites)]}
        fl_ctx.set_prop(FLContextKey.JOB_META, meta, private=True, sticky=True)
    assert run(executor(), fl_ctx, "train", 0).get_return_code() == code


@pytest.mark.parametrize(
    ("downloads", "told", "code"),
    [
        ({"kind": "mixtures", "peers_see_models": True}, {}, "SITE_REFUSED:E35"),
        ({"kind": "mixtures", "peers_see_models": True}, {"peers_see_my_model": False}, "SITE_REFUSED:E35"),
        ({"kind": "mixtures", "peers_see_models": True}, {"peers_see_my_model": True}, "OK"),
        ({"least_size": 2, "peers_see_models": True}, {}, "SITE_REFUSED:E35"),
        ({"kind": "mixtures"}, {"peers_see_my_model": True}, "SITE_REFUSED:E16"),
        ({}, {}, "OK"),
        ({}, {"peers_see_my_model": "yes"}, "SITE_REFUSED:E01"),
    ],
    ids=str,
)
def test_what_tells_another_site_this_sites_model_needs_its_own_word(
    ready: Path, curves: list[Any], downloads: dict[str, Any], told: dict[str, Any], code: str
) -> None:
    set_site(ready, **told)
    assert run(executor(), context(ready, downloads=downloads), "train", 0).get_return_code() == code


# what a site allows ---------------------------------------------------------------------------------------------------


def kept(ready: Path) -> SiteModel | None:
    return SiteState(ready / "states", FEDERATION, SITE, BUNDLE, FINGERPRINT).load()


@pytest.mark.parametrize(("allowed", "reply"), [(2, "SITE_REFUSED:E26"), (3, "OK")])
def test_more_epochs_in_a_round_than_the_site_allows_are_refused_at_the_start(
    ready: Path, curves: list[Any], allowed: int, reply: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A round has two phases of 1 and 2 epochs."""
    set_site(ready, most_epochs=allowed)
    phase = {"trains": ["shared"], "experts": False}
    phases = [{"name": "one", "epochs": 1, **phase}, {"name": "two", "epochs": 2, **phase}]
    made, fl_ctx = executor(), context(ready, phases=phases, final=[], interpolation=1)
    for task in ("train", "validate", "configure"):
        told = run(made, fl_ctx, task, 0).get_return_code()
        assert told == reply or (task == "configure" and told == "EXECUTION_EXCEPTION" and reply != "OK")
    assert (f"3 epochs in a round, this site allows {allowed}" in caplog.text) == (reply != "OK")


@pytest.mark.parametrize(("allowed", "reply"), [(3, "SITE_REFUSED:E26"), (4, "OK")])
def test_more_epochs_in_the_final_phase_than_the_site_allows_are_refused(
    ready: Path, curves: list[Any], allowed: int, reply: str
) -> None:
    set_site(ready, most_epochs=allowed)
    assert run(executor(), context(ready), "train", 0).get_return_code() == reply


@pytest.mark.parametrize(("allowed", "refused"), [(8, True), (9, False)])
def test_the_epochs_of_a_cross_fit_count(ready: Path, curves: list[Any], allowed: int, refused: bool) -> None:
    set_site(ready, most_epochs=allowed)
    strategy = find_strategy("longer_ft_chosen").checked()
    assert strategy.serving is not None
    short = strategy.model_copy(
        update={
            "serving": strategy.serving.model_copy(update={"folds": 2, "epochs": (1, 3)}),
            "phases": (),
        }
    )
    if not refused:
        settings_module.require_epochs(short, settings_module.read_settings(ready / "local" / "pfedsam.json"))
        return
    with pytest.raises(PFedSAMError, match=r"E26.*9 epochs in the final phase"):
        settings_module.require_epochs(short, settings_module.read_settings(ready / "local" / "pfedsam.json"))


def test_a_round_after_the_last_that_the_site_allows_is_refused_and_the_state_kept(
    ready: Path, curves: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    set_site(ready, most_rounds=2)
    made, fl_ctx = executor(), context(ready)
    replies = [run(made, fl_ctx, "train", number).get_return_code() for number in (0, 1, 2, 9_999, 1)]
    assert replies == ["OK", "OK", "SITE_REFUSED:E26", "SITE_REFUSED:E26", "OK"]
    assert "round 3, this site allows 2" in caplog.text
    # the final phase is no round
    assert run(made, fl_ctx, "configure", 2).get_return_code() == "OK"
    state = kept(ready)
    assert state is not None and state.info["round"] == 2 and state.info["final"]


def test_when_its_hours_are_over_the_site_stops_keeps_its_state_and_answers(
    ready: Path, curves: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_site(ready, most_hours=2)
    clock = [1000.0]
    monkeypatch.setattr(settings_module.time, "time", lambda: clock[0])
    made, fl_ctx = executor(), context(ready)
    assert run(made, fl_ctx, "train", 0).get_return_code() == "OK"
    stops = made.learner._local.trainer.should_stop
    clock[0] += 2 * 3600 - 1
    assert not stops() and run(made, fl_ctx, "train", 1).get_return_code() == "OK"

    def slow(number: int) -> RoundResult:
        clock[0] += 1  # in the middle of a round
        assert stops()
        return RoundResult({A: torch.ones(2, 3)}, {})

    monkeypatch.setattr(made.learner._local, "train", slow)
    assert run(made, fl_ctx, "train", 2).get_return_code() == "SITE_REFUSED:E26"
    assert run(made, fl_ctx, "validate").get_return_code() == "SITE_REFUSED:E26"
    assert run(made, fl_ctx, "configure", 3).get_return_code() != "OK"
    assert "more time, this site allows 2 hours" in caplog.text
    state = kept(ready)
    assert state is not None and state.info["round"] == 1 and not state.info["final"]
    # a learner that is built anew for the same job has no more time than the one before
    made.learner.finalize()
    assert run(executor(), fl_ctx, "train", 1).get_return_code() == "SITE_REFUSED:E26"


def test_a_site_without_limits_takes_any_round(ready: Path, curves: list[Any]) -> None:
    assert run(executor(), context(ready), "train", 123_456).get_return_code() == "OK"
    assert not (ready / JOB / STARTED).exists()


# the state of another strategy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["fedavg_lora", "fedrep"])
def test_a_state_of_another_strategy_is_neither_taken_nor_overwritten(
    ready: Path, curves: list[Any], job: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = SiteState(ready / "states", FEDERATION, SITE, BUNDLE, FINGERPRINT)
    state.open()
    state.save(saved("ditto", copy=True))
    state.close()
    kept = (state.folder / CURRENT).read_bytes()
    made, fl_ctx = executor(), context(ready, strategy=job)
    for number in range(2):
        assert run(made, fl_ctx, "train", number).get_return_code() == "SITE_REFUSED:E13"
    assert (state.folder / CURRENT).read_bytes() == kept
    assert made.learner._local.restored == []
    for word in (str(state.folder), "'ditto'", f"'{job}'", f"pfedsam state delete {FEDERATION} {SITE}"):
        assert word in caplog.text


def test_a_state_of_the_same_strategy_is_gone_on_from(ready: Path, curves: list[Any]) -> None:
    for number in range(2):
        made, fl_ctx = executor(), context(ready)
        assert run(made, fl_ctx, "train", number).get_return_code() == "OK"
        assert len(made.learner._local.restored) == number
        made.learner.finalize()
