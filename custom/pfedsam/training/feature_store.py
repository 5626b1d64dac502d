"""Features of the frozen trunk shared by several runs on one machine: the key is the image's content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfedsam.training.feature_cache import FeatureCache


class FeatureStore(FeatureCache):
    """A feature cache in files that runs with the same frozen trunk share, also at the same time.

    A file's name is the hash of the trunk's weights, of the image as the network gets it, and of whether autocast is
    on, so nothing stale is ever read, whatever the strategy, the split or the augmentation. The files are features of
    patients' images: keep the folder where the images are, and delete it when the comparison is done.

    Args:
        folder: of the files; made if need be.
        dtype: of the stored features; `float32` is exact.
    """

    def __init__(self, folder: str, dtype: str = "float32") -> None:
        super().__init__(limit_gb=0, dtype=dtype)
        self.store = Path(folder)
        self._trunks: dict[int, str] = {}

    def features(self, trunk: Callable[[Tensor], Tensor], images: Tensor, keys: Sequence[Hashable]) -> Tensor:
        """As `FeatureCache.features`; the keys are not used."""
        network: Any = trunk.__self__  # type: ignore[attr-defined]
        paths = [self._path(network, image) for image in images]
        rows = [self._load(path) for path in paths]
        missing = [i for i, row in enumerate(rows) if row is None]
        self.hits += len(rows) - len(missing)
        self.misses += len(missing)
        if missing:
            for i, row in zip(missing, trunk(images[missing]).detach(), strict=True):
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
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (FileNotFoundError, ValueError, EOFError):
            return None

    def _save(self, path: Path, row: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.npy")
        stored = row.cpu().to(torch.float16 if self.dtype == torch.float16 else torch.float32)
        np.save(temporary, stored.numpy(), allow_pickle=False)
        temporary.replace(path)


def store_settings(folder: str | Path | None) -> dict[str, Any]:
    """Settings that put a store in the place of a bundle's `feature_cache`; none without a folder."""
    if folder is None:
        return {}
    target = f"{FeatureStore.__module__}.{FeatureStore.__qualname__}"
    return {"feature_cache": {"_target_": target, "folder": str(folder), "dtype": "@cache_dtype"}}
