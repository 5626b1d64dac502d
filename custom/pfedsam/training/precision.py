"""Whether bfloat16 is worth it: some processors only imitate it, and a step then takes many times as long."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from pfedsam.bundles import literals_of

logger = logging.getLogger(__name__)

#: Side of the matrices of the measurement, and how often they are multiplied.
_SIDE, _TIMES = 384, 3


@cache
def bfloat16_pays(device: str = "auto") -> bool:
    """Whether products are faster in bfloat16 than in float32, by a measurement of less than a second on a CPU.

    Args:
        device: a torch device, or `auto` for the first GPU, else the CPU.
    """
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind.type != "cpu" or _seconds(torch.bfloat16) < _seconds(torch.float32)


def slow_precision(bundle: str, overrides: Mapping[str, Any] | None, device: str = "auto") -> dict[str, Any]:
    """The setting that switches a bundle's `amp` off where bfloat16 would be slower, told in the log; else none.

    Args:
        bundle: name of an installed bundle.
        overrides: of the bundle.
        device: see `bfloat16_pays`.
    """
    if not literals_of(bundle, overrides).get("amp") or bfloat16_pays(device):
        return {}
    logger.warning("amp is off: this processor only imitates bfloat16, which would take longer than float32")
    return {"amp": False}


def _seconds(dtype: torch.dtype) -> float:
    """Of a product, the fastest of some."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    fastest = float("inf")
    for _ in range(_TIMES):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
