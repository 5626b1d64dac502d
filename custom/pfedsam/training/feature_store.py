"""Features of the frozen trunk shared by several runs on one machine: the key is the image's content."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfedsam.training.feature_cache import FeatureCache

logger = logging.getLogger(__name__)

#: Bytes of the SHA-256 at the end of a file.
_DIGEST = hashlib.sha256().digest_size


class FeatureStore(FeatureCache):
    """A feature cache in files that runs with the same frozen trunk share, also at the same time.

    A file's name is the hash of the trunk's weights, of the image as the network gets it, and of whether autocast is
    on, so nothing stale is ever read, whatever the strategy, the split or the augmentation. A file ends with the digest
    of its place and its content: one that was cut off, changed or renamed is computed anew. The files are features of
    patients' images: keep the folder where the images are, and delete it when the comparison is done.

    Args:
        folder: of the files; made if need be.
        dtype: of the stored features; `float32` is exact.
    """

    def __init__(self, folder: str, dtype: str = "float32") -> None:
        super().__init__(limit_gb=0, dtype=dtype)
        self.store = Path(folder)
        self._trunks: dict[int, str] = {}
        self._cannot_write = False

    def features(self, trunk: Callable[[Tensor], Tensor], images: Tensor, keys: Sequence[Hashable]) -> Tensor:
        """As `FeatureCache.features`; the keys are not used."""
        network: Any = trunk.__self__  # type: ignore[attr-defined]
        paths = [self._path(network, image) for image in images]
        rows = [self._load(path) for path in paths]
        missing = [i for i, row in enumerate(rows) if row is None]
        fresh = trunk(images[missing]).detach() if missing else None
        shapes = {row.shape for row in (*rows, *(() if fresh is None else fresh[:1])) if row is not None}
        if len(shapes) > 1:  # somebody else's files: none of them is used
            missing = list(range(len(rows)))
            fresh = trunk(images).detach()
        self.hits += len(rows) - len(missing)
        self.misses += len(missing)
        for i, row in zip(missing, () if fresh is None else fresh, strict=True):
            rows[i] = row
            self._save(paths[i], row)
        return torch.stack([row.to(images.device, torch.float32) for row in rows if row is not None])

    def summary(self) -> str:
        """One line for the log."""
        return f"feature store: {self.store}, {self.hits} hits, {self.misses} computed"

    def _path(self, network: Any, image: Tensor) -> Path:
        if id(network) not in self._trunks:
            self._trunks[id(network)] = network.trunk_fingerprint()
        content = hashlib.sha256(np.ascontiguousarray(image.detach().cpu().numpy()).tobytes())
        reduced = torch.is_autocast_enabled(image.device.type)
        content.update(str((tuple(image.shape), image.dtype, self.dtype, reduced)).encode())
        name = content.hexdigest()
        return self.store / self._trunks[id(network)][:16] / name[:2] / f"{name}.npy"

    def _load(self, path: Path) -> Tensor | None:
        try:
            data = path.read_bytes()
            if data[-_DIGEST:] != self._digest(path, data[:-_DIGEST]):
                return None
            return torch.from_numpy(np.load(io.BytesIO(data[:-_DIGEST]), allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None

    def _save(self, path: Path, row: Tensor) -> None:
        stored = row.cpu().to(torch.float16 if self.dtype == torch.float16 else torch.float32)
        content = io.BytesIO()
        np.save(content, stored.numpy(), allow_pickle=False)
        data = content.getvalue()
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # not flushed to disk: what a loss of power leaves half written has another digest
            temporary.write_bytes(data + self._digest(path, data))
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self._cannot_write:
                logger.warning("features cannot be stored (%s): they are computed anew each time", error)
            self._cannot_write = True

    def _digest(self, path: Path, data: bytes) -> bytes:
        """Of the key, which is the file's place in the store, and the content."""
        return hashlib.sha256(path.relative_to(self.store).as_posix().encode() + data).digest()


def store_settings(folder: str | Path | None) -> dict[str, Any]:
    """Settings that put a store in the place of a bundle's `feature_cache`; none without a folder."""
    if folder is None:
        return {}
    target = f"{FeatureStore.__module__}.{FeatureStore.__qualname__}"
    return {"feature_cache": {"_target_": target, "folder": str(folder), "dtype": "@cache_dtype"}}
