"""Data as they are downloaded, laid out as site folders. Only these layouts are recognised, the rest is refused.

`images`
    `<site>/images/<case>` with `<site>/masks/<case>[_mask]` or `<site>/labels/<case>[_mask]`, each in a format of
    `pfedsam.data.suffixes` or a folder of DICOM slices
`fundus`, DoFE: one site a domain
    `<domain>/<train or test>/ROIs/image/<case>.png` with `<domain>/<train or test>/ROIs/mask/<case>.png`
`fundus`, REFUGE: the site `refuge`
    `Training400/<group>/<case>.jpg` with `Annotation-Training400/Disc_Cup_Masks/<group>/<case>.bmp`
`prostate`
    `<site>/<case>.nii.gz` with `<site>/<case>_segmentation.nii.gz` (capitals do not matter)

Masks are read by the one reader, so their values are whole numbers, and a palette's are its indices. They are written
in the smallest type that holds them; what a format cannot hold is refused.

Fundus masks hold 0 in the cup, about 128 in the disc and 255 outside, and become 2, 1 and 0. Prostate masks become 0
and 1 (some sites number the zones). None of the fundus and prostate layouts has been tried on the original download.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pfedsam.data.labels import black_and_white, few, found_values, whole_numbers
from pfedsam.data.pictures import load_picture
from pfedsam.data.sites import files_by_name
from pfedsam.data.suffixes import case_name, suffix_of, visible
from pfedsam.errors import PFedSAMError

_MASK_FOLDERS = ("labels", "masks")
_MASK_ENDINGS = ("", "_mask")
_BITMAP = ".bmp"
#: Grey values of fundus masks: below the first the cup, below the second the disc.
_CUP, _DISC = 64, 192


@dataclass(frozen=True)
class Pair:
    """An image that was found, its mask (None if it has none), and where they go."""

    site: str
    case: str
    image: Path
    mask: Path | None


def prepare(kind: str, source: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Write site folders.

    Args:
        kind: a key of `KINDS`.
        source: folder in one of the layouts of its kind.
        out: folder for the site folders. What is there is not touched: a site that exists is refused.
        progress: called with (done, total) after each case.

    Returns:
        Number of cases by site.

    Raises:
        PFedSAMError: E02 if nothing of a documented layout is found, E03 for an image without a mask, E04 if a mask has
            another size, E05, E07 or E09 for a file that cannot be read or a mask that holds no labels, E09 for two
            images of one name, E16 for an unknown kind or a site that exists.
    """
    if kind not in KINDS:
        raise PFedSAMError("E16", f"there is no kind '{kind}'.", f"Kinds: {sorted(KINDS)}.")
    finders, convert = KINDS[kind]
    pairs = [pair for find in finders for pair in find(source)]
    if not pairs:
        raise PFedSAMError("E02", f"{source} has none of the layouts of '{kind}'.", "See `pfedsam prepare --help`.")
    _check(pairs, out)
    out.mkdir(parents=True, exist_ok=True)
    # all or nothing: sites appear when all of them are complete
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=out) as unfinished:
        for number, pair in enumerate(pairs, 1):
            _write(pair, Path(unfinished), convert)
            if progress:
                progress(number, len(pairs))
        counts = Counter(pair.site for pair in pairs)
        for site in counts:
            (Path(unfinished) / site).rename(out / site)
    return dict(counts)


def _check(pairs: list[Pair], out: Path) -> None:
    """Everything that can be wrong with names, before anything is written."""
    seen: dict[tuple[str, str], Path] = {}
    for pair in pairs:
        if pair.mask is None:
            raise PFedSAMError("E03", f"{pair.image} has no mask.", "Add it, or take the image away.")
        other = seen.setdefault((pair.site, pair.case), pair.image)
        if other != pair.image:
            raise PFedSAMError("E09", f"{pair.image} and {other} would both be '{pair.case}'.", "Rename one.")
    for site in sorted({pair.site for pair in pairs}):
        if (out / site).exists():
            raise PFedSAMError("E16", f"{out / site} exists.", "Choose another --out, or remove it.")


