"""Dictionary transforms that bundles need beside MONAI's: labels as classes, pictures as volumes of one slice."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from monai.transforms import MapTransform
from monai.transforms.utils_pytorch_numpy_unification import percentile
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from pfedsam.data.intensity import NO_WINDOW, WINDOW
from pfedsam.data.labels import OPEN, UNKNOWN, black_and_white, class_numbers, found_values
from pfedsam.errors import ErrorCode, PFedSAMError, few

logger = logging.getLogger(__name__)


class ClassChannelsd(MapTransform):
    """Integer labels `(1, ...)` to one channel of 0 and 1 for each class, `(C, ...)`.

    Where a label does not say what is there, all channels hold 2, see `pfedsam.data.labels`.

    Args:
        keys: of the labels.
        values: for each class the numbers that belong to it: `[[1, 2], [2]]` for two nested classes.
        names: of the classes; number n is the n-th name.
        label_map: what a site's own values mean, for example `{"3": "disc", "4": "cup", "9": "background"}`; None if
            the site's labels hold the class numbers.
    """

    def __init__(
        self,
        keys: Any,
        values: Sequence[Sequence[int]],
        names: Sequence[str],
        label_map: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(keys)
        self.values = [list(numbers) for numbers in values]
        self.numbers = class_numbers(names, label_map)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key.

        Raises:
            PFedSAMError: E07 naming the file for a value that is no class.
        """
        return {**data, **{key: self._channels(data[key]) for key in self.key_iterator(dict(data))}}

    def _channels(self, label: Tensor) -> Tensor:
        numbers = _whole(label[:1])
        white = black_and_white(_found(numbers), self.numbers)
        if white is not None:
            numbers = numbers // white
        found = _found(numbers)
        wrong = [value for value in found if value not in self.numbers and value != UNKNOWN]
        if wrong:
            source = getattr(label, "meta", {}).get("filename_or_obj", "a label")
            shown, known = few(map(str, wrong)), list(self.numbers)
            raise PFedSAMError(
                ErrorCode.LABEL_OUT_OF_RANGE, f"{source} holds {shown}, expected only {known}.", "Correct or map it."
            )
        channels = torch.cat([self._one_of(numbers, classes) for classes in self.values])
        if any(self.numbers.get(value, UNKNOWN) == UNKNOWN for value in found):
            unknown = self._one_of(numbers, [UNKNOWN])
            if UNKNOWN in found:  # else a byte, which would be compared with what is left of the number in a byte
                unknown |= numbers == UNKNOWN
            channels = channels.to(torch.uint8).masked_fill_(unknown, OPEN)
        return convert_to_dst_type(channels, dst=label, dtype=torch.float32)[0]

    def _one_of(self, numbers: Tensor, classes: Sequence[int]) -> Tensor:
        """Where a label holds a value that means one of some class numbers."""
        # a site's map may name values that the type of this label cannot hold
        largest = torch.iinfo(numbers.dtype).max
        meaning = [value for value, number in self.numbers.items() if number in classes and value <= largest]
        # a volume has millions of voxels: comparing costs a tenth of `torch.isin`
        found = torch.zeros_like(numbers, dtype=torch.bool)
        for value in meaning:
            found |= numbers == value
        return found


def _whole(label: Tensor) -> Tensor:
    """Label values as whole numbers: bytes where they fit, since a volume has millions."""
    plain = convert_to_tensor(label, track_meta=False)
    if plain.is_floating_point():
        plain = plain.round()
    low, high = int(plain.min()), int(plain.max())
    return plain.to(torch.uint8 if low >= 0 and high <= np.iinfo(np.uint8).max else torch.int64)


def _found(numbers: Tensor) -> list[int]:
    """The different values of a tensor of whole numbers, sorted."""
    return found_values(numbers.cpu().numpy())


