"""Encrypted rounds through NVFlare's own HE parts give the plain mean; what the guard can check it checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.abstract.model import ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.decomposers import numpy_decomposers
from nvflare.fuel.sec.security_content_service import SecurityContentService
from nvflare.fuel.utils import fobs
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import DECRYPT, ENCRYPT, GUARD, Privacy
from pfedsam.deployment.jobs import export_job, make_job
from pfedsam.errors import PFedSAMError
from pfedsam.federated.boundary import FINGERPRINT_KEY, ROUND_KEY
from pfedsam.federated.plan import Plan
from pfedsam.federated.records import RECEIVED_FILE
from pfedsam.files import read_safetensors
from pfedsam.parameters import TensorSpec
from pfedsam.storage.global_model import read_global_model
from pfedsam.storage.job_plan import PLAN_ID

tenseal = pytest.importorskip("tenseal")

A, D = "image_encoder.blocks.0.lora_a", "mask_decoder.mask_tokens.weight"
#: The second is longer than one ciphertext (4096 values).
SHARED = {A: TensorSpec((2, 3), "float32"), D: TensorSpec((90, 50), "float32")}
FINGERPRINT = "ab" * 32
CASES = {"site-1": 7, "site-2": 20}
#: CKKS with a scale of 2^40: absolute error of a mean of two sites over two rounds, values up to 1.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contexts as `HEBuilder` makes them; the server's has no secret key."""
    folder = tmp_path_factory.mktemp("startup")
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        poly_modulus_degree=8192,
        coeff_mod_bit_sizes=[60, 40, 40],
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.generate_relin_keys()
    context.global_scale = 2**40
    for name, secret in (("client", True), ("server", False)):
        told = {"save_public_key": secret, "save_secret_key": secret, "save_galois_keys": False}
        (folder / f"{name}_context.tenseal").write_bytes(context.serialize(**told, save_relin_keys=True))
    return folder