def _write(pair: Pair, out: Path, convert: Callable[[NDArray], NDArray]) -> None:
    assert pair.mask is not None
    images, labels = out / pair.site / "images", out / pair.site / "labels"
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    image, mask = load_picture(pair.image), load_picture(pair.mask, label=True)
    if image.volume_shape != mask.volume_shape:
        raise PFedSAMError(
            "E04", f"{pair.image} has size {image.shape}, its mask {pair.mask} {mask.shape}.", "Resample the mask."
        )
    values = whole_numbers(convert(mask.values), str(pair.mask))
    if pair.image.is_dir():
        shutil.copytree(pair.image, images / pair.case)
    else:
        shutil.copy(pair.image, images / f"{pair.case}{suffix_of(pair.image)}")
    if image.kind == "picture":
        _write_picture(values, labels / f"{pair.case}.png", pair.mask)
    else:
        place = next((one.affine for one in (mask, image) if one.affine is not None), np.eye(4))
        nibabel.save(nibabel.Nifti1Image(values.reshape(mask.volume_shape), place), labels / f"{pair.case}.nii.gz")


def _write_picture(values: NDArray, path: Path, source: Path) -> None:
    kind = next((one for one in (np.uint8, np.uint16) if values.min() >= 0 and values.max() <= np.iinfo(one).max), None)
    if kind is None:
        wrong = few(str(value) for value in found_values(values) if not 0 <= value <= np.iinfo(np.uint16).max)
        raise PFedSAMError("E07", f"mask {source} holds {wrong}, which no PNG holds.", "Correct the mask.")
    Image.fromarray(np.ascontiguousarray(values.reshape(values.shape[:2]).T.astype(kind))).save(path)


def _of_images(source: Path) -> Iterator[Pair]:
    for folder in sorted(source.glob("*/images")):
        masks = [files_by_name(folder.parent / name, "masks") for name in _MASK_FOLDERS]
        for image in visible(folder):
            name = case_name(image)
            if name is None:
                continue
            tried = (found.get(f"{name}{ending}") for found in masks for ending in _MASK_ENDINGS)
            yield Pair(folder.parent.name, name, image, next((path for path in tried if path), None))


def _of_dofe(source: Path) -> Iterator[Pair]:
    for image in sorted(source.glob("*/*/ROIs/image/*.png")):
        section = image.parents[2]
        mask = section / "ROIs" / "mask" / image.name
        yield Pair(section.parent.name, f"{section.name}_{image.stem}", image, mask if mask.is_file() else None)


def _of_refuge(source: Path) -> Iterator[Pair]:
    masks = source / "Annotation-Training400" / "Disc_Cup_Masks"
    for image in sorted((source / "Training400").glob("*/*.jpg")):
        mask = masks / image.parent.name / f"{image.stem}{_BITMAP}"
        yield Pair("refuge", image.stem, image, mask if mask.is_file() else None)


def _of_prostate(source: Path) -> Iterator[Pair]:
    ending = "_segmentation"
    for folder in sorted(path for path in source.iterdir() if path.is_dir()) if source.is_dir() else ():
        files = {path.name[: -len(".nii.gz")].lower(): path for path in folder.glob("*.nii.gz")}
        if not any(name.endswith(ending) for name in files):
            continue
        for name, image in sorted(files.items()):
            if not name.endswith(ending):
                yield Pair(folder.name, image.name[: -len(".nii.gz")], image, files.get(name + ending))


def _black_and_white(mask: NDArray) -> NDArray:
    white = black_and_white(found_values(mask), ())
    return mask if white is None else mask // white


def _cup_in_disc(mask: NDArray) -> NDArray:
    return np.where(mask < _CUP, 2, np.where(mask < _DISC, 1, 0))


def _any_zone(mask: NDArray) -> NDArray:
    return mask > 0


#: How pairs of a kind are found, and what its masks become.
KINDS: dict[str, tuple[tuple[Callable[[Path], Iterator[Pair]], ...], Callable[[NDArray], NDArray]]] = {
    "images": ((_of_images,), _black_and_white),
    "fundus": ((_of_dofe, _of_refuge), _cup_in_disc),
    "prostate": ((_of_prostate,), _any_zone),
}
