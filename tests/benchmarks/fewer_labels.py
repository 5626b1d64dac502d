"""Sites that have few labels, or weak ones, made of site folders with whole labels.

    python tests/benchmarks/fewer_labels.py <sites> <out> --patients 2            # the others have none
    python tests/benchmarks/fewer_labels.py <sites> <out> --patients 2 --drop     # the others are not there
    python tests/benchmarks/fewer_labels.py <sites> <out> --scribbles 0.05

Images are links. Of the split one fold is written as sections; labels of validation and test stay whole. Which
patients keep their labels, and where a scribble runs, follows from names and --seed. A scribble is a stroke of 3 pixels
through a class, and strokes are added until the share of the class's pixels is reached; all else is open (value 254).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pfedsam.data.site_folder import Case, site_names
from pfedsam.data.sites import SECTIONS, read_split
from pfedsam.data.suffixes import NIFTI

Plane = NDArray[np.uint8]
OPEN = 254
#: Steps of a stroke, and its pixels to each side.
STEPS, WIDTH = 40, 1


def seed_of(name: str, seed: int) -> np.random.Generator:
    """Draws that follow from a name."""
    return np.random.default_rng([seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")])


def scribbled(label: Plane, share: float, random: np.random.Generator) -> Plane:
    """A plane `(X, Y)` of class numbers of which only strokes are known."""
    known = np.zeros(label.shape, dtype=bool)
    for value in np.unique(label):
        inside = label == value
        # strokes are drawn in the middle of things, not along their edges
        core = ndimage.binary_erosion(inside, iterations=WIDTH + 1)
        core = core if core.any() else inside
        wanted, drawn = share * inside.sum(), np.zeros_like(known)
        while drawn.sum() < wanted:
            drawn |= _stroke(core, random) & inside
        known |= drawn
    return np.where(known, label, OPEN).astype(np.uint8)


def _stroke(core: NDArray[np.bool_], random: np.random.Generator) -> NDArray[np.bool_]:
    """A walk through a region that keeps its direction for a while, 3 pixels wide."""
    line = np.zeros_like(core)
    places = np.argwhere(core)
    place, angle = places[random.integers(len(places))].astype(float), random.uniform(0, 2 * np.pi)
    for _ in range(STEPS):
        line[tuple(place.astype(int))] = True
        angle += random.normal(0, 0.3)
        step = place + np.array([np.cos(angle), np.sin(angle)])
        if (step < 0).any() or (step >= core.shape).any() or not core[tuple(step.astype(int))]:
            break
        place = step
    return ndimage.binary_dilation(line, iterations=WIDTH)


def write_site(site: Path, out: Path, fold: int, options: argparse.Namespace) -> dict[str, int]:
    """Write one site; the number of training patients with and without labels.

    Args:
        site: site folder.
        out: new folder.
        fold: of the split.
        options: of the command.
    """
    for kind in ("images", "labels"):
        (out / kind).mkdir(parents=True)
    split = read_split(site, fold)
    patients = sorted({case.patient for case in split[SECTIONS[0]]})
    kept = set(patients)
    if options.patients:
        kept = set(seed_of(site.name, options.seed).permutation(patients)[: options.patients].tolist())
    sections: dict[str, Any] = {section: [] for section in SECTIONS}
    for section, cases in split.items():
        for case in cases:
            if section == SECTIONS[0] and case.patient not in kept:
                if not options.drop:
                    _link(case.image, out / "images")
                continue
            assert case.label is not None
            sections[section].append(case.name)
            _link(case.image, out / "images")
            if section == SECTIONS[0] and options.scribbles:
                _write(case, out / "labels", options.scribbles, options.seed)
            else:
                _link(case.label, out / "labels")
    sections["patients"] = {case.name: case.patient for cases in split.values() for case in cases}
    if options.scribbles:
        sections["unknown"] = OPEN
    (out / "datalist.json").write_text(json.dumps(sections, indent=1) + "\n")
    return {"with labels": len(kept), "without": len(patients) - len(kept)}


def _link(path: Path, folder: Path) -> None:
    (folder / path.name).symlink_to(path.resolve())


def _write(case: Case, folder: Path, share: float, seed: int) -> None:
    """A label of strokes; a mask of black and white becomes 0 and 1."""
    assert case.label is not None
    random, path = seed_of(case.name, seed), case.label
    if path.name.endswith(tuple(NIFTI)):
        volume: Any = nibabel.load(path)
        before = np.asarray(volume.dataobj).astype(np.uint8)
        planes = [scribbled(plane, share, random) for plane in np.moveaxis(before, -1, 0)]
        nibabel.save(nibabel.Nifti1Image(np.stack(planes, axis=-1), volume.affine), folder / path.name)
        return
    before = np.asarray(Image.open(path)).T
    before = before // 255 if set(np.unique(before).tolist()) <= {0, 255} else before
    after = scribbled(before.astype(np.uint8), share, random)
    Image.fromarray(np.ascontiguousarray(after.T)).save(folder / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--patients", type=int, default=0, help="Training patients of each site that keep labels.")
    parser.add_argument("--drop", action="store_true", help="Leave the others out.")
    parser.add_argument("--scribbles", type=float, default=0.0, help="Share of each class's pixels that is known.")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for site in site_names(options.data):
        counts = write_site(options.data / site, options.out / site, options.fold, options)
        print(f"{site}: training patients " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
