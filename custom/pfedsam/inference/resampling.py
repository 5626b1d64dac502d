"""Resampling of large volumes with little memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Spacingd
from monai.utils import TraceKeys


class SlabSpacingd(Spacingd):
    """MONAI's `Spacingd` that is inverted a few slices at a time, if slices were resampled within their plane only.

    MONAI makes seven numbers for each voxel of the whole volume before it interpolates one.
    """

    #: Slices at a time.
    SLAB = 16

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Invert every key."""
        entries: dict[Any, Any] = dict(data)
        return {**entries, **{key: self._inverse(entries[key]) for key in self.key_iterator(entries)}}

    def _inverse(self, volume: MetaTensor) -> torch.Tensor:
        done = volume.applied_operations[-1]
        size = tuple(int(length) for length in done[TraceKeys.ORIG_SIZE])
        if len(size) != 3 or not _in_plane(volume, done, size):
            return self.spacing_transform.inverse(volume)
        out = torch.empty((len(volume), *size), dtype=torch.float32, device=volume.device)
        part: Any = volume
        for first in range(0, size[2], self.SLAB):
            last = min(first + self.SLAB, size[2])
            operations = deepcopy(volume.applied_operations)
            operations[-1][TraceKeys.ORIG_SIZE] = (*size[:2], last - first)
            slab = volume.as_tensor()[..., first:last]
            part = self.spacing_transform.inverse(
                MetaTensor(slab, meta=deepcopy(volume.meta), applied_operations=operations)
            )
            out[..., first:last] = part
        return MetaTensor(out, meta=part.meta, applied_operations=part.applied_operations)


def _in_plane(volume: MetaTensor, done: Mapping[str, Any], size: tuple[int, ...]) -> bool:
    """Whether a slice of the original comes from the slice of the same number, and from no other."""
    if volume.shape[-1] != size[2]:
        return False
    source = np.asarray(done[TraceKeys.EXTRA_INFO]["src_affine"], dtype=float)
    way = np.linalg.solve(np.asarray(volume.affine, dtype=float), source)
    rest = np.eye(4)
    return bool(np.allclose(way[2], rest[2], atol=1e-4) and np.allclose(way[:, 2], rest[:, 2], atol=1e-4))
