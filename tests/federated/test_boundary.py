"""The allow-list itself: what is rebuilt, and that nothing else passes or crashes, whatever comes."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from pfedsam.errors import PFedSAMError
from pfedsam.federated.boundary import (
    FINGERPRINT_KEY,
    GAP_KEY,
    LISTED_NAMES,
    METADATA,
    METRICS,
    ROUND_KEY,
    SanitizedResult,
    allowed_return_code,
    check_headers,
    check_result,
    told_names,
)
from pfedsam.parameters import TensorSpec

A, B, D = "image_encoder.blocks.0.qkv.lora_a", "image_encoder.blocks.0.qkv.lora_b", "mask_decoder.mask_tokens.weight"
EXPERT = "image_encoder.blocks.0.mlp.experts.up"
SECRET = "patient-4711"
SHARED = {A: TensorSpec((2, 3), "float32"), B: TensorSpec((3, 2), "float32"), D: TensorSpec((4,), "float32")}
PERSONAL = {EXPERT: TensorSpec((2, 2), "float32")}
META = {ROUND_KEY: 1, MetaKey.NUM_STEPS_CURRENT_ROUND: 12, FINGERPRINT_KEY: "ab" * 32}


def weights(**changes):
    state = {name: np.full(spec.shape, 0.5, np.float32) for name, spec in (SHARED | PERSONAL).items()}
    return state | changes


def trained(data=None, meta=None, kind=DataKind.WEIGHT_DIFF) -> Shareable:
    return DXO(kind, data=weights() if data is None else data, meta=dict(META) if meta is None else meta).to_shareable()


def passes(result, task="train", code="E19") -> SanitizedResult:
    return check_result(result, task, shared=SHARED, personal=PERSONAL, code=code)


def refused(result, task="train", code="E19") -> str:
    with pytest.raises(PFedSAMError) as caught:
        passes(result, task, code)
    assert caught.value.code == code
    return caught.value.message


def everything_in(value) -> str:
    return repr(value)


def test_shared_tensors_pass_and_personal_tensors_stay():
    passed = passes(trained())
    dxo = from_shareable(passed.shareable)
    assert set(dxo.data) == set(SHARED) and passed.excluded == 1
    assert dxo.meta == META and dxo.data_kind == DataKind.WEIGHT_DIFF
    assert passed.bytes_by_group == {"lora_a": 24, "lora_b": 24, "decoder_subset": 16}


def test_a_result_of_flmodel_passes_with_its_initial_metrics():
    model = FLModel(
        params=weights(), params_type=ParamsType.DIFF, metrics={"val_dice": 0.5}, current_round=1, meta=dict(META)
    )
    model.meta[MetaKey.INITIAL_METRICS] = {"val_dice": np.float32(0.25)}
    passed = passes(FLModelUtils.to_shareable(model))
    assert passed.metadata[MetaKey.INITIAL_METRICS] == {"val_dice": 0.25}
    assert told_names(passed.metadata) == sorted([*METADATA, "initial_metrics.val_dice"])
    assert set(told_names(passed.metadata)) <= LISTED_NAMES
    assert set(passed.shareable[ReservedHeaderKey.HEADERS]) == {ReservedHeaderKey.CONTENT_TYPE}


def test_the_payload_is_a_copy_that_shares_no_memory():
    state = weights()
    passed = passes(trained(state))
    assert not any(np.shares_memory(passed.tensors[name], state[name]) for name in SHARED)
    assert all(array.flags.c_contiguous and array.base is None for array in passed.tensors.values())


def test_checking_twice_changes_nothing():
    first = passes(trained())
    second = passes(first.shareable)
    assert second.sha256() == first.sha256() and second.excluded == 0


def test_the_digest_follows_values_and_metadata():
    digests = {
        passes(trained()).sha256(),
        passes(trained(weights(**{D: np.zeros(4, np.float32)}))).sha256(),
        passes(trained(meta=META | {ROUND_KEY: 2})).sha256(),
    }
    assert len(digests) == 3


def test_at_the_server_a_personal_tensor_is_refused():
    with pytest.raises(PFedSAMError, match="E20") as caught:
        check_result(trained(), "train", shared=SHARED, code="E20")
    assert EXPERT in caught.value.message


@pytest.mark.parametrize("name", [A + ".copy", "x." + EXPERT, "image_encoder.blocks.9.qkv.lora_a", "", " " + A])
def test_an_expert_under_a_shared_looking_name_is_refused(name):
    refused(trained(weights(**{name: np.ones((2, 2), np.float32)})))


def test_a_manifest_above_the_ceiling_is_refused():
    with pytest.raises(PFedSAMError, match="may never be shared"):
        check_result(trained(), "train", shared=SHARED | PERSONAL, code="E19")


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((2, 3), np.float64),
        np.zeros((2, 3), ">f4"),
        np.zeros((3, 2), np.float32),
        np.zeros((2, 3), object),
        np.zeros((2, 3), np.float32).view(np.matrix),
        np.ma.zeros((2, 3), np.float32),
        np.full((2, 3), np.nan, np.float32),
        np.full((2, 3), np.inf, np.float32),
        np.full((2, 3), 1.1e4, np.float32),
        np.zeros((2, 3), np.float32).tolist(),
        {"inner": np.zeros((2, 3), np.float32)},
        DXO(DataKind.WEIGHTS, data={EXPERT: np.ones(2)}),
        None,
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_a_tensor_of_wrong_type_shape_dtype_or_value_is_refused(value):
    refused(trained(weights(**{A: value})))


def test_dtype_metadata_is_left_behind():
    array = np.zeros((2, 3), np.dtype("float32", metadata={"name": SECRET}))
    assert passes(trained(weights(**{A: array}))).tensors[A].dtype.metadata is None


def test_a_long_name_is_told_by_its_beginning():
    assert len(refused(trained(weights(**{"x" * 10_000: np.ones(2)})))) < 1000


def test_a_missing_shared_tensor_is_refused():
    state = weights()
    del state[B]
    assert B in refused(trained(state))


@pytest.mark.parametrize(
    "kind",
    [DataKind.WEIGHTS, DataKind.METRICS, DataKind.COLLECTION, DataKind.APP_DEFINED, DataKind.ANALYTIC, "x", None, 1],
)
def test_only_a_weight_difference_passes_as_a_training_result(kind):
    result = trained()
    result["DXO"]["kind"] = kind
    refused(result)


def test_a_nested_collection_is_refused():
    inner = DXO(DataKind.WEIGHT_DIFF, data=weights(), meta=dict(META))
    refused(DXO(DataKind.COLLECTION, data={"a": inner, "b": inner}).to_shareable())
    refused(trained(weights() | {"more": inner}))


def test_a_raw_shareable_is_refused():
    raw = Shareable()
    raw["weights"] = weights()
    refused(raw)
    raw.set_header(ReservedHeaderKey.CONTENT_TYPE, "DXO")
    refused(raw)
    refused({"weights": weights()})
    refused(None)


def test_data_of_a_dict_subclass_is_refused():
    refused(trained(OrderedDict(weights())))


def test_unlisted_metadata_headers_and_keys_are_left_behind():
    result = trained(meta=META | {"note": SECRET, "weights": weights()[EXPERT], MetaKey.SITE_NAME: SECRET})
    result.set_header("note", SECRET)
    result.set_header(AppConstants.CURRENT_ROUND, {"secret": weights()[EXPERT]})
    result.add_cookie("note", SECRET)
    result["more"] = weights()[EXPERT]
    rebuilt = passes(result).shareable
    assert SECRET not in everything_in(rebuilt)
    assert set(rebuilt) == {"DXO", ReservedHeaderKey.HEADERS}
    assert from_shareable(rebuilt).meta == META


@pytest.mark.parametrize(
    "change",
    [
        {MetaKey.NUM_STEPS_CURRENT_ROUND: 10**12},
        {MetaKey.NUM_STEPS_CURRENT_ROUND: 0},
        {MetaKey.NUM_STEPS_CURRENT_ROUND: True},
        {MetaKey.NUM_STEPS_CURRENT_ROUND: 3.5},
        {MetaKey.NUM_STEPS_CURRENT_ROUND: np.ones(5)},
        {MetaKey.NUM_STEPS_CURRENT_ROUND: None},
        {ROUND_KEY: -1},
        {ROUND_KEY: SECRET},
        {FINGERPRINT_KEY: SECRET},
        {FINGERPRINT_KEY: "AB" * 32},
        {FINGERPRINT_KEY: "ab" * 32 + "\n"},
        {FINGERPRINT_KEY: None},
        {MetaKey.INITIAL_METRICS: {"val_dice": SECRET}},
        {MetaKey.INITIAL_METRICS: {SECRET: 1.0}},
        {MetaKey.INITIAL_METRICS: weights()[EXPERT]},
        {MetaKey.INITIAL_METRICS: 0.5},
    ],
)
def test_wrong_metadata_is_refused_without_repeating_it(change):
    assert SECRET not in refused(trained(meta=META | change))


def test_validation_sends_listed_finite_metrics_only():
    metrics = {name: 0.5 for name in METRICS}
    passed = passes(DXO(DataKind.METRICS, data=dict(metrics), meta={"note": SECRET}).to_shareable(), "validate")
    dxo = from_shareable(passed.shareable)
    assert dxo.data == metrics and dxo.meta == {} and SECRET not in everything_in(passed.shareable)


@pytest.mark.parametrize(
    "metrics",
    [
        {"val_dice": SECRET},
        {"val_dice": math.nan},
        {"val_dice": math.inf},
        {"val_dice": -0.001},
        {"val_dice": 1.001},
        {"val_dice": 12},
        {"n_validation": 3},
        {"val_dice_personal": 0.5},
        {"train_loss": 0.5},
        {"val_dice": True},
        {"val_dice": None},
        {"val_dice": [0.5]},
        {"val_dice": np.ones(3)},
        {"val_dice": 10**400},
        {"val_dice": 1 + 0j},
        {"case_0001": 0.5},
        {1: 0.5},
        {"val_dice": {"inner": 0.5}},
    ],
)
def test_a_metric_that_is_unlisted_or_no_number_from_0_to_1_is_refused(metrics):
    assert SECRET not in refused(DXO(DataKind.METRICS, data=metrics).to_shareable(), "validate")


def test_no_metric_leaves_exactly():
    """Of one case an exact Dice 2i / (p + l) would tell the number l of the lesion's voxels."""
    exact = np.float64(2 * 1234 / 5677)
    validated = DXO(DataKind.METRICS, data={"val_dice": exact}).to_shareable()
    assert from_shareable(passes(validated, "validate").shareable).data == {"val_dice": 0.43}
    beside = passes(trained(meta=META | {MetaKey.INITIAL_METRICS: {"val_dice": exact}}))
    assert from_shareable(beside.shareable).meta[MetaKey.INITIAL_METRICS] == {"val_dice": 0.43}
    for end in (0, 1):
        metrics = DXO(DataKind.METRICS, data={"val_dice": end}).to_shareable()
        assert passes(metrics, "validate").metadata == {"val_dice": float(end)}