@pytest.fixture
def federation(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The server's parts and a site's two filters, as the exported job names them, in contexts of their own."""
    monkeypatch.setattr(SecurityContentService, "security_content_manager", None)
    SecurityContentService.initialize(content_folder=str(kit))
    numpy_decomposers.register()
    from nvflare.app_opt.he.intime_accumulate_model_aggregator import HEInTimeAccumulateWeightedAggregator
    from nvflare.app_opt.he.model_shareable_generator import HEModelShareableGenerator

    from pfedsam.federated.encryption import DecryptModel, EncryptedGuard, EncryptedStatePersistor, EncryptUpdate

    plan = Plan("demo", "brain_lesion_mri", {})
    plan._manifests = {"shared": SHARED, "personal": {}}
    parts = SimpleNamespace(
        guard=EncryptedGuard(),
        aggregator=HEInTimeAccumulateWeightedAggregator(expected_data_kind="WEIGHT_DIFF", weigh_by_local_iter=False),
        generator=HEModelShareableGenerator(),
        persistor=EncryptedStatePersistor(),
        encrypt=EncryptUpdate(),
        decrypt=DecryptModel(),
        tmp=tmp_path,
    )
    workspace = SimpleNamespace(get_run_dir=lambda job: str(tmp_path), get_root_dir=lambda: str(tmp_path))
    components = {PLAN_ID: plan, **vars(parts)}
    ask = {"get_component": components.get, "get_workspace": lambda: workspace, "fire_event": lambda *_: None}
    engine = SimpleNamespace(components=components, **ask)

    def context(name: str, peer: str) -> FLContext:
        fl_ctx = FLContextManager(engine=engine, identity_name=name, job_id="job").new_context()
        fl_ctx.set_prop(FLContextKey.SECURE_MODE, False, private=True, sticky=True)
        fl_ctx.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
        other = FLContextManager(engine=engine, identity_name=peer, job_id="job").new_context()
        fl_ctx.set_peer_context(other)
        return fl_ctx

    parts.at_site = {site: context(site, "server") for site in CASES}
    parts.at_server = {site: context("server", site) for site in CASES}
    for one in (parts.guard, parts.aggregator, parts.generator):
        one.handle_event(EventType.START_RUN, parts.at_server["site-1"])
    for one in (parts.encrypt, parts.decrypt):
        one.handle_event(EventType.START_RUN, parts.at_site["site-1"])
    persistor = parts.persistor
    persistor._fingerprint, persistor._round = FINGERPRINT, 0
    persistor._expected = SHARED
    persistor._ckpt_save_path = str(tmp_path / "global_model.safetensors")
    persistor._best_ckpt_save_path = str(tmp_path / "best_global_model.safetensors")
    return parts


def update(site: str, number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([CASES[site], number])
    return {name: random.uniform(-1, 1, spec.shape).astype(spec.dtype) for name, spec in SHARED.items()}


def result(site: str, number: int) -> Shareable:
    meta = {ROUND_KEY: number, MetaKey.NUM_STEPS_CURRENT_ROUND: CASES[site], FINGERPRINT_KEY: FINGERPRINT}
    told = DXO(DataKind.WEIGHT_DIFF, update(site, number), {**meta, MetaKey.INITIAL_METRICS: {"val_dice": 0.5}})
    return told.to_shareable()


def sent(federation: Any, site: str, number: int) -> Shareable:
    """What the server receives: encrypted, and through NVFlare's serialiser."""
    wire = fobs.loads(fobs.dumps(federation.encrypt.process(result(site, number), federation.at_site[site])))
    wire.set_header(ReservedHeaderKey.COOKIE_JAR, {AppConstants.CONTRIBUTION_ROUND: number})
    wire.set_header(ReservedHeaderKey.PEER_PROPS, {"__identity_name__": site})
    return wire


def model_at_site(federation: Any, shareable: Shareable, site: str = "site-1") -> dict[str, np.ndarray]:
    arrived = fobs.loads(fobs.dumps(shareable))
    return from_shareable(federation.decrypt.process(arrived, federation.at_site[site])).data


def test_two_encrypted_rounds_give_the_plain_weighted_mean(federation: Any) -> None:
    zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in SHARED.items()}
    model = make_model_learnable(dict(zeros), {FINGERPRINT_KEY: FINGERPRINT})
    wanted = {name: array.astype(np.float64) for name, array in zeros.items()}
    for number in range(2):
        for site, fl_ctx in federation.at_server.items():
            fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)
            fl_ctx.set_prop(AppConstants.CURRENT_ROUND, number, private=True, sticky=True)
            passed = federation.guard.process(sent(federation, site, number), fl_ctx)
            assert federation.aggregator.accept(passed, fl_ctx)
        fl_ctx = federation.at_server["site-1"]
        mean = federation.aggregator.aggregate(fl_ctx)
        model = federation.generator.shareable_to_learnable(mean, fl_ctx)
        fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)
        federation.persistor.handle_event(AppEventType.AFTER_SHAREABLE_TO_LEARNABLE, fl_ctx)
        federation.persistor.save_model(model, fl_ctx)
        for name in wanted:
            wanted[name] += sum(n * update(site, number)[name] for site, n in CASES.items()) / sum(CASES.values())
        got = model_at_site(federation, federation.generator.learnable_to_shareable(model, fl_ctx))
        assert set(got) == set(SHARED)
        for name, array in got.items():
            assert array.dtype == np.float32 and array.shape == SHARED[name].shape
            assert np.abs(array - wanted[name]).max() < TOLERANCE, (number, name)
    # the ciphertexts on the server's disk are the same model, for evaluation at the sites
    path = federation.tmp / "global_model.safetensors"
    kept = federation.persistor._get_model_from_location(str(path), fl_ctx)
    dxo = DXO(DataKind.WEIGHTS, kept[ModelLearnableKey.WEIGHTS], kept[ModelLearnableKey.META])
    for name, array in model_at_site(federation, dxo.to_shareable(), "site-2").items():
        assert np.abs(array - wanted[name]).max() < TOLERANCE
    with pytest.raises(PFedSAMError, match="E10"):
        read_global_model(path, SHARED)
    # the best model is saved while its values are bytes
    federation.persistor.handle_event(AppEventType.GLOBAL_BEST_MODEL_AVAILABLE, fl_ctx)
    best, last = (read_safetensors(federation.tmp / name) for name in ("best_global_model.safetensors", path.name))
    assert best[1] == last[1]
    assert all(torch.equal(tensor, last[0][name]) for name, tensor in best[0].items())
    records = [json.loads(line) for line in (federation.tmp / RECEIVED_FILE).read_text().splitlines()]
    assert len(records) == 4 and all(one["accepted"] for one in records)
    ciphertexts = from_shareable(sent(federation, "site-1", 0)).data
    assert all(isinstance(one, bytes) for one in ciphertexts.values())
    assert sum(map(len, ciphertexts.values())) > 4 * 4506


def test_nothing_readable_reaches_the_server(federation: Any, kit: Path) -> None:
    wire = fobs.dumps(sent(federation, "site-1", 0))
    for array in update("site-1", 0).values():
        assert array.tobytes()[:16] not in wire
        assert (array.ravel() * np.float64(CASES["site-1"])).tobytes()[:32] not in wire
    assert not tenseal.context_from((kit / "server_context.tenseal").read_bytes()).has_secret_key()


