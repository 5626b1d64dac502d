"""Slices that look as if another scanner had taken them: random transforms of an image that leave its label alone."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch import Tensor

from pfedsam.data.slices import OTHERS
from pfedsam.errors import ErrorCode, PFedSAMError

#: Sides of the kernels of a random net, and the slope of its leaky ReLU for negative values.
KERNELS, SLOPE = (1, 3), 0.01
#: Weights `(out, in, k, k)` and shifts `(out,)` of the convolutions of a random net, in order.
Net = list[tuple[Tensor, Tensor]]


class RandGINd(RandomizableTransform, MapTransform):
    """The image blended with what a random net makes of it (GIN: Ouyang et al., arXiv 2111.12525).

    `x' = x + a (g(x) - x)`, `a ~ U(0, 1)`, mapped back to the range of x. FedGIN (arXiv 2508.05137) uses it in a
    federation.

    Theirs: g is a few convolutions, each with a kernel of side 1 or 3, with weights and shifts from N(0, 1), and a
    leaky ReLU behind each but the last; the blend. [ours]: the nets have one channel in and out, since the three
    channels of a grey image are three slices, which the published net mixes; the border is repeated and not filled with
    zeros, which would leave a frame; and the result has the range of x, where theirs has its norm: with that it leaves
    [0, 1], and little contrast is left when it is squeezed back.

    Args:
        keys: of the images, `(C, H, W)` in [0, 1].
        prob: of a restyled image; at 0 nothing changes.
        layers: convolutions of g.
        channels: between two of them.
        alike: one net for all channels, as slices of one scanner look alike; else each has its own: the hue of a colour
            picture changes, too.
    """

    def __init__(self, keys: Any, prob: float = 1.0, layers: int = 4, channels: int = 2, alike: bool = True) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.layers, self.channels, self.alike = layers, channels, alike

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key."""
        found = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(found):
                found[key] = convert_to_dst_type(self._restyled(found[key]), dst=found[key])[0]
        return found

    def _restyled(self, image: Any) -> Tensor:
        plain = convert_to_tensor(image, track_meta=False).float()
        strength = float(self.R.uniform())
        nets = [random_net(self.R, self.layers, self.channels) for _ in range(1 if self.alike else len(plain))]
        return restyled(plain, nets, strength)


class RandAmplitudeMixd(RandomizableTransform, MapTransform):
    """The lowest frequencies of the image get amplitudes between its own and those of another slice of the same site.

    `A' = r A + (1 - r) A_other`, `r ~ U(0, 1)`, in the centre window of the spectrum of each channel; the phase, which
    holds the anatomy, stays (after FedDG-ELCFS: Liu et al., arXiv 2103.06030).

    Theirs: the formula. [ours]: the other slice is of another case of the same site, so that no amplitude leaves a
    site, where theirs come from other sites; and the result is mapped back to [0, 1], see `within_range`.

    Args:
        keys: of the images, `(C, H, W)` in [0, 1].
        prob: of a restyled image; at 0 nothing changes.
        window: from the centre of the spectrum to the border of the window, as a part of the image's shorter side: 0.01
            of 128 pixels is 3 x 3 frequencies. At 0 it is the mean of each channel alone.
    """

    def __init__(self, keys: Any, prob: float = 1.0, window: float = 0.01) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.window = window

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Apply to every key.

        Raises:
            PFedSAMError: E32 if the data set gives no other slices, see `pfedsam.data.slices.OtherSlices`.
        """
        found = dict(data)
        self.randomize(None)
        if not self._do_transform:
            return found
        if OTHERS not in found:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                "amplitudes are to be mixed with another slice, but the bundle's data set gives none.",
                "Take pfedsam.data.slices.SliceDataset in the bundle, or leave the mixing out of the strategy.",
            )
        other = convert_to_tensor(found[OTHERS].draw(self.R), track_meta=False).float()
        ratio = float(self.R.uniform())
        for key in self.key_iterator(found):
            plain = convert_to_tensor(found[key], track_meta=False).float()
            mixed = within_range(mixed_amplitudes(plain, other, ratio, self.window))
            found[key] = convert_to_dst_type(mixed, dst=found[key])[0]
        return found


def random_net(random: np.random.RandomState, layers: int, channels: int) -> Net:
    """A net of one channel in and out, with weights and shifts from N(0, 1).

    Args:
        random: what it is drawn from.
        layers: convolutions.
        channels: between two of them.
    """
    widths = [1, *[channels] * (layers - 1), 1]
    net: Net = []
    for given, made in pairwise(widths):
        side = KERNELS[int(random.randint(len(KERNELS)))]
        weights, shifts = random.standard_normal((made, given, side, side)), random.standard_normal(made)
        net.append((torch.from_numpy(weights).float(), torch.from_numpy(shifts).float()))
    return net


def through(net: Net, images: Tensor) -> Tensor:
    """What a net makes of images `(N, 1, H, W)`: the same shape."""
    for number, (weights, shifts) in enumerate(net):
        border = weights.shape[-1] // 2
        images = F.pad(F.leaky_relu(images, SLOPE) if number else images, [border] * 4, mode="replicate")
        images = F.conv2d(images, weights, shifts)
    return images


def restyled(image: Tensor, nets: list[Net], strength: float) -> Tensor:
    """An image blended with what random nets make of it, see `RandGINd`.

    Args:
        image: `(C, H, W)` in [0, 1].
        nets: one for all channels, or one for each.
        strength: a, from 0, which gives the image itself, to 1.

    Returns:
        `(C, H, W)`, whose smallest and largest value are those of the image; the image itself for a blend of one value.
    """
    parts = zip(nets, image[:, None].chunk(len(nets)), strict=True)
    blend = torch.lerp(image, torch.cat([through(net, part) for net, part in parts])[:, 0], strength)
    (low, high), (lowest, highest) = image.aminmax(), blend.aminmax()
    if float(highest) == float(lowest):
        return image
    scale = (high - low) / (highest - lowest)
    return (blend * scale + (low - lowest * scale)).clamp(low, high)


def mixed_amplitudes(image: Tensor, other: Tensor, ratio: float, window: float) -> Tensor:
    """An image with low frequencies of amplitudes between its own and another's, see `RandAmplitudeMixd`.

    Args:
        image: `(C, H, W)`.
        other: the same shape.
        ratio: r, the weight of the image's own amplitudes; 1 gives the image itself, up to rounding.
        window: half of the window's side, as a part of the image's shorter side.

    Returns:
        `(C, H, W)`; it may lie outside [0, 1].
    """
    height, width = image.shape[-2:]
    half = int(window * min(height, width))
    rows, columns = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
    near = (rows.abs().round() <= half)[:, None] & (columns.abs().round() <= half)
    spectrum = torch.fft.rfft2(image)
    own, others = spectrum.abs(), torch.fft.rfft2(other).abs()
    amplitude = torch.where(near, ratio * own + (1 - ratio) * others, own)
    return torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=(height, width))


def within_range(image: Tensor) -> Tensor:
    """An image whose values are mapped linearly to [0, 1] if some lie outside; else the same values. [ours]

    Below 0 the lowest becomes 0, above 1 the highest 1: nothing is cut off.
    """
    low, high = image.min().clamp(max=0), image.max().clamp(min=1)
    return (image - low) / (high - low)
