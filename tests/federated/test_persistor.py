"""The server's global model: shared tensors only, as safetensors, with the fingerprint travelling along."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.shareable import make_reply
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_opt.pt.file_model_locator import PTFileModelLocator
from torch import nn

from pfedsam.errors import PFedSAMError
from pfedsam.federated import persistor as module
from pfedsam.federated.boundary import FINGERPRINT_KEY
from pfedsam.federated.final_phase import FinalPersonalPhase
from pfedsam.federated.persistor import BEST_GLOBAL_MODEL_FILE, GLOBAL_MODEL_FILE, SharedStatePersistor
from pfedsam.federated.plan import Plan
from pfedsam.federated.versions import VERSIONS_KEY, installed_versions
from pfedsam.parameters import Roles, TensorSpec
from pfedsam.storage.global_model import read_global_model, write_global_model
from pfedsam.storage.job_plan import PLAN_ID, SERVER

A, D = "image_encoder.blocks.0.lora_a", "mask_decoder.mask_tokens.weight"
SHARED = {A: TensorSpec((2, 3), "float32"), D: TensorSpec((4, 2), "float32")}
FINGERPRINT = "ab" * 32


class Network(nn.Module):
    """One LoRA factor, one decoder tensor, one expert and one frozen tensor, named as in the real network."""

    def __init__(self) -> None:
        super().__init__()
        self.base_fingerprint = FINGERPRINT
        block = nn.Module()
        block.lora_a = nn.Parameter(torch.arange(6.0).view(2, 3))
        block.weight = nn.Parameter(torch.zeros(3))
        block.experts = nn.Linear(2, 2)
        self.image_encoder = nn.Module()
        self.image_encoder.blocks = nn.ModuleList([block])
        self.mask_decoder = nn.Module()
        self.mask_decoder.mask_tokens = nn.Embedding(4, 2)


def events(engine, fl_ctx, *types):
    for event in types:
        for component in engine.components.values():
            if hasattr(component, "handle_event"):
                component.handle_event(event, fl_ctx)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A function that starts a persistor in a fresh run, and returns it with its context."""
    monkeypatch.setattr(module, "network_of", lambda *_: Network())

    def start(**arguments):
        plan = Plan("demo", "brain_lesion_mri", {})
        plan._manifests = {"shared": SHARED, "personal": {}}
        plan.checked = lambda: SimpleNamespace(roles=Roles())
        persistor = SharedStatePersistor(**arguments)
        panics: list[str] = []
        persistor.system_panic = lambda reason, fl_ctx: panics.append(reason)
        components = {PLAN_ID: plan, "persistor": persistor, "locator": PTFileModelLocator("persistor")}
        clients = [Client("site-1", ""), Client("site-2", "")]
        engine = SimpleNamespace(components=components, get_component=components.get, get_clients=lambda: clients)
        fl_ctx = FLContextManager(engine=engine, identity_name="server", job_id="job").new_context()
        fl_ctx.set_prop(FLContextKey.APP_ROOT, str(tmp_path), private=True, sticky=True)
        (tmp_path / "config").mkdir(exist_ok=True)
        (tmp_path / "config" / SERVER).write_text(json.dumps({"components": [{"id": "persistor", "args": arguments}]}))
        events(engine, fl_ctx, EventType.START_RUN)
        return SimpleNamespace(
            persistor=persistor, fl_ctx=fl_ctx, engine=engine, panics=panics, locator=components["locator"]
        )

    return start


def test_the_global_model_is_the_shared_part_of_the_network_with_its_fingerprint(started):
    run = started()
    model = run.persistor.load(run.fl_ctx)
    weights = model[ModelLearnableKey.WEIGHTS]
    assert set(weights) == set(SHARED) and all(type(value) is np.ndarray for value in weights.values())
    assert model[ModelLearnableKey.META] == {FINGERPRINT_KEY: FINGERPRINT, VERSIONS_KEY: installed_versions()}