@pytest.mark.parametrize("wrong", ["plain", "names", "noise", "count", "round", "fingerprint", "identity"])
def test_the_guard_refuses_what_it_can_see(federation: Any, wrong: str) -> None:
    fl_ctx = federation.at_server["site-1"]
    model = make_model_learnable({}, {FINGERPRINT_KEY: FINGERPRINT})
    fl_ctx.set_prop(AppConstants.GLOBAL_MODEL, model, private=True, sticky=True)
    shareable = sent(federation, "site-1", 0)
    dxo = from_shareable(shareable)
    if wrong == "plain":
        dxo.data = update("site-1", 0)
    elif wrong == "names":
        dxo.data["image_encoder.blocks.0.experts.down_bias"] = dxo.data[A]
    elif wrong == "noise":
        dxo.data[A] = b"no ciphertext"
    elif wrong == "count":
        dxo.data[A] = dxo.data[D]
    elif wrong == "round":
        dxo.meta[ROUND_KEY] = -1
    elif wrong == "fingerprint":
        dxo.meta[FINGERPRINT_KEY] = "cd" * 32
    shareable = dxo.update_shareable(shareable)
    if wrong == "identity":
        from nvflare.apis.client import Client
        from nvflare.apis.fl_constant import ServerCommandKey

        shareable.set_header(ServerCommandKey.FL_CLIENT, Client("site-2", ""))
    with pytest.raises(PFedSAMError, match="E20"):
        federation.guard.process(shareable, fl_ctx)


def test_metadata_of_no_list_and_failed_tasks_pass_as_without_encryption(federation: Any) -> None:
    fl_ctx = federation.at_server["site-1"]
    shareable = sent(federation, "site-1", 0)
    dxo = from_shareable(shareable)
    dxo.meta["patient"] = "name"
    passed = from_shareable(federation.guard.process(dxo.update_shareable(shareable), fl_ctx))
    assert "patient" not in passed.meta and set(passed.meta[MetaKey.PROCESSED_KEYS]) == set(SHARED)
    assert passed.meta[MetaKey.INITIAL_METRICS] == {"val_dice": 0.5}
    refused = make_reply("SITE_REFUSED:E07")
    assert federation.encrypt.process(refused, federation.at_site["site-1"]) is refused
    assert federation.guard.process(refused, fl_ctx).get_return_code() == "SITE_REFUSED:E07"


def test_the_first_global_model_is_plain_and_passes(federation: Any) -> None:
    plain = DXO(DataKind.WEIGHTS, update("site-1", 0)).to_shareable()
    for name, array in model_at_site(federation, plain).items():
        assert np.array_equal(array, update("site-1", 0)[name])


def test_the_exported_job_encrypts_last_and_names_the_servers_parts(tmp_path: Path) -> None:
    told = ["job", "export", "pfedsam", str(tmp_path / "job"), "--locked", "--encrypt", "--clip", "1"]
    done = CliRunner().invoke(app, told)
    assert done.exit_code == 0, done.output
    client, server = (
        json.loads((tmp_path / "job" / "app" / "config" / f"config_fed_{side}.json").read_text())
        for side in ("client", "server")
    )
    chain = [one["path"] for one in client["task_result_filters"][0]["filters"]]
    assert chain[0].endswith("PersonalisedFilter") and chain[-1] == ENCRYPT and len(chain) == 3
    assert client["task_data_filters"] == [
        {"tasks": ["train", "validate", "configure"], "filters": [{"path": DECRYPT}]}
    ]
    assert server["task_result_filters"][0]["filters"] == [{"path": GUARD}]
    aggregator = next(one for one in server["components"] if one["id"] == "aggregator")
    assert aggregator["path"].endswith("HEInTimeAccumulateWeightedAggregator")
    assert aggregator["args"]["weigh_by_local_iter"] is False


def test_what_cannot_be_encrypted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PFedSAMError, match=r"E32.*added up encrypted"):
        Privacy(precision="int8", encrypt=True)
    file = tmp_path / "mine.json"
    settings = json.loads((find_job("pfedsam").parent / "strategies" / "fedavg_lora.json").read_text())
    settings["strategy"] |= {"name": "mine", "aggregation": "svd"}
    file.write_text(json.dumps(settings))
    job = make_job(str(file), tmp_path / "svd")
    with pytest.raises(PFedSAMError, match=r"E32.*mean"):
        export_job(job, tmp_path / "job", privacy=Privacy(encrypt=True))
    for more in ({"server": {"momentum": 0.5}}, {"weights": "gaa", "aggregation": "norm_clipped"}):
        plan = {"strategy": {"aggregation": "mean", **more}}
        with pytest.raises(PFedSAMError, match=r"E32.*our aggregator"):
            export_job(find_job("fedavg_lora"), tmp_path / "job", plan=plan, privacy=Privacy(encrypt=True))
    monkeypatch.setitem(sys.modules, "tenseal", None)
    monkeypatch.setattr("pfedsam.deployment.job_privacy.find_spec", lambda name: None)
    with pytest.raises(PFedSAMError, match=r"E31.*TenSEAL"):
        export_job(find_job("pfedsam"), tmp_path / "job", privacy=Privacy(encrypt=True))
    assert not (tmp_path / "job").exists()


def test_a_site_without_tenseal_says_so() -> None:
    program = "import sys; sys.modules['tenseal'] = None; import pfedsam.federated.encryption"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "E31: encryption needs TenSEAL" in done.stderr and "extra 'he'" in done.stderr