class IntensityWindowd(MapTransform):
    """Intensities between two percentiles of the volume to 0 to 1, what lies outside clipped.

    Where the percentiles coincide (nearly all voxels have one value), the window is from the smallest to the largest
    value, and a warning says so.

    Args:
        keys: of the images, any shape.
        lower, upper: percentiles, 0 to 100.
    """

    def __init__(self, keys: Any, lower: float = WINDOW[0], upper: float = WINDOW[1]) -> None:
        super().__init__(keys)
        self.lower, self.upper = lower, upper

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key."""
        return {**data, **{key: self._scaled(data[key]) for key in self.key_iterator(dict(data))}}

    def _scaled(self, image: Any) -> Any:
        plain = convert_to_tensor(image, track_meta=False).float()
        low, high = cast(Any, percentile(plain, [self.lower, self.upper]))
        if low == high:
            source = getattr(image, "meta", {}).get("filename_or_obj", "an image")
            logger.warning("%s: %s.", source, NO_WINDOW)
            low, high = plain.min(), plain.max()
            # a constant image is all background
            high = torch.maximum(high, low + 1) if low == high else high
        scaled = (plain - low).div_(high - low).clamp_(0, 1)
        return convert_to_dst_type(scaled, dst=image, dtype=torch.float32)[0]


class ClassNumbersd(MapTransform):
    """Probabilities `(C, ...)` to class numbers `(1, ...)`, see `class_map`.

    Args:
        keys: of the probabilities.
        values: for each class the numbers that belong to it, as in `ClassChannelsd`.
    """

    def __init__(self, keys: Any, values: Sequence[Sequence[int]] | None = None) -> None:
        super().__init__(keys)
        self.values = values

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key."""
        return {
            **data,
            **{key: class_map(data[key], values=self.values)[None] for key in self.key_iterator(dict(data))},
        }


class PictureAsVolumed(MapTransform):
    """A picture `(C, H, W)` to a volume of one slice, `(C, H, W, 1)`.

    Args:
        keys: of the pictures.
        colour: make three channels: grey is repeated, an alpha channel is left out.
    """

    def __init__(self, keys: Any, colour: bool = False) -> None:
        super().__init__(keys)
        self.colour = colour

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key."""
        found = dict(data)
        for key in self.key_iterator(found):
            picture = found[key]
            if self.colour:
                picture = picture[:3] if len(picture) > 2 else torch.cat([picture[:1]] * 3)
            found[key] = picture.unsqueeze(-1)
        return found


class VolumeAsPictured(MapTransform):
    """A volume of one slice `(C, H, W, 1)` back to a picture `(C, H, W)`, before its other transforms are inverted."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key."""
        return {**data, **{key: data[key].squeeze(-1) for key in self.key_iterator(dict(data))}}


def class_map(probabilities: Tensor, threshold: float = 0.5, values: Sequence[Sequence[int]] | None = None) -> Tensor:
    """Class numbers `(...)` of probabilities `(C, ...)`, 0 where none is above a threshold.

    Of nested classes the inner is taken, the last of them above the threshold; of classes that lie beside each other
    the most probable.

    Args:
        probabilities: of each class.
        threshold: 0 to 1.
        values: for each class the numbers that belong to it; classes that share one are nested. None: all are.
    """
    shape = (-1, *[1] * (probabilities.ndim - 1))
    numbers = torch.arange(1, len(probabilities) + 1, dtype=torch.uint8, device=probabilities.device).reshape(shape)
    nests = [list(range(len(probabilities)))] if values is None else _nests(values)
    inner = [((probabilities[nest] > threshold) * numbers[nest]).amax(dim=0) for nest in nests]
    if len(nests) == 1:
        return inner[0]
    likely = torch.stack([probabilities[nest].amax(dim=0) for nest in nests]).argmax(dim=0, keepdim=True)
    return torch.stack(inner).gather(0, likely)[0]


def _nests(values: Sequence[Sequence[int]]) -> list[list[int]]:
    """Channels in groups that share class numbers, each in order."""
    nests: list[tuple[set[int], list[int]]] = []
    for channel, numbers in enumerate(values):
        inside, channels = set(numbers), [channel]
        for nest in [one for one in nests if one[0] & inside]:
            nests.remove(nest)
            inside, channels = inside | nest[0], [*nest[1], *channels]
        nests.append((inside, sorted(channels)))
    return sorted(channels for _, channels in nests)
