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

Capitals in the names of files do not matter. Fundus masks show black in the cup, grey in the disc and white outside,
and become 2, 1 and 0. Prostate masks become 0 and 1 (some sites number the zones). None of the fundus and prostate
layouts has been tried on the original download.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pfedsam.data.geometry import turned_onto
from pfedsam.data.labels import black_and_white, found_values, whole_numbers
from pfedsam.data.picture import Picture
from pfedsam.data.reader import load_picture
from pfedsam.data.sections import FOLDS
from pfedsam.data.site_folder import files_by_name
from pfedsam.data.splitting import write_datalist
from pfedsam.data.suffixes import DICOM, case_name, suffix_of, visible
from pfedsam.errors import ErrorCode, PFedSAMError, few

_MASK_FOLDERS = ("labels", "masks")
_MASK_ENDINGS = ("", "_mask")
#: Grey values of fundus masks: below the first the cup, below the second the disc.
_CUP, _DISC, WHITE = 64, 192, 255


@dataclass(frozen=True)
class Pair:
    """An image that was found, its mask (None if it has none), and where they go."""

    site: str
    case: str
    image: Path
    mask: Path | None


def prepare(kind: str, source: Path, out: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Write site folders, each with a `datalist.json` of 3 folds (`pfedsam.data.splitting`), one image a patient.

    A site of fewer than 3 images gets no split. Where several images are of one patient, replace the split: a
    `datalist.json` with `patients` alone, then `pfedsam split`.

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
            images of one name, E28 for an unknown kind, E24 for a site that exists.
    """
    if kind not in KINDS:
        raise PFedSAMError(ErrorCode.UNKNOWN_NAME, f"there is no kind '{kind}'.", f"Kinds: {sorted(KINDS)}.")
    pairs = [pair for find in KINDS[kind].finders for pair in find(source)]
    if not pairs:
        raise PFedSAMError(
            ErrorCode.SITE_FOLDER, f"{source} has none of the layouts of '{kind}'.", "See `pfedsam prepare --help`."
        )
    _check(pairs, out)
    out.mkdir(parents=True, exist_ok=True)
    # all or nothing: sites appear when all of them are complete
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=out) as unfinished:
        for number, pair in enumerate(pairs, 1):
            _write(pair, Path(unfinished), KINDS[kind])
            if progress:
                progress(number, len(pairs))
        counts = Counter(pair.site for pair in pairs)
        for site, cases in counts.items():
            if cases >= FOLDS:
                write_datalist(Path(unfinished) / site)
        for site in counts:
            (Path(unfinished) / site).rename(out / site)
    return dict(counts)


def _check(pairs: list[Pair], out: Path) -> None:
    """Everything that can be wrong with names, before anything is written."""
    seen: dict[tuple[str, str], Path] = {}
    for pair in pairs:
        if pair.mask is None:
            raise PFedSAMError(ErrorCode.MISSING_LABEL, f"{pair.image} has no mask.", "Add it, or take the image away.")
        other = seen.setdefault((pair.site, pair.case), pair.image)
        if other != pair.image:
            raise PFedSAMError(
                ErrorCode.SITE_DATA, f"{pair.image} and {other} would both be '{pair.case}'.", "Rename one."
            )
    for site in sorted({pair.site for pair in pairs}):
        if (out / site).exists():
            raise PFedSAMError(ErrorCode.NOT_OURS, f"{out / site} exists.", "Choose another --out, or remove it.")


def _write(pair: Pair, out: Path, kind: Kind) -> None:
    assert pair.mask is not None
    images, labels = out / pair.site / "images", out / pair.site / "labels"
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    image = load_picture(pair.image)
    mask = turned_onto(image, load_picture(pair.mask, label=kind.numbers))
    if image.volume_shape != mask.volume_shape:
        raise PFedSAMError(
            ErrorCode.SHAPES_DIFFER,
            f"{pair.image} has size {image.shape}, its mask {pair.mask} {mask.shape}.",
            "Resample the mask.",
        )
    values = whole_numbers(kind.convert(mask), str(pair.mask))
    if pair.image.is_dir():
        shutil.copytree(pair.image, images / pair.case)
    else:
        shutil.copy(pair.image, images / f"{pair.case}{suffix_of(pair.image) or DICOM[0]}")
    if image.kind == "picture":
        _write_picture(values, labels / f"{pair.case}.png", pair.mask)
    else:
        place = next((one.affine for one in (mask, image) if one.affine is not None), np.eye(4))
        nibabel.save(nibabel.Nifti1Image(values.reshape(mask.volume_shape), place), labels / f"{pair.case}.nii.gz")


def _write_picture(values: NDArray[Any], path: Path, source: Path) -> None:
    kind = next((one for one in (np.uint8, np.uint16) if values.min() >= 0 and values.max() <= np.iinfo(one).max), None)
    if kind is None:
        wrong = few(str(value) for value in found_values(values) if not 0 <= value <= np.iinfo(np.uint16).max)
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE, f"mask {source} holds {wrong}, which no PNG holds.", "Correct the mask."
        )
    Image.fromarray(np.ascontiguousarray(values.reshape(values.shape[:2]).T.astype(kind))).save(path)


def _of_images(source: Path) -> Iterator[Pair]:
    for folder in sorted(source.glob("*/images")):
        masks = [files_by_name(folder.parent / name, "masks") for name in _MASK_FOLDERS]
        unknown = [path.name for path in visible(folder) if case_name(path) is None]
        if unknown:
            raise PFedSAMError(
                ErrorCode.SITE_DATA,
                f"{folder} holds {few(unknown)}, no image of a known format.",
                "Convert it, or take it away.",
            )
        for image in visible(folder):
            name = case_name(image)
            tried = (found.get(f"{name}{ending}") for found in masks for ending in _MASK_ENDINGS)
            yield Pair(folder.parent.name, str(name), image, next((path for path in tried if path), None))


def _of_dofe(source: Path) -> Iterator[Pair]:
    for folder in sorted(source.glob("*/*/ROIs/image")):
        section = folder.parents[1]
        masks = _named(section / "ROIs" / "mask", ".png")
        for name, image in _named(folder, ".png").items():
            yield Pair(section.parent.name, f"{section.name}_{image.stem}", image, masks.get(name))


def _of_refuge(source: Path) -> Iterator[Pair]:
    masks = source / "Annotation-Training400" / "Disc_Cup_Masks"
    for folder in sorted(path for path in (source / "Training400").glob("*") if path.is_dir()):
        bitmaps = _named(masks / folder.name, ".bmp")
        for name, image in _named(folder, ".jpg").items():
            yield Pair("refuge", image.stem, image, bitmaps.get(name))


def _of_prostate(source: Path) -> Iterator[Pair]:
    ending = "_segmentation"
    for folder in (path for path in visible(source) if path.is_dir()):
        files = _named(folder, ".nii.gz")
        if not any(name.endswith(ending) for name in files):
            continue
        for name, image in files.items():
            if not name.endswith(ending):
                yield Pair(folder.name, image.name[: -len(".nii.gz")], image, files.get(name + ending))


def _named(folder: Path, suffix: str) -> dict[str, Path]:
    """Files of one suffix by their name without it, both in lower case.

    Raises:
        PFedSAMError: E09 if two names differ in capitals alone.
    """
    found: dict[str, Path] = {}
    for path in visible(folder):
        if path.is_file() and path.name.lower().endswith(suffix):
            other = found.setdefault(path.name[: -len(suffix)].lower(), path)
            if other != path:
                raise PFedSAMError(
                    ErrorCode.SITE_DATA, f"{other} and {path.name} differ in capitals alone.", "Rename one."
                )
    return found


def _black_and_white(mask: Picture) -> NDArray[Any]:
    white = black_and_white(found_values(mask.values), ())
    return mask.values if white is None else mask.values // white


def _cup_in_disc(mask: Picture) -> NDArray[Any]:
    """What is seen, not what is stored: a palette or 16 bits may stand behind black, grey and white."""
    grey = mask.grey() * (WHITE / mask.white) if mask.white else mask.grey()
    if mask.kind != "picture" or grey.max() < _DISC:
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE,
            f"mask {mask.source} shows nothing white (values up to {grey.max():g}), expected black in the cup, grey in "
            "the disc and white outside.",
            "Take the mask of the original download.",
        )
    return np.where(grey < _CUP, 2, np.where(grey < _DISC, 1, 0))


def _any_zone(mask: Picture) -> NDArray[Any]:
    if mask.values.min() < 0:
        raise PFedSAMError(
            ErrorCode.LABEL_OUT_OF_RANGE,
            f"mask {mask.source} holds {mask.values.min()}, which is no zone.",
            "Correct it.",
        )
    return mask.values > 0


@dataclass(frozen=True)
class Kind:
    """How pairs of a kind of download are found, and what its masks become.

    Attributes:
        finders: of the pairs, one for each layout.
        convert: of a mask that was read.
        numbers: whether a mask holds class numbers; else it is a picture.
    """

    finders: tuple[Callable[[Path], Iterator[Pair]], ...]
    convert: Callable[[Picture], NDArray[Any]]
    numbers: bool = True


KINDS: dict[str, Kind] = {
    "images": Kind((_of_images,), _black_and_white),
    "fundus": Kind((_of_dofe, _of_refuge), _cup_in_disc, numbers=False),
    "prostate": Kind((_of_prostate,), _any_zone),
}