def test_theta0_replaces_the_network(started, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "network_of", lambda *_: pytest.fail("the network was built"))
    state = {A: torch.ones(2, 3), D: torch.ones(4, 2)}
    (tmp_path / "config").mkdir()
    write_global_model(tmp_path / "config" / "theta0.safetensors", state, "cd" * 32, SHARED)
    run = started(theta0="theta0.safetensors")
    model = run.persistor.load(run.fl_ctx)
    assert (model[ModelLearnableKey.WEIGHTS][A] == 1).all()
    assert model[ModelLearnableKey.META][FINGERPRINT_KEY] == "cd" * 32


def test_a_missing_theta0_ends_the_job_with_a_sentence(started):
    run = started(theta0="nowhere.safetensors")
    assert run.persistor.load(run.fl_ctx) is None
    assert run.panics and run.panics[0].startswith("E10")


def test_fingerprint_and_versions_survive_the_aggregation(started):
    run = started()
    model = run.persistor.load(run.fl_ctx)
    run.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHT_DIFF")
    aggregator.handle_event(EventType.START_RUN, run.fl_ctx)
    generator = FullModelShareableGenerator()
    updated = generator.shareable_to_learnable(aggregator.aggregate(run.fl_ctx), run.fl_ctx)
    assert FINGERPRINT_KEY not in updated[ModelLearnableKey.META]
    events(run.engine, run.fl_ctx, AppEventType.AFTER_SHAREABLE_TO_LEARNABLE)
    received = FLModelUtils.from_shareable(generator.learnable_to_shareable(updated, run.fl_ctx))
    assert received.meta[FINGERPRINT_KEY] == FINGERPRINT and received.meta[VERSIONS_KEY] == installed_versions()


def test_a_saved_model_is_found_again_and_can_be_gone_on_from(started, tmp_path):
    run = started()
    model = run.persistor.load(run.fl_ctx)
    model[ModelLearnableKey.WEIGHTS][A] = np.full((2, 3), 7.0, np.float32)
    run.persistor.save(model, run.fl_ctx)
    state, fingerprint = read_global_model(tmp_path / GLOBAL_MODEL_FILE, SHARED)
    assert (state[A] == 7).all() and fingerprint == FINGERPRINT

    shutil.copy(tmp_path / GLOBAL_MODEL_FILE, tmp_path / "config" / "last.safetensors")
    resumed = started(source_ckpt_file_full_name="last.safetensors")
    again = resumed.persistor.load(resumed.fl_ctx)
    assert (again[ModelLearnableKey.WEIGHTS][A] == 7).all()


def test_last_and_best_model_are_located_for_the_global_evaluation(started, tmp_path):
    run = started()
    model = run.persistor.load(run.fl_ctx)
    run.persistor.save(model, run.fl_ctx)
    run.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)
    run.persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, run.fl_ctx)
    # NVFlare writes files of these names, which are no safetensors
    assert set(run.locator.get_model_names(run.fl_ctx)) == {"global_model", "best_global_model"}
    assert {GLOBAL_MODEL_FILE, BEST_GLOBAL_MODEL_FILE} <= {path.name for path in tmp_path.iterdir()}
    dxo = run.locator.locate_model("best_global_model", run.fl_ctx)
    assert set(dxo.data) == set(SHARED) and dxo.meta[FINGERPRINT_KEY] == FINGERPRINT
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pt", ".tmp")]


