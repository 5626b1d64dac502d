"""A prepared volume in a file, slice by slice: what a bundle's transforms gave, and MONAI's trace of how.

The slices of an array lie one behind the other, so a few of them are read without the others. The index, which says
where, is JSON: nothing in either is executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from monai.data import MetaTensor
from monai.utils import TraceKeys
from torch import Tensor

from pfedsam.files import read_into

#: Key of a volume's list of which slices have a label.
LABELLED = "labelled"
#: Arrays of fewer axes are written into the index.
_LEAST_AXES = 3


def compact(value: Any) -> Any:
    """An array in one byte a voxel where that says the same, as a label of 0 and 1 does; else the value as it is."""
    if not isinstance(value, Tensor) or value.ndim < _LEAST_AXES or not value.is_floating_point():
        return value
    small = value.to(torch.uint8)
    return small if bool((small == value).all()) else value


def append(file: BinaryIO, volume: Mapping[str, Any]) -> dict[str, Any]:
    """Write a volume at the end of a file.

    Args:
        file: open for writing.
        volume: a dictionary of MONAI's; arrays have their slices on the last axis.

    Returns:
        The index: for JSON, and for `StoredVolume`.

    Raises:
        TypeError: for a value that the index cannot hold; nothing is written then.
        OSError: if it cannot be written.
    """
    index = {key: _entry(value) for key, value in volume.items()}
    for key, value in volume.items():
        if not _is_array(value):
            continue
        plain = np.ascontiguousarray(np.moveaxis(_plain(compact(value)), -1, 0))
        index[key] |= {"offset": file.seek(0, os.SEEK_END), "dtype": plain.dtype.str, "slices": list(plain.shape)}
        file.write(plain.data.cast("B"))
    file.flush()
    return index


@dataclass(frozen=True)
class StoredVolume:
    """A volume that was written.

    Attributes:
        index: from `append`.
        opened: gives the descriptor of the file for as long as it is read.
    """

    index: Mapping[str, Any]
    opened: Callable[[], AbstractContextManager[int]]

    @property
    def depth(self) -> int:
        """Slices of the array `image`."""
        return int(self.index["image"]["slices"][0])

    @property
    def labelled(self) -> list[bool]:
        """Which slices have a label, see `LABELLED`."""
        return list(_decoded(self.index[LABELLED]["value"]))

    def whole(self) -> dict[str, Any]:
        """All values, in the type and with the trace that they had.

        Raises:
            OSError: if the file is gone, or ends before.
        """
        with self.opened() as handle:
            return {key: _whole(handle, entry) for key, entry in self.index.items() if key != LABELLED}

    def window(self, keys: tuple[str, ...], first: int, last: int) -> dict[str, Tensor]:
        """The slices from `first` to the one before `last` of some arrays, as they are stored: see `compact`.

        Raises:
            OSError: as `whole`.
        """
        with self.opened() as handle:
            return {key: _slices(handle, self.index[key], first, last) for key in keys}


def _whole(handle: int, entry: Mapping[str, Any]) -> Any:
    if "value" in entry:
        return _decoded(entry["value"])
    tensor = _slices(handle, entry, 0, entry["slices"][0]).to(getattr(torch, entry["given"]))
    if entry["trace"] is None:
        return tensor
    trace = _decoded(entry["trace"])
    return MetaTensor(tensor, meta=trace["meta"], applied_operations=trace["applied"])


def _slices(handle: int, entry: Mapping[str, Any], first: int, last: int) -> Tensor:
    _, *shape = entry["slices"]
    values = np.empty((last - first, *shape), dtype=np.dtype(entry["dtype"]))
    read_into(handle, values.data.cast("B"), entry["offset"] + first * values[:1].nbytes)
    return torch.from_numpy(values).movedim(0, -1)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= _LEAST_AXES


def _plain(value: Tensor) -> np.ndarray:
    return (value.as_tensor() if isinstance(value, MetaTensor) else value).detach().cpu().numpy()


def _entry(value: Any) -> dict[str, Any]:
    """What the index says of a value before it is written."""
    if not _is_array(value):
        return {"value": _encoded(value)}
    traced = isinstance(value, MetaTensor)
    trace = _encoded({"meta": value.meta, "applied": value.applied_operations}) if traced else None
    return {"given": str(value.dtype).removeprefix("torch."), "trace": trace}


def _encoded(value: Any) -> Any:
    """For JSON: containers, arrays and tensors in a dictionary of one key that names the kind."""
    if isinstance(value, str):
        return str(value)  # also a name of MONAI's enumerations
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {"dict": [[str(key), _encoded(_without_identity(key, one))] for key, one in value.items()]}
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, np.ndarray) and value.dtype.kind in "buif":
        return {"array": value.tolist(), "dtype": value.dtype.str}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_encoded(one) for one in value]}
    raise TypeError(f"{type(value).__name__} cannot be written")


def _without_identity(key: Any, value: Any) -> Any:
    """MONAI's trace names a transform by its place in the memory of one process, or by this for any."""
    return TraceKeys.NONE if key == TraceKeys.ID else value


def _decoded(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "dict" in value:
        return {key: _decoded(one) for key, one in value["dict"]}
    if "tensor" in value:
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    if "array" in value:
        return np.asarray(value["array"], dtype=np.dtype(value["dtype"]))
    if "tuple" in value:
        return tuple(_decoded(one) for one in value["tuple"])
    return [_decoded(one) for one in value["list"]]