def test_a_validation_without_a_metric_passes():
    passed = passes(DXO(DataKind.METRICS, data={}).to_shareable(), "validate")
    assert from_shareable(passed.shareable).data == {} and told_names(passed.metadata) == []


def test_weights_are_refused_as_a_validation_result():
    refused(trained(), "validate")


@pytest.mark.parametrize("task", ["configure", "something else", None])
def test_of_any_other_task_only_the_return_code_leaves(task):
    rebuilt = passes(trained(), task).shareable
    assert rebuilt == make_reply(ReturnCode.OK)


@pytest.mark.parametrize("task", ["train", "validate", "configure"])
def test_of_a_failed_task_only_the_return_code_leaves(task):
    failed = trained()
    failed.set_return_code("SITE_REFUSED:E07")
    failed.set_header(ReservedHeaderKey.ERROR, SECRET)
    assert passes(failed, task).shareable == make_reply("SITE_REFUSED:E07")


@pytest.mark.parametrize(
    "text", [f"could not read {SECRET}", "SITE_REFUSED:E77", "SITE_REFUSED:E07 " + SECRET, "", 5, {}]
)
def test_an_unknown_return_code_becomes_execution_exception(text):
    assert allowed_return_code(text) == ReturnCode.EXECUTION_EXCEPTION
    assert passes(make_reply(text)).shareable == make_reply(ReturnCode.EXECUTION_EXCEPTION)


