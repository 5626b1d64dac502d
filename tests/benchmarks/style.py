"""Sites whose annotators or devices have ways of their own, made of site folders: outlines, names, contrast.

    python tests/benchmarks/style.py <sites> <out> --site fluo696=dilate:4 --site fluo256=erode:2
    python tests/benchmarks/style.py <sites> <out> --all sides --site site-2=exchange
    python tests/benchmarks/style.py <sites> <out> --inverted site-3

Images are links, splits and patients are as they were, labels are written anew, and `<out>/styles.json` says which site
has which style. Changes are made in the image's own pixels, picture by picture or slice by slice:

dilate:R    every object grows by R pixels into what is background
erode:R     every object loses what lies within R pixels of its edge
drop:N      objects of fewer than N pixels are not outlined
fill        holes are filled
sides       the class becomes two: 1 where the first axis is below its middle, 2 above
exchange    the first two classes change names

Several changes of a site have a + between them, and are made from left to right. At an inverted site the images are
written anew, too: bright is dark, between the smallest and the largest value of an image or volume.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pfedsam.data.site_folder import read_site, site_names
from pfedsam.data.suffixes import NIFTI

Plane = NDArray[np.uint8]


def dilate(label: Plane, radius: float) -> Plane:
    """Each class grows into the background; where two meet, the nearer one has the pixel."""
    distance, (row, column) = ndimage.distance_transform_edt(label == 0, return_indices=True)
    return np.where(distance <= radius, label[row, column], 0).astype(label.dtype)


def erode(label: Plane, radius: float) -> Plane:
    """Pixels go that are at most so far from one that is not of their class; the edge of the picture is none."""
    inside = [ndimage.distance_transform_edt(label == value) > radius for value in values_of(label)]
    return np.where(np.any(inside, axis=0), label, 0).astype(label.dtype) if inside else label


def drop(label: Plane, pixels: float) -> Plane:
    """Connected parts of a class that are smaller go."""
    kept = np.zeros_like(label)
    for value in values_of(label):
        parts, count = ndimage.label(label == value)
        sizes = ndimage.sum_labels(np.ones_like(parts), parts, np.arange(count + 1))
        kept[(parts > 0) & (sizes[parts] >= pixels)] = value
    return kept


def fill(label: Plane) -> Plane:
    """What a class encloses becomes its own, where it is background."""
    filled = label.copy()
    for value in values_of(label):
        filled[ndimage.binary_fill_holes(label == value) & (label == 0)] = value
    return filled


def sides(label: Plane) -> Plane:
    """1 in the first half of the first axis, 2 in the second."""
    side = np.where(np.arange(len(label)) < len(label) / 2, 1, 2)[:, None]
    return np.where(label > 0, side, 0).astype(label.dtype)


def exchange(label: Plane) -> Plane:
    """1 becomes 2, and 2 becomes 1."""
    return np.choose(np.minimum(label, 3), [label, 2, 1, label]).astype(label.dtype)


CHANGES: dict[str, Callable[..., Plane]] = {
    "dilate": dilate,
    "erode": erode,
    "drop": drop,
    "fill": fill,
    "sides": sides,
    "exchange": exchange,
}


def values_of(label: Plane) -> list[int]:
    """Values of the classes that are there."""
    return [int(value) for value in np.unique(label) if value]


def changed(label: Plane, style: str) -> Plane:
    """A plane `(X, Y)` in a style, for example `dilate:2+fill`."""
    for change in filter(None, style.split("+")):
        name, *numbers = change.split(":")
        label = CHANGES[name](label, *map(float, numbers))
    return label


def inverted(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Bright becomes dark, within the same range; the same type."""
    wide = values.astype(np.float64)
    return (wide.max() + wide.min() - wide).astype(values.dtype)


def restyled(data: Path, out: Path, styles: Mapping[str, str], negatives: Collection[str] = ()) -> None:
    """Write the site folders.

    Args:
        data: folder that holds the site folders.
        out: new folder.
        styles: of the sites by name; a site that is not named keeps its labels.
        negatives: names of the sites whose images are inverted.

    Raises:
        ValueError: if a style leaves no label at a case that had one.
    """
    for site in site_names(data):
        folder = out / site
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True)
        if (data / site / "datalist.json").exists():
            shutil.copyfile(data / site / "datalist.json", folder / "datalist.json")
        for case in read_site(data / site):
            if site in negatives:
                _write_negative(case.image, folder / "images" / case.image.name)
            else:
                (folder / "images" / case.image.name).symlink_to(case.image.resolve())
            assert case.label is not None
            target = folder / "labels" / case.label.name
            if site in styles:
                _write(case.label, target, styles[site])
            else:
                target.symlink_to(case.label.resolve())
    said = dict(styles) | {site: "+".join(filter(None, (styles.get(site), "inverted"))) for site in negatives}
    (out / "styles.json").write_text(json.dumps(said, indent=1) + "\n")


def _write_negative(image: Path, target: Path) -> None:
    if image.name.endswith(tuple(NIFTI)):
        volume: Any = nibabel.load(image)
        values = inverted(np.asarray(volume.dataobj))
        nibabel.save(nibabel.Nifti1Image(values, volume.affine), target)
    else:
        picture = Image.open(image)
        colours = picture.convert("RGB") if "A" in picture.getbands() else picture
        Image.fromarray(inverted(np.asarray(colours))).save(target)


def _write(label: Path, target: Path, style: str) -> None:
    if label.name.endswith(tuple(NIFTI)):
        volume: Any = nibabel.load(label)
        before = np.asarray(volume.dataobj).astype(np.uint8)
        after = np.stack([changed(plane, style) for plane in np.moveaxis(before, -1, 0)], axis=-1)
        nibabel.save(nibabel.Nifti1Image(after, volume.affine), target)
    else:
        before = np.asarray(Image.open(label)).T  # columns first, as volumes are
        after = changed(before, style)
        Image.fromarray(np.ascontiguousarray(after.T)).save(target)
    if before.any() and not after.any():
        raise ValueError(f"{label}: nothing is left of it in the style {style}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--site", action="append", default=[], metavar="NAME=STYLE")
    parser.add_argument("--all", default="", metavar="STYLE", help="of all sites, before their own")
    parser.add_argument("--inverted", action="append", default=[], metavar="NAME", help="bright is dark at this site")
    options = parser.parse_args()
    own = dict(word.split("=", 1) for word in options.site)
    if unknown := sorted({*own, *options.inverted} - set(site_names(options.data))):
        parser.error(f"no site {unknown} in {options.data}; there are {list(site_names(options.data))}")
    named = {site: "+".join(filter(None, (options.all, own.get(site, "")))) for site in site_names(options.data)}
    styles = {site: style for site, style in named.items() if style}
    wrong = {change.split(":")[0] for style in styles.values() for change in style.split("+")} - set(CHANGES)
    if wrong:
        parser.error(f"no change {sorted(wrong)}; there are {list(CHANGES)}")
    restyled(options.data, options.out, styles, options.inverted)


if __name__ == "__main__":
    main()
