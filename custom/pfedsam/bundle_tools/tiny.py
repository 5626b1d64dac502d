"""A site folder of tiny images, to see whether a bundle runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pfedsam.data.splitting import write_datalist

CASES = 6


def tiny_site(out: Path, classes: int, rgb: bool, cases: int = CASES, seed: int = 0) -> Path:
    """Write a site folder of tiny images, and its split: bright balls inside each other, class n the n-th from outside.

    Args:
        out: the site folder.
        classes: number of label values beside 0.
        rgb: colour pictures (PNG); else volumes (NIfTI).
        cases: number of images, at least 3.
        seed: same seed, same images.
    """
    import nibabel
    from PIL import Image

    random = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    shape = (48, 40) if rgb else (48, 40, 6)
    for case in range(cases):
        centre = [size * random.uniform(0.4, 0.6) for size in shape]
        grids = np.meshgrid(
            *[(np.arange(n) - c) / (0.35 * n) for n, c in zip(shape, centre, strict=True)], indexing="ij"
        )
        distance = np.sqrt(sum(grid**2 for grid in grids))
        label = sum((distance < 1 - n / (classes + 1)).astype(np.uint8) for n in range(classes))
        values = 40 + 60 * label + random.normal(0, 6, shape)
        name = f"tiny{case}"
        if rgb:
            colour = np.stack([values, 0.7 * values, 0.4 * values], axis=-1).clip(0, 255).astype(np.uint8)
            Image.fromarray(np.swapaxes(colour, 0, 1)).save(out / "images" / f"{name}.png")
            Image.fromarray(np.swapaxes(label, 0, 1)).save(out / "labels" / f"{name}.png")
        else:
            affine = np.diag([4.0, 4.0, 5.0, 1.0])
            nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), out / "images" / f"{name}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(label, affine), out / "labels" / f"{name}.nii.gz")
    write_datalist(out)
    return out