def test_the_listed_headers_are_kept_and_no_others():
    result = trained()
    result.set_cookie_jar({AppConstants.CONTRIBUTION_ROUND: 3, ReservedKey.WORKFLOW: "w", ReservedKey.TASK_ID: "t"})
    result.set_header(ReservedHeaderKey.TASK_NAME, "train")
    result.set_header(ReservedHeaderKey.ERROR, SECRET)
    result.set_peer_props({ReservedKey.IDENTITY_NAME: "site-1", "more": SECRET})
    kept = check_headers(result, code="E20")
    assert kept == {
        ReservedHeaderKey.COOKIE_JAR: result.get_cookie_jar(),
        ReservedHeaderKey.TASK_NAME: "train",
        ReservedHeaderKey.PEER_PROPS: {ReservedKey.IDENTITY_NAME: "site-1"},
    }


@pytest.mark.parametrize(
    "jar", [{"note": 1}, {AppConstants.CONTRIBUTION_ROUND: np.ones(4)}, {ReservedKey.WORKFLOW: "x" * 1000}, [1], {1: 1}]
)
def test_an_unknown_or_large_cookie_is_refused(jar):
    result = trained()
    result.set_cookie_jar(jar)
    with pytest.raises(PFedSAMError, match="E20"):
        check_headers(result, code="E20")


# --- whatever comes -------------------------------------------------------------------------------------------------

