"""3-D head phantoms with lesions, drawn from a seed, and the scanners that make each site's images its own.

The anatomy is drawn from ellipsoids and
smoothed noise; what a scanner does to it (bias field, resolution, Rician noise, contrast curve, zoom) is done by
MONAI's transforms. Bright vessels, ventricle rims and small round spots lie beside the lesions, so no threshold finds
them. The last site is the most shifted: in its T1-like images the lesions are darker than the tissue, smaller and
noisier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Raised whenever the images change, so that an old phantom is written again.
VERSION = 1
#: What a volume covers in millimetres (right, anterior, superior), whatever its shape; (96, 96, 20) gives 2 x 2 x 5 mm.
FIELD_OF_VIEW = (192.0, 192.0, 100.0)

#: Intensity of each tissue in three kinds of image; `white` is the unit of the noise.
FLAIR = {
    "air": 0.0,
    "scalp": 0.62,
    "skull": 0.10,
    "csf": 0.13,
    "grey": 0.50,
    "white": 0.42,
    "nuclei": 0.48,
    "rim": 0.70,
    "vessel": 0.82,
    "lesion": 0.80,
}
T2 = FLAIR | {"scalp": 0.5, "csf": 0.86, "grey": 0.55, "white": 0.40, "nuclei": 0.46, "vessel": 0.08, "lesion": 0.80}
T1 = FLAIR | {"scalp": 0.95, "csf": 0.16, "grey": 0.52, "white": 0.68, "nuclei": 0.56, "rim": 0.52, "lesion": 0.30}
TISSUES = tuple(name for name in FLAIR if name != "lesion")

Volume = NDArray[Any]


@dataclass(frozen=True)
class Scanner:
    """What makes the images of one site its own.

    Args:
        tissue: intensity of each tissue, 0 to 1 (keys of `FLAIR`).
        gamma: exponent of the contrast curve; 1 leaves it straight.
        bias: largest coefficient of the bias field (MONAI's `RandBiasField`, degree 3).
        noise: standard deviation of the Rician noise, in the unit of `tissue`.
        blur: standard deviation of the in-plane blur, in voxels.
        gibbs: strength of the truncation artefact, 0 to 1 (MONAI's `GibbsNoise`).
        zoom: in-plane magnification; the voxel spacing shrinks by the same factor.
        radius: smallest and largest lesion radius in millimetres.
        scale: image value that stands for intensity 1.
    """

    tissue: Mapping[str, float] = field(default_factory=lambda: dict(FLAIR))
    gamma: float = 1.0
    bias: float = 0.15
    noise: float = 0.025
    blur: float = 0.5
    gibbs: float = 0.15
    zoom: float = 1.0
    radius: tuple[float, float] = (12.0, 24.0)
    scale: float = 1000.0


def scanners(sites: int, seed: int = 0) -> list[Scanner]:
    """The scanners of a federation: near the mean first, the most shifted last, two fixed and then drawn ones between.

    Args:
        sites: number of sites, at least 1.
        seed: decides the drawn scanners (more than four sites); the others do not depend on it.
    """
    fixed = [
        Scanner(),
        Scanner(gamma=1.5, bias=0.35, noise=0.03, blur=0.9, gibbs=0.3, zoom=1.1, radius=(11.0, 22.0), scale=3000.0),
        Scanner(_blend(FLAIR, T2, 0.5), gamma=0.75, bias=0.2, noise=0.05, zoom=0.92, radius=(13.0, 26.0), scale=400.0),
    ]
    last = Scanner(
        T1, gamma=0.9, bias=0.25, noise=0.045, blur=0.6, gibbs=0.3, zoom=1.05, radius=(12.0, 22.0), scale=1800.0
    )
    drawn = [_drawn_scanner(np.random.default_rng([seed, 1, index])) for index in range(4, sites)]
    first = [*fixed, *drawn][: max(sites - 1, 1)]
    return [*first, last][:sites]


def draw_case(
    scanner: Scanner, shape: tuple[int, int, int], seed: np.random.SeedSequence
) -> tuple[Volume, Volume, Volume]:
    """One patient in one scanner.

    Returns:
        Image (shape, int16), label (shape, uint8, 0 or 1) and affine (4, 4) in millimetres, RAS.
    """
    rng = np.random.default_rng(seed)
    spacing = np.array(FIELD_OF_VIEW) / np.array(shape)
    tissue, brain = _head(rng, shape, spacing)
    soft, label = _lesions(rng, shape, spacing, brain, scanner.radius)
    ideal = np.array([scanner.tissue[name] for name in TISSUES])[tissue]
    ideal *= 1 + 0.05 * _noise(rng, spacing, shape, 6.0) + 0.03 * _noise(rng, spacing, shape, 2.5)
    ideal += soft * (scanner.tissue["lesion"] * (1 + 0.1 * _noise(rng, spacing, shape, 5.0)) - ideal)
    image, label = _acquire(scanner, ideal, label, int(rng.integers(2**31)))
    spacing[:2] /= scanner.zoom
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    return image, label, affine


def _acquire(scanner: Scanner, ideal: Volume, label: Volume, seed: int) -> tuple[Volume, Volume]:
    """Pass intensities (0 to 1) through the scanner; the label follows the zoom only."""
    import torch
    from monai.transforms import (
        AdjustContrast,
        Compose,
        GaussianSmooth,
        RandBiasField,
        RandGibbsNoise,
        RandRicianNoise,
        Zoom,
    )

    zoom = (scanner.zoom, scanner.zoom, 1.0)
    scan = Compose(
        [
            Zoom(zoom, mode="trilinear", padding_mode="constant"),
            RandBiasField(prob=1.0, coeff_range=(-scanner.bias, scanner.bias)),
            GaussianSmooth((scanner.blur, scanner.blur, 0.3)),
            RandGibbsNoise(prob=1.0, alpha=(0.8 * scanner.gibbs, scanner.gibbs)),
            RandRicianNoise(prob=1.0, std=scanner.noise, sample_std=False),
            AdjustContrast(scanner.gamma),
        ]
    ).set_random_state(seed)
    image = np.asarray(scan(ideal[None].astype(np.float32)))[0]
    mask = torch.from_numpy(label[None].astype(np.float32))
    moved = np.asarray(Zoom(zoom, mode="nearest", padding_mode="constant")(mask))[0]
    return np.rint(image.clip(0, 4) * scanner.scale).astype(np.int16), (moved > 0.5).astype(np.uint8)


def _head(rng: np.random.Generator, shape: tuple[int, int, int], spacing: Volume) -> tuple[Volume, Volume]:
    """Draw indices into `TISSUES` (shape) and where a lesion may lie: the brain without its fluid (shape, bool)."""
    x, y, z = _millimetres(shape, spacing)
    x, y, z = x - rng.normal(0, 2), y - rng.normal(0, 2), z + 28 - rng.normal(0, 4)
    size = rng.normal(1, 0.03, 3)
    outer = np.sqrt((x / (70 * size[0])) ** 2 + (y / (86 * size[1])) ** 2 + (z / (84 * size[2])) ** 2)
    outer = outer * (1 + 0.015 * _noise(rng, spacing, shape, 25))
    folds, sulci = _noise(rng, spacing, shape, 4), _noise(rng, spacing, shape, 4.5)
    depth = outer / 0.86
    brain = depth < 1
    crack = (np.abs(sulci) < 0.25 * np.clip((depth - 0.78) / 0.2, 0, 1)) | (np.abs(x + sulci) < 1.3)

    index = {name: position for position, name in enumerate(TISSUES)}
    tissue = np.zeros(shape, dtype=np.int64)
    tissue[outer < 1] = index["scalp"]
    tissue[outer < 0.95] = index["skull"]
    tissue[outer < 0.89] = index["csf"]
    tissue[brain] = index["white"]
    tissue[brain & (depth > 0.84 + 0.05 * folds)] = index["grey"]
    tissue[brain & crack & (depth > 0.45)] = index["csf"]
    ventricle = np.full(shape, np.inf)
    for side in (-1, 1):
        nucleus = ((x - side * 22) / 9) ** 2 + ((y - 6) / 18) ** 2 + ((z - 4) / 12) ** 2
        tissue[nucleus * (1 + 0.1 * folds) < 1] = index["nuclei"]
        horn = x - side * (9 + 0.006 * (y - 8) ** 2 * (1 + (y < 8)))
        width = rng.uniform(5, 8.5)
        ventricle = np.minimum(ventricle, (horn / width) ** 2 + ((y + 2) / 34) ** 2 + ((z - 16) / 13) ** 2)
    ventricle = ventricle * (1 + 0.12 * folds)
    rim = (ventricle < 1.7) & (np.abs(y + 2) > 14 + 4 * sulci)
    tissue[brain & rim] = index["rim"]
    tissue[brain & (ventricle < 1)] = index["csf"]
    _distract(rng, spacing, tissue, brain & (ventricle > 1), index)
    sinus = (np.abs(x) < 3.5) & (depth > 0.98) & (depth < 1.06) & (np.abs(y) > 40)
    tissue[sinus] = index["vessel"]
    return tissue, (depth < 0.97) & (tissue != index["csf"])


def _distract(
    rng: np.random.Generator, spacing: Volume, tissue: Volume, inside: Volume, index: Mapping[str, int]
) -> None:
    """Add what looks like a lesion and is none: vessels, where two noise fields are zero together, and round spots."""
    first, second = _noise(rng, spacing, tissue.shape, 11), _noise(rng, spacing, tissue.shape, 11)
    tissue[inside & (np.hypot(first, second) < 0.14)] = index["vessel"]
    grid = _millimetres(tissue.shape, spacing)
    places = np.argwhere(inside)
    for _ in range(int(rng.integers(3, 7))):
        centre = places[rng.integers(len(places))]
        distance = sum((axis - axis[tuple(centre)]) ** 2 for axis in grid)
        tissue[inside & (distance < rng.uniform(3, 5) ** 2)] = index["rim"]


def _lesions(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: Volume,
    brain: Volume,
    radius: tuple[float, float],
) -> tuple[Volume, Volume]:
    """One to three irregular lesions that lie close together: how far each voxel is lesion (0 to 1), and the label."""
    x, y, z = _millimetres(shape, spacing)
    soft, label = np.zeros(shape), np.zeros(shape, dtype=bool)
    # not in the lowest or highest quarter, so that empty slices remain below and above
    inner = brain & (np.abs(z) < FIELD_OF_VIEW[2] / 4)
    places = np.argwhere(inner if inner.any() else brain)
    centre = places[rng.integers(len(places))]
    size = rng.uniform(*radius)
    for number in range(int(rng.integers(1, 4))):
        if number:
            near = places[(np.abs((places - centre) * spacing) < (40, 40, 8)).all(axis=1)]
            centre, size = near[rng.integers(len(near))], rng.uniform(0.5, 0.8) * size
        angle, stretch = rng.uniform(0, np.pi), rng.uniform(0.75, 1.3)
        right, front, up = (axis - axis[tuple(centre)] for axis in (x, y, z))
        along = np.cos(angle) * right + np.sin(angle) * front
        across = np.cos(angle) * front - np.sin(angle) * right
        distance = np.sqrt((along / stretch) ** 2 + (across * stretch) ** 2 + (up / 0.8) ** 2) / size
        distance = distance * (1 + 0.25 * _noise(rng, spacing, shape, 0.5 * size)).clip(0.5, 2)
        soft = np.maximum(soft, rng.uniform(0.65, 1.0) / (1 + np.exp(((distance - 1) / 0.06).clip(-50, 50))))
        label |= distance < 1
    return soft * brain, label & brain


def _drawn_scanner(rng: np.random.Generator) -> Scanner:
    """A scanner between FLAIR and T2, or a little towards T1, never as far as the last site."""
    other, share = (T2, rng.uniform(0, 0.7)) if rng.random() < 0.7 else (T1, rng.uniform(0, 0.3))
    low = rng.uniform(7, 10)
    return Scanner(
        tissue=_blend(FLAIR, other, share),
        gamma=float(rng.uniform(0.7, 1.6)),
        bias=float(rng.uniform(0.1, 0.4)),
        noise=float(rng.uniform(0.02, 0.05)),
        blur=float(rng.uniform(0.4, 1.0)),
        gibbs=float(rng.uniform(0.05, 0.35)),
        zoom=float(rng.uniform(0.9, 1.1)),
        radius=(float(low), float(low + rng.uniform(7, 12))),
        scale=float(rng.integers(300, 3000)),
    )


def _blend(first: Mapping[str, float], second: Mapping[str, float], share: float) -> dict[str, float]:
    return {name: (1 - share) * first[name] + share * second[name] for name in first}


def _millimetres(shape: tuple[int, ...], spacing: Volume) -> tuple[Volume, ...]:
    """Coordinates of every voxel from the centre of the volume: three arrays (shape), right, anterior, superior."""
    axes = [(np.arange(side) - (side - 1) / 2) * step for side, step in zip(shape, spacing, strict=True)]
    return tuple(np.meshgrid(*axes, indexing="ij"))


def _noise(rng: np.random.Generator, spacing: Volume, shape: tuple[int, ...], sigma: float) -> Volume:
    """Gaussian noise (shape) smoothed by `sigma` millimetres, with mean 0 and standard deviation 1."""
    from scipy.fft import irfftn, rfftn
    from scipy.ndimage import fourier_gaussian

    spectrum = fourier_gaussian(rfftn(rng.standard_normal(shape)), sigma / spacing, n=shape[-1])
    smooth = irfftn(spectrum, shape)
    return (smooth - smooth.mean()) / smooth.std()
