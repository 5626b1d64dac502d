"""Cache of the frozen trunk: features before the first adapted block are computed once for each slice and variant."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from pfedsam.files import read_into

logger = logging.getLogger(__name__)

GIB = 1024**3


#: First word of the keys of training; see `FeatureCache`.
TRAINING = "train"


class FeatureCache:
    """Features by key, in memory or in one file, up to a limit. What does not fit is computed anew.

    Training comes first: it takes the places that others hold, one by one as it needs them, and nobody takes its own.
    A round validates before it trains, and would fill the cache otherwise with what is read once a round.

    Args:
        limit_gb: at most so many GiB; 0 turns the cache off.
        folder: where the file is written; None for memory. It holds features of patients' images: it has no name in
            the folder, so that nobody else opens it and nothing is left of it, however the process ends. It is read
            and not mapped: what it holds is no memory of the process.
        dtype: of the stored features; `float32` is exact, `float16` and `bfloat16` halve the bytes.
    """

    def __init__(self, limit_gb: float = 2.0, folder: str | None = None, dtype: str = "float32") -> None:
        self.limit = int(limit_gb * GIB)
        self.folder = Path(folder) if folder else None
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.rows: dict[Hashable, int] = {}
        self.hits = self.misses = 0
        #: Of training alone: hits and misses.
        self.trained = [0, 0]
        self._others: dict[Hashable, None] = {}
        self._memory: list[Tensor] = []
        self._file: BinaryIO | None = None
        self._shape: torch.Size | None = None
        self._dtypes: dict[Hashable, torch.dtype] = {}
        self._full = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of the stored features."""
        return len(self.rows) * self._row_bytes()

    def features(self, trunk: Callable[[Tensor], Tensor], images: Tensor, keys: Sequence[Hashable]) -> Tensor:
        """Features of a batch: stored ones where there are, the others from `trunk`.

        Args:
            trunk: images `(B, 3, H, W)` to features, a function of one image each and without gradient.
            images: `(B, 3, H, W)`.
            keys: what identifies each image (and its augmentation).

        Returns:
            features on the device and, when nothing is reduced, in the dtype of `trunk`'s output.
        """
        missing = [i for i, key in enumerate(keys) if key not in self.rows]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        for i, key in enumerate(keys):
            self.trained[i in missing] += is_of_training(key)
        fresh = trunk(images[missing]) if missing else None
        if fresh is not None:
            for i, row in zip(missing, fresh, strict=True):
                self._store(keys[i], row)
            if len(missing) == len(keys):
                return fresh
        new = dict(zip(missing, fresh if fresh is not None else (), strict=True))
        # the dtype that the trunk gave (bfloat16 under autocast), whatever is stored
        rows = [
            new[i] if i in new else self._read(key).to(images.device, self._dtypes[key], non_blocking=True)
            for i, key in enumerate(keys)
        ]
        return torch.stack(rows)

    def summary(self) -> str:
        """One line for the log: what is cached and, if not all, why."""
        if not self.limit:
            return "feature cache: off (limit 0)"
        where = f"in {self.folder}" if self.folder else "in memory"
        reason = "; full: the other slices are computed anew (raise cache_limit_gb)" if self._full else ""
        return (
            f"feature cache: {len(self)} slices, {self.bytes / GIB:.2f} of {self.limit / GIB:.2f} GiB {where}, "
            f"{self.hits} hits, {self.misses} computed{self._training()}{reason}"
        )

    def _training(self) -> str:
        hits, misses = self.trained
        return f" (in training {hits / (hits + misses):.0%} of {hits + misses} from the cache)" if hits + misses else ""

    def _row_bytes(self) -> int:
        return 0 if self._shape is None else self._shape.numel() * torch.empty((), dtype=self.dtype).element_size()

    def _store(self, key: Hashable, row: Tensor) -> None:
        if self._shape is None:
            self._shape = row.shape
        # a key may come twice in a batch; another shape (a last image of another size) has no place in the table
        if key in self.rows or row.shape != self._shape:
            return
        number = self._place(key)
        if number is None:
            self._full = self.limit > 0
            return
        stored = row.detach().to("cpu", self.dtype)
        if self.folder is not None:
            os.pwrite(self._handle(), _bytes_of(stored), number * self._row_bytes())
        elif number < len(self._memory):
            self._memory[number].copy_(stored)
        else:
            self._memory.append(stored.clone())
        self.rows[key], self._dtypes[key] = number, row.dtype
        if not is_of_training(key):
            self._others[key] = None

    def _place(self, key: Hashable) -> int | None:
        """A free row, for training else the oldest that is not of training; None if there is none."""
        if (len(self.rows) + 1) * self._row_bytes() <= self.limit:
            return len(self.rows)
        if not (is_of_training(key) and self._others):
            return None
        oldest = next(iter(self._others))
        del self._others[oldest], self._dtypes[oldest]
        return self.rows.pop(oldest)

    def _read(self, key: Hashable) -> Tensor:
        row = self.rows[key]
        if self.folder is None:
            return self._memory[row]
        assert self._shape is not None
        stored = torch.empty(self._shape, dtype=self.dtype)
        read_into(self._handle(), _bytes_of(stored), row * self._row_bytes())
        return stored

    def _handle(self) -> int:
        """Descriptor of the file, which has no name."""
        if self._file is None:
            assert self.folder is not None
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = cast(BinaryIO, tempfile.TemporaryFile(dir=self.folder, prefix="features-"))  # noqa: SIM115
        return self._file.fileno()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, of any type."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data.cast("B")


def is_of_training(key: Hashable) -> bool:
    """Whether features are of a slice of training."""
    return isinstance(key, tuple) and key[:1] == (TRAINING,)
