"""Noise has the stated deviation, epsilon is the accountant's, int8 with error feedback loses nothing in the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.shareable import make_reply
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.job_files import find_job
from pfedsam.deployment.job_privacy import NOISE, PACK, UNPACK, Privacy
from pfedsam.deployment.jobs import export_job
from pfedsam.errors import PFedSAMError
from pfedsam.federated.boundary import FINGERPRINT_KEY, ROUND_KEY, check_result
from pfedsam.federated.packing import PACKED, RESIDUAL_FILE, PackPayload, UnpackPayload, pack, unpack
from pfedsam.federated.privacy import ClipAndNoise, clipped, epsilon, noised, require_policy
from pfedsam.parameters import TensorSpec

NAME = "mask_decoder.mask_tokens.weight"
META = {ROUND_KEY: 1, MetaKey.NUM_STEPS_CURRENT_ROUND: 12, FINGERPRINT_KEY: "ab" * 32}


def context(folder: Path) -> Any:
    """What the filters ask of NVFlare."""
    workspace = SimpleNamespace(get_run_dir=lambda job: str(folder / job))
    engine = SimpleNamespace(get_workspace=lambda: workspace)
    values = {FLContextKey.TASK_NAME: "train"}
    return SimpleNamespace(get_engine=lambda: engine, get_job_id=lambda: "job", get_prop=values.get)


def update(array: np.ndarray) -> Any:
    return DXO(DataKind.WEIGHT_DIFF, data={NAME: array}, meta=dict(META)).to_shareable()


def random(size: int = 200_000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1e-3, size).astype(np.float32)


def test_an_update_is_clipped_as_a_whole_and_a_small_one_is_not_changed() -> None:
    data = {"a": np.full(16, 3.0, np.float32), "b": np.full(16, 4.0, np.float32)}
    found, norm = clipped(data, 2.0)
    assert norm == pytest.approx(20.0)
    assert math.sqrt(sum(float((x**2).sum()) for x in found.values())) == pytest.approx(2.0, rel=1e-6)
    assert found["b"][0] / found["a"][0] == pytest.approx(4 / 3)
    same, _ = clipped(data, 100.0)
    assert np.array_equal(same["a"], data["a"])
    assert clipped({"a": np.zeros(3, np.float32)}, 1.0)[1] == 0


def test_noise_has_the_stated_deviation() -> None:
    result = ClipAndNoise(clip=0.5, noise_multiplier=2.0).process(update(np.zeros(200_000, np.float32)), None)
    noise = from_shareable(result).data[NAME]
    # the standard error of a deviation from n draws is sigma / sqrt(2 n)
    assert abs(noise.std() - 1.0) < 5 / math.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    again = from_shareable(ClipAndNoise(0.5, 2.0).process(update(np.zeros(200_000, np.float32)), None)).data[NAME]
    assert not np.array_equal(noise, again)
    known = noised({"a": np.zeros(4, np.float32)}, 1.0, np.random.default_rng(1))["a"]
    assert np.allclose(known, np.random.default_rng(1).normal(0, 1.0, 4))


def test_epsilon_is_the_accountants() -> None:
    from dp_accounting import GaussianDpEvent, SelfComposedDpEvent, rdp

    accountant = rdp.RdpAccountant()
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(1.5), 20))
    assert epsilon(1.5, 20) == pytest.approx(accountant.get_epsilon(1e-5))
    assert epsilon(1.5, 40) > epsilon(1.5, 20) > epsilon(3.0, 20)
    assert epsilon(0.0, 20) == math.inf


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"clip": 0.0}, {"clip": 1.0, "noise_multiplier": -1.0}):
        with pytest.raises(ValueError, match="clip"):
            ClipAndNoise(**wrong)
    with pytest.raises(ValueError, match="precision"):
        PackPayload("int4")  # type: ignore[arg-type]
    told = ["job", "export", "pfedsam", "x", "--noise", "1"]
    assert CliRunner().invoke(app, told).exit_code == 2


def test_int8_with_error_feedback_loses_nothing_in_the_long_run() -> None:
    residual: dict[str, np.ndarray] = {}
    wanted, got = np.zeros(1000), np.zeros(1000)
    r = np.random.default_rng(3)
    for _ in range(30):
        delta = r.normal(0, 1e-3, 1000).astype(np.float32)
        packed, residual, scales = pack({"a": delta}, "int8", residual)
        wanted += delta
        got += unpack(packed, "int8", scales)["a"]
    # what is missing is the last residual: at most half a step of one round
    assert np.abs(wanted - got).max() <= scales["a"] / 2 + 1e-7
    assert np.allclose(wanted - got, residual["a"], atol=1e-6)


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.5), ("int8", 0.25)])
def test_a_packed_update_passes_the_guard_as_float32(precision: Any, share: float, tmp_path: Path) -> None:
    array = random()
    sent = PackPayload(precision).process(update(array), context(tmp_path))
    dxo = from_shareable(sent)
    assert dxo.data_kind == DataKind.WEIGHT_DIFF and dxo.meta[PACKED]["precision"] == precision
    assert dxo.data[NAME].nbytes == share * array.nbytes
    assert (tmp_path / "job" / RESIDUAL_FILE).exists() == (precision == "int8")
    passed = check_result(
        UnpackPayload().process(sent, None), "train", shared={NAME: TensorSpec(array.shape, "float32")}, code="E20"
    )
    assert PACKED not in passed.metadata
    error = np.abs(passed.tensors[NAME] - array).max()
    largest = float(np.abs(array).max())
    assert error <= (largest / 127 / 2 * 1.01 if precision == "int8" else largest * 2**-11)


def test_an_unreadable_residual_is_begun_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filters, array = PackPayload("int8"), random()
    path = tmp_path / "job" / RESIDUAL_FILE
    first = filters.process(update(array), context(tmp_path))
    path.write_bytes(path.read_bytes()[:40])
    again = filters.process(update(array), context(tmp_path))
    assert np.array_equal(from_shareable(again).data[NAME], from_shareable(first).data[NAME])
    assert RESIDUAL_FILE in caplog.text and path.stat().st_size > 40


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": -1.0, "noise_multiplier": 0.5},
        {"clip": 1.0, "noise_multiplier": -1.0},
        {"noise_multiplier": 1.0},
        {"clip": float("nan")},
        {"precision": "int4"},
        {"precision": "int8", "encrypt": True},
    ],
)
def test_options_that_no_site_could_apply_are_refused_when_the_job_is_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError, match="E32" if "encrypt" in wrong else "E16"):
        Privacy(**wrong)


@pytest.mark.parametrize(
    ("chain", "fine"),
    [
        ([ClipAndNoise(1.0, 0.5)], True),
        ([PackPayload("int8"), ClipAndNoise(0.5, 0.6)], True),
        ([ClipAndNoise(2.0, 0.5)], False),
        ([ClipAndNoise(1.0, 0.4)], False),
        ([ClipAndNoise(1.0)], False),
        ([PackPayload("int8")], False),
        ([], False),
    ],
)
def test_a_site_may_ask_for_clipping_and_noise(chain: list[Any], fine: bool) -> None:
    require_policy(chain, None, None)
    if fine:
        return require_policy(chain, 1.0, 0.5)
    with pytest.raises(PFedSAMError, match=r"E23.*clip <= 1\.0 and noise >= 0\.5"):
        require_policy(chain, 1.0, 0.5)


def test_a_filter_that_only_looks_like_the_noise_does_not_count() -> None:
    class Fake(ClipAndNoise):
        """Could let everything pass."""

    with pytest.raises(PFedSAMError, match="E23"):
        require_policy([Fake(1.0, 1.0)], 1.0, 0.5)


def test_other_results_pass_and_a_wrong_payload_is_refused(tmp_path: Path) -> None:
    metrics = DXO(DataKind.METRICS, data={"val_dice": 0.5}).to_shareable()
    failed = make_reply("SITE_REFUSED:E07")
    for one in (metrics, failed):
        for chain in (PackPayload("int8"), ClipAndNoise(1.0, 1.0), UnpackPayload()):
            assert chain.process(one, context(tmp_path)) is one
    int8, fp16 = {"precision": "int8", "scales": {}}, {"precision": "fp16", "scales": 1}
    for told in (int8, {"precision": "int4"}, "text", fp16):
        wrong = DXO(DataKind.WEIGHT_DIFF, data={NAME: np.ones(3, np.int8)}, meta={**META, PACKED: told}).to_shareable()
        with pytest.raises(PFedSAMError, match="E20"):
            UnpackPayload().process(wrong, None)


def test_a_job_gets_the_whole_chain_in_order(tmp_path: Path) -> None:
    job = export_job(find_job("pfedsam"), tmp_path / "job", locked=True, privacy=Privacy(1.0, 0.5, "int8"))
    chains = {
        side: [
            one["path"]
            for one in json.loads((job / "app" / "config" / f"config_fed_{side}.json").read_text())[
                "task_result_filters"
            ][0]["filters"]
        ]
        for side in ("client", "server")
    }
    assert chains["client"] == ["pfedsam.federated.filters.PersonalisedFilter", NOISE, PACK]
    assert chains["server"] == [UNPACK, "pfedsam.federated.filters.IncomingGuard"]
    done = CliRunner().invoke(
        app, ["job", "export", "pfedsam", str(tmp_path / "b"), "--clip", "1", "--noise", "0.5", "--rounds", "10"]
    )
    assert done.exit_code == 0 and "guarantees little" in done.output