def test_no_file_of_the_global_model_is_ever_unpickled(started, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    run = started(source_ckpt_file_full_name="old.pt")
    torch.save({"model": {}}, tmp_path / "config" / "old.pt")
    assert run.persistor.load(run.fl_ctx) is None
    assert run.panics[0].startswith("E10")


def test_a_model_that_does_not_fit_or_is_not_finite_is_neither_written_nor_read(tmp_path):
    path = tmp_path / "model.safetensors"
    good = {A: torch.ones(2, 3), D: torch.ones(4, 2)}
    write_global_model(path, good, FINGERPRINT, SHARED)
    before = path.read_bytes()
    for bad in (good | {D: torch.full((4, 2), torch.nan)}, good | {"image_encoder.blocks.0.experts.up": torch.ones(1)}):
        with pytest.raises(PFedSAMError, match="E12"):
            write_global_model(path, bad, FINGERPRINT, SHARED)
    assert path.read_bytes() == before
    with pytest.raises(PFedSAMError, match="E12"):
        read_global_model(path, {A: SHARED[A]})
    path.write_bytes(before[:40])
    with pytest.raises(PFedSAMError, match="E10"):
        read_global_model(path, SHARED)


def test_a_write_that_fails_leaves_the_old_model_whole(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    state = {A: torch.ones(2, 3), D: torch.ones(4, 2)}
    write_global_model(path, state, FINGERPRINT, SHARED)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_global_model(path, {name: value + 1 for name, value in state.items()}, FINGERPRINT, SHARED)
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["/etc/shadow", "../resources.json", "config/x.safetensors"])
@pytest.mark.parametrize(
    "argument", ["theta0", "source_ckpt_file_full_name", "global_model_file_name", "best_global_model_file_name"]
)
def test_a_job_names_no_path_at_the_server(argument, name):
    with pytest.raises(PFedSAMError, match="E16"):
        SharedStatePersistor(**{argument: name})


def test_a_variable_in_the_servers_configuration_ends_the_job(started):
    run = started(theta0="{$HOME}")
    assert run.persistor.load(run.fl_ctx) is None
    assert "E18" in run.panics[0] and "components.0.args.theta0" in run.panics[0]


def test_constructor_arguments_can_be_exported():
    arguments = {
        "theta0": "a.safetensors",
        "source_ckpt_file_full_name": "b.safetensors",
        "global_model_file_name": "c.safetensors",
        "best_global_model_file_name": "d.safetensors",
    }
    persistor = SharedStatePersistor(**arguments)
    assert {name: getattr(persistor, name) for name in arguments} == arguments


# --- the final personal phase ----------------------------------------------------------------------------------------


def test_the_final_phase_sends_the_final_weights_their_fingerprint_and_the_versions(started):
    run = started()
    run.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, run.persistor.load(run.fl_ctx), private=True, sticky=True)
    run.fl_ctx.set_prop(AppConstants.CURRENT_ROUND, 3, private=True, sticky=True)
    model = FLModelUtils.from_shareable(FinalPersonalPhase().create_task_data("configure", run.fl_ctx))
    assert set(model.params) == set(SHARED)
    assert model.meta[FINGERPRINT_KEY] == FINGERPRINT and model.current_round == 4
    assert model.meta[VERSIONS_KEY] == installed_versions()


def test_a_site_that_fails_the_final_phase_is_named_and_ends_nothing(started, caplog):
    caplog.set_level("INFO")
    run = started()
    phase = FinalPersonalPhase()
    assert phase.process_client_response(Client("site-1", ""), "configure", make_reply(ReturnCode.OK), run.fl_ctx)
    failed = make_reply("SITE_REFUSED:E17")
    assert phase.process_client_response(Client("site-3", ""), "configure", failed, run.fl_ctx)
    assert phase.final_process(run.fl_ctx)
    assert re.search(r"1 of 3 sites", caplog.text)
    assert "['site-2', 'site-3']" in caplog.text and "parameter is not finite" in caplog.text


def test_without_a_global_model_there_is_no_final_phase(started):
    run = started()
    assert FinalPersonalPhase().create_task_data("configure", run.fl_ctx) is None
    run.fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, ModelLearnable(), private=True, sticky=True)
    assert FinalPersonalPhase().create_task_data("configure", run.fl_ctx) is None
