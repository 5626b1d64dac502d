"""Volumes as a bundle's deterministic transforms give them, whose memory does not grow with the site.

The first volumes are kept in memory. Those beyond a budget are read from a file slice by slice, as training draws them.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from typing import Any, BinaryIO, Protocol, cast

from monai.transforms import Compose
from torch import Tensor
from torch.utils.data import Dataset

from pfedsam.data.kept_volumes import KeptVolumes
from pfedsam.data.labels import OPEN
from pfedsam.data.volume_file import LABELLED, StoredVolume, append, compact

logger = logging.getLogger(__name__)

GIB = 1024**3
#: Seconds between two lines of the log while volumes are prepared.
EVERY = 30


class PreparedVolumes(Dataset[dict[str, Any]]):
    """Volumes by number, and windows of their slices.

    What comes from the first transform on that only gives a view (see `pfedsam.data.slices.SliceChannelsd`) is not
    stored: it is done anew for each item.

    Args:
        data: items with `image` and `label` paths (see `pfedsam.data.sites.datalist`).
        transform: of a volume, deterministic; arrays have their slices on the last axis.
        memory_gb: at most so many GiB of arrays in memory. The others are in a file without a name in the system's
            folder of temporary files, of which nothing is left however the process ends.
        kept: arguments of `pfedsam.data.kept_volumes.KeptVolumes`: all volumes are then read from files that the next
            job finds again, and none is in memory, unless a file cannot be written, which the log says.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        transform: Callable[[Any], Any],
        memory_gb: float = 0.5,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.data = list(data)
        self.transform, self._view = stored_part(transform)
        self._free = int(memory_gb * GIB)
        self._file: BinaryIO | None = None
        self._kept = None if kept is None else KeptVolumes(**kept)
        self._cannot_keep = False
        self.volumes: list[_Volume] = []
        told = time.monotonic()
        for number, item in enumerate(self.data, 1):
            self.volumes.append(self._volume(item))
            if time.monotonic() - told >= EVERY:
                told = time.monotonic()
                logger.info("%d of %d volumes prepared", number, len(self.data))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The whole volume, as the transform gives it."""
        return self._view({**self.data[number], **self.volumes[number].whole()})

    def window(self, number: int, first: int, last: int) -> dict[str, Tensor]:
        """The slices from `first` to the one before `last` of `image` and `label`, a label of 0 and 1 as bytes."""
        return self.volumes[number].window(("image", "label"), first, last)

    def depth(self, number: int) -> int:
        """Slices of a volume's `image`."""
        return self.volumes[number].depth

    def labelled(self, number: int) -> list[bool]:
        """Which slices of a volume have a label: a voxel of a class in it."""
        return self.volumes[number].labelled

    def _volume(self, item: Mapping[str, Any]) -> _Volume:
        found = self._kept.find(item) if self._kept is not None else None
        if found is not None:
            return found
        values = prepared(item, self.transform)
        if self._kept is not None and not self._cannot_keep:
            try:
                return self._kept.save(item, values)
            except (OSError, TypeError) as error:
                self._cannot_keep = True
                logger.warning("prepared volumes cannot be kept (%s): the next job prepares them anew", error)
        held = _HeldVolume(values)
        if held.bytes > self._free:
            with suppress(TypeError):  # what cannot be written stays in memory
                return self._written(values)
        self._free -= held.bytes
        return held

    def _written(self, values: Mapping[str, Any]) -> StoredVolume:
        """A volume in the file without a name."""
        if self._file is None:
            self._file = cast(BinaryIO, tempfile.TemporaryFile(prefix="volumes-"))  # noqa: SIM115
        handle = self._file.fileno()
        return StoredVolume(append(self._file, values), lambda: nullcontext(handle))


class _Volume(Protocol):
    """See `pfedsam.data.volume_file.StoredVolume`."""

    @property
    def depth(self) -> int: ...

    @property
    def labelled(self) -> list[bool]: ...

    def whole(self) -> dict[str, Any]: ...

    def window(self, keys: tuple[str, ...], first: int, last: int) -> dict[str, Tensor]: ...


class _HeldVolume:
    """A volume in memory."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.labelled: list[bool] = values[LABELLED]
        self.depth = int(values["image"].shape[-1])
        self.given = {key: value.dtype for key, value in values.items() if isinstance(value, Tensor)}
        self.values = {key: compact(value) for key, value in values.items() if key != LABELLED}
        self.bytes = sum(value.nbytes for value in self.values.values() if isinstance(value, Tensor))

    def whole(self) -> dict[str, Any]:
        return {key: value.to(self.given[key]) if key in self.given else value for key, value in self.values.items()}

    def window(self, keys: tuple[str, ...], first: int, last: int) -> dict[str, Tensor]:
        return {key: self.values[key][..., first:last] for key in keys}


def prepared(item: Mapping[str, Any], transform: Callable[[Any], Any]) -> dict[str, Any]:
    """What a transform makes of an item, without what it passes on, and which slices have a label."""
    volume = transform(dict(item))
    made = {key: value for key, value in volume.items() if isinstance(value, Tensor) or value is not item.get(key)}
    return {**made, LABELLED: _labelled(made.get("label"))}


def _labelled(label: Tensor | None) -> list[bool]:
    """Which slices hold a class."""
    if label is None:
        return []
    found = label > 0
    if bool((label == OPEN).any()):
        found &= label != OPEN
    return found.flatten(0, -2).any(dim=0).tolist()


def stored_part(transform: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """A transform as the part whose result is stored, and the part that is done for each item, from the first view."""
    steps = transform.transforms if isinstance(transform, Compose) else ()
    views = [number for number, step in enumerate(steps) if getattr(step, "gives_a_view", False)]
    if not views:
        return transform, Compose([])
    return Compose(steps[: views[0]]), Compose(steps[views[0] :])
