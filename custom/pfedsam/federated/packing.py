"""Smaller payloads: fp16, or int8 with error feedback kept at the site. No GPU and no further library needed.

`PackPayload` is the last filter of a site, `UnpackPayload` the first at the server, before the guard, which so sees
the same float32 tensors as without packing. The data kind stays WEIGHT_DIFF with its metrics in the metadata: what
reads the raw result (model selection, metrics files) works as before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.privacy import holds_update
from pfedsam.files import write_atomically

Precision = Literal["fp16", "int8"]
PACKED = "pfedsam_packed"
RESIDUAL_FILE = "pfedsam_residual.safetensors"
_LEVELS = 127


class PackPayload(Filter):
    """Outgoing filter of a site, last in the chain.

    Args:
        precision: `fp16`, or `int8` (one scale a tensor). What int8 loses in a round is added in the next (error
            feedback); it is kept in the job's run folder at the site and never sent, and begins at zero in a job that
            goes on from another (`pfedsam job resume`).

    Raises:
        ValueError: for another precision.
    """

    def __init__(self, precision: Precision = "int8") -> None:
        super().__init__()
        if precision not in ("fp16", "int8"):
            raise ValueError(f"precision is '{precision}', expected fp16 or int8")
        self.precision: Precision = precision

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Pack a weight difference; anything else passes as it is."""
        if shareable.get_return_code() != ReturnCode.OK or not holds_update(shareable):
            return shareable
        dxo = from_shareable(shareable)
        run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        path = run_dir / RESIDUAL_FILE
        residual = self._residual(path)
        packed, left, scales = pack(dxo.data, self.precision, residual)
        if left:
            write_atomically(path, save(left))
        packing = {"precision": self.precision, "scales": scales}
        result = DXO(DataKind.WEIGHT_DIFF, data=packed, meta={**dxo.meta, PACKED: packing}).to_shareable()
        before, after = (sum(array.nbytes for array in tensors.values()) for tensors in (dxo.data, packed))
        self.logger.info(f"payload packed as {self.precision}: {before} to {after} bytes")
        return result

    def _residual(self, path: Path) -> dict[str, np.ndarray]:
        try:
            return load_file(path) if path.exists() else {}
        except (OSError, SafetensorError) as error:
            self.logger.warning(f"{path} could not be read ({error}): what int8 lost in the last round is lost")
            return {}


class UnpackPayload(Filter):
    """Filter of the server, first in the chain: float32 again, before the guard looks at it."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Unpack a packed weight difference; anything else passes as it is, for the guard.

        Raises:
            PFedSAMError: E20 if it cannot be unpacked; NVFlare then counts the site as failed.
        """
        if shareable.get_return_code() != ReturnCode.OK or not holds_update(shareable):
            return shareable
        dxo = from_shareable(shareable)
        if not isinstance(dxo.meta, dict) or PACKED not in dxo.meta:
            return shareable
        packing = dxo.meta.pop(PACKED)
        try:
            dxo.data = unpack(dxo.data, packing["precision"], packing["scales"])
        except Exception as error:
            raise PFedSAMError(
                ErrorCode.REFUSED_BY_GUARD, f"the payload could not be unpacked ({type(error).__name__})."
            ) from None
        result = dxo.to_shareable()
        for key, value in (shareable.get(ReservedHeaderKey.HEADERS) or {}).items():
            result.set_header(key, value)
        return result


def pack(
    data: dict[str, np.ndarray], precision: Precision, residual: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, float]]:
    """Pack float32 tensors.

    Args:
        data: by name.
        precision: `fp16` or `int8`.
        residual: what the last packing lost, by name; added first (int8 only).

    Returns:
        The packed tensors, what was lost now, the scale of each tensor (int8 only).
    """
    if precision == "fp16":
        return {name: array.astype(np.float16) for name, array in data.items()}, {}, {}
    packed, left, scales = {}, {}, {}
    for name, array in data.items():
        wanted = array + residual.get(name, 0)
        scale = float(np.abs(wanted).max(initial=0.0)) / _LEVELS or 1.0
        packed[name] = np.clip(np.rint(wanted / scale), -_LEVELS, _LEVELS).astype(np.int8)
        left[name] = (wanted - packed[name] * np.float32(scale)).astype(np.float32)
        scales[name] = scale
    return packed, left, scales


def unpack(data: dict[str, Any], precision: Precision, scales: dict[str, float]) -> dict[str, np.ndarray]:
    """The float32 tensors of `pack`.

    Raises:
        KeyError, TypeError, ValueError: if the payload is not what `pack` gives.
    """
    expected = {"fp16": np.float16, "int8": np.int8}[precision]
    tensors = {}
    for name, array in data.items():
        if type(array) is not np.ndarray or array.dtype != expected:
            raise TypeError(f"'{name}' is not {expected.__name__}")
        factor = np.float32(1.0 if precision == "fp16" else float(scales[name]))
        tensors[name] = array.astype(np.float32) * factor
    return tensors
