"""10,000 results made wrong in random ways: through filter and guard none personal passes, and none crashes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.shareable import ReservedHeaderKey, Shareable

from pfedsam.errors import PFedSAMError
from pfedsam.federated.boundary import FINGERPRINT_KEY, ROUND_KEY, check_headers, check_result
from pfedsam.parameters import TensorSpec

PAYLOADS = 10_000
A, D = "image_encoder.blocks.0.attn.qkv.lora_a", "mask_decoder.mask_tokens.weight"
EXPERT = "image_encoder.blocks.0.mlp.experts.up"
SHARED = {A: TensorSpec((2, 3), "float32"), D: TensorSpec((4,), "float32")}
PERSONAL = {EXPERT: TensorSpec((2, 2), "float32")}
#: What must never pass: a value of the personal tensor, and a text.
CANARY = np.float32(0.777123)
SECRET = "patient-4711"


def canary(shape: tuple[int, ...] = (2, 2)) -> np.ndarray:
    return np.full(shape, CANARY, np.float32)


class Odd:
    """An object of a class that nobody knows."""

    def __init__(self) -> None:
        self.hidden = canary()

    def __repr__(self) -> str:
        return SECRET


def value(r: random.Random, depth: int = 0) -> Any:
    """Anything that somebody could put somewhere."""
    simple: list[Callable[[], Any]] = [
        lambda: canary(),
        lambda: SECRET,
        lambda: SECRET.encode(),
        lambda: None,
        lambda: float("nan"),
        lambda: 10**40,
        lambda: -1,
        lambda: True,
        lambda: np.float64(CANARY),
        lambda: np.array([SECRET]),
        lambda: np.array([object()], dtype=object),
        lambda: Odd(),
        lambda: canary().astype(np.float16),
        lambda: np.full((2, 3), np.inf, np.float32),
        lambda: DXO(DataKind.WEIGHT_DIFF, data={EXPERT: canary()}),
        lambda: Shareable({EXPERT: canary()}),
    ]
    if depth < 3 and r.random() < 0.4:
        inner = [value(r, depth + 1) for _ in range(r.randint(1, 3))]
        return r.choice([inner, tuple(inner), {name(r): one for one in inner}])
    return r.choice(simple)()


def name(r: random.Random) -> Any:
    """Names that look like shared ones, and names that are none."""
    looks = [
        A + " ",
        A.upper(),
        A.replace("lora_a", "lora_a\u200b"),
        f"{A}.{EXPERT}",
        EXPERT,
        EXPERT + ".lora_a",
        D + "\0",
    ]
    return r.choice([*looks, SECRET, "", 7, None, (A,), "DXO", ReservedHeaderKey.HEADERS, MetaKey.INITIAL_METRICS])


def payload(r: random.Random) -> tuple[Any, str]:
    """A good result with one to four things changed."""
    kind = r.choice([DataKind.WEIGHT_DIFF] * 4 + [DataKind.METRICS, DataKind.WEIGHTS, DataKind.COLLECTION, SECRET])
    task = r.choice(["train"] * 4 + ["validate", "submit_model", "configure", SECRET])
    data: Any = {A: np.zeros((2, 3), np.float32), D: np.ones(4, np.float32), EXPERT: canary()}
    if kind == DataKind.METRICS:
        data = {"val_dice": 0.5}
    meta: Any = {ROUND_KEY: 1, MetaKey.NUM_STEPS_CURRENT_ROUND: 12, FINGERPRINT_KEY: "ab" * 32}
    dxo = DXO(DataKind.WEIGHT_DIFF, data=data, meta=meta)
    dxo.data_kind = kind
    changes: list[Callable[[], Any]] = [
        lambda: data.__setitem__(name(r), value(r)),
        lambda: data.__setitem__(r.choice([A, D]), value(r)),
        lambda: data.pop(r.choice([A, D]), None),
        lambda: meta.__setitem__(name(r), value(r)),
        lambda: meta.__setitem__(r.choice([ROUND_KEY, MetaKey.NUM_STEPS_CURRENT_ROUND, FINGERPRINT_KEY]), value(r)),
        lambda: meta.__setitem__(MetaKey.INITIAL_METRICS, value(r)),
    ]
    late: list[Callable[[Any], Any]] = [
        lambda s: s.set_header(name(r), value(r)),
        lambda s: s.set_header(ReservedHeaderKey.RC, r.choice([SECRET, "OK", "EXECUTION_EXCEPTION", value(r)])),
        lambda s: s.set_header(ReservedHeaderKey.COOKIE_JAR, value(r)),
        lambda s: s.__setitem__(name(r), value(r)),
        lambda s: s.__setitem__(ReservedHeaderKey.HEADERS, value(r)),
        lambda s: s.pop(r.choice(list(s)), None),
    ]
    for _ in range(r.randint(1, 3)):
        r.choice(changes)()
    result: Any
    try:
        result = dxo.to_shareable()
    except Exception:
        # what NVFlare itself cannot pack never comes this far; send it raw
        result = Shareable({"DXO": data, "meta": meta})
    for _ in range(r.randint(0, 2)):
        try:
            r.choice(late)(result)
        except Exception:
            continue
    if r.random() < 0.02:
        result = value(r)
    return result, task


def holds(found: Any) -> bool:
    """Whether a canary value or the secret is anywhere in what passed."""
    if isinstance(found, np.ndarray):
        return found.dtype == object or bool((found == CANARY).any()) or SECRET in str(found.tolist())
    if isinstance(found, dict):
        return any(holds(key) or holds(one) for key, one in found.items())
    if isinstance(found, (list, tuple, set)):
        return any(holds(one) for one in found)
    if isinstance(found, (bytes, str)):
        return SECRET in (found.decode(errors="replace") if isinstance(found, bytes) else found)
    # a metric is a number of its own; an object of another class is none of ours
    return not isinstance(found, (int, float, type(None), DataKind))


def test_nothing_personal_passes_and_nothing_crashes() -> None:
    r = random.Random(20)
    outcomes: Counter[str] = Counter()
    for number in range(PAYLOADS):
        result, task = payload(r)
        for code, personal in (("E19", PERSONAL), ("E20", {})):
            try:
                passed = check_result(result, task, shared=SHARED, personal=personal, code=code)
                headers = check_headers(result, code=code) if code == "E20" else {}
            except PFedSAMError as error:
                assert error.code == code
                outcomes["refused"] += 1
                continue
            assert set(passed.tensors) <= set(SHARED), number
            assert not holds(passed.shareable), number
            assert set(headers) <= {
                ReservedHeaderKey.COOKIE_JAR,
                ReservedHeaderKey.TASK_NAME,
                ReservedHeaderKey.TASK_ID,
                ReservedHeaderKey.PEER_PROPS,
            }
            outcomes["passed"] += 1
    # the test means something: both outcomes are common
    assert outcomes["refused"] > PAYLOADS / 2 and outcomes["passed"] > PAYLOADS / 20, outcomes