MARK = np.float32(0.8125)  # the value of every personal element: it must be found nowhere in what passes
HIDDEN = np.full((2, 2), MARK, np.float32)
names = st.sampled_from([*SHARED, *PERSONAL, A + ".x", "personal." + A, "DXO", "kind", "data", "meta", SECRET, "rc"])
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.just(SECRET),
    st.just(HIDDEN),
    st.sampled_from([np.zeros((2, 3), np.float32), np.zeros(4), np.zeros(4, np.float32), np.array([None])]),
    st.sampled_from([DataKind.WEIGHT_DIFF, DataKind.COLLECTION, ReturnCode.OK, object()]),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4), st.tuples(inner, inner)
    ),
    max_leaves=8,
)
tasks = st.sampled_from(["train", "submit_model", "validate", "configure", "x"])


@st.composite
def hostile(draw) -> Shareable:
    """A good result in which some places hold anything at all."""
    result = trained(weights(**{EXPERT: HIDDEN}))
    for path in draw(st.lists(st.sampled_from(["data", "meta", "headers", "top", "dxo", "kind"]), max_size=3)):
        value = draw(trees)
        if path in ("data", "meta") and type(result.get("DXO")) is dict and type(result["DXO"].get(path)) is dict:
            result["DXO"][path] = copy.copy(result["DXO"][path]) | {draw(names): value}
        elif path == "headers" and type(result[ReservedHeaderKey.HEADERS]) is dict:
            result[ReservedHeaderKey.HEADERS][draw(st.sampled_from(["note", *vars(ReservedHeaderKey).values()]))] = (
                value
            )
        elif path == "top":
            result[draw(st.one_of(names, st.just(ReservedHeaderKey.HEADERS)))] = value
        elif path == "dxo":
            result["DXO"] = value
        elif type(result.get("DXO")) is dict:
            result["DXO"]["kind"] = value
    return result


def _holds_hidden(value) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype != object and bool((value == MARK).any())
    if isinstance(value, dict):
        return any(key in PERSONAL or _holds_hidden(inner) for key, inner in value.items())
    return isinstance(value, (list, tuple)) and any(_holds_hidden(inner) for inner in value)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(result=hostile(), task=tasks)
def test_whatever_comes_no_personal_tensor_and_no_text_passes_and_nothing_crashes(result, task):
    try:
        passed = passes(result, task)
    except PFedSAMError as error:
        assert error.code == "E19"
        return
    rebuilt = passed.shareable
    assert not _holds_hidden(rebuilt) and SECRET not in everything_in(rebuilt)
    assert set(rebuilt) <= {"DXO", ReservedHeaderKey.HEADERS}
    assert set(rebuilt[ReservedHeaderKey.HEADERS]) <= {ReservedHeaderKey.CONTENT_TYPE, ReservedHeaderKey.RC}
    if "DXO" in rebuilt and task != "validate":
        assert set(rebuilt["DXO"]["data"]) == set(SHARED)


@settings(max_examples=80, deadline=None)
@given(result=hostile())
def test_whatever_the_headers_hold_they_are_refused_or_plain(result):
    try:
        kept = check_headers(result, code="E20")
    except PFedSAMError as error:
        assert error.code == "E20"
        return
    assert not _holds_hidden(kept)
    assert set(kept) <= {
        ReservedHeaderKey.COOKIE_JAR,
        ReservedHeaderKey.TASK_NAME,
        ReservedHeaderKey.TASK_ID,
        ReservedHeaderKey.PEER_PROPS,
    }


# a number that one kind of weights asks for ---------------------------------------------------------------------------


def test_the_gap_passes_rounded_where_it_is_asked_for() -> None:
    result = trained(meta=META | {GAP_KEY: 0.123456, "pfedsam_gap_2": 0.5})
    passed = check_result(result, "train", shared=SHARED, personal=PERSONAL, further=[GAP_KEY], code="E19")
    assert from_shareable(passed.shareable).meta == META | {GAP_KEY: 0.12}
    assert told_names(passed.metadata) == sorted([*METADATA, GAP_KEY]) and GAP_KEY not in LISTED_NAMES
    without = check_result(trained(), "train", shared=SHARED, personal=PERSONAL, further=[GAP_KEY], code="E19")
    assert without.metadata == META, "a site may leave it out"


@pytest.mark.parametrize("code", ["E19", "E20"])
def test_the_gap_is_refused_where_it_is_not_asked_for(code: str) -> None:
    assert GAP_KEY in refused(trained(meta=META | {GAP_KEY: 0.1}), code=code)


@pytest.mark.parametrize("gap", [-0.1, 1.1, math.nan, math.inf, 1, True, None, SECRET, np.float32(0.1), [0.1]])
def test_a_gap_that_is_no_float_within_its_bounds_is_refused(gap) -> None:
    with pytest.raises(PFedSAMError, match="E19") as caught:
        result = trained(meta=META | {GAP_KEY: gap})
        check_result(result, "train", shared=SHARED, personal=PERSONAL, further=[GAP_KEY], code="E19")
    assert GAP_KEY in caught.value.message and SECRET not in caught.value.message
