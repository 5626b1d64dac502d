"""A phantom federation: site folders of drawn head phantoms (`pfedsam.data.phantom_heads`), each with its own scanner.

It is what a fresh machine trains on. Everything follows from the seed; a file that is there is not written again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from pfedsam.data.datalist_file import DATALIST
from pfedsam.data.phantom_heads import VERSION, Volume, draw_case, scanners
from pfedsam.data.sections import FOLDS
from pfedsam.data.site_folder import Case
from pfedsam.data.splitting import BEFORE, as_bytes, dealt_folds, write_datalist
from pfedsam.data.suffixes import NIFTI
from pfedsam.errors import ErrorCode, PFedSAMError

MARKER = "phantom.json"


def write_phantom(
    out: str | Path,
    sites: int = 4,
    cases: int = 12,
    shape: tuple[int, int, int] = (96, 96, 20),
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write site folders `<out>/site-1` ... of NIfTI images (int16) and labels (uint8, 1 = lesion).

    The marker `<out>/phantom.json` records the settings: with the same settings no file that is there is written again,
    and a phantom that was interrupted, or has lost a site folder, is completed. One case is one patient. A site of 3
    cases or more gets a `datalist.json` of 3 folds (`pfedsam.data.splitting`), because sites are small; one that is
    there is left alone, or, where a phantom with other settings is replaced, kept as `datalist.json.before`.

    Args:
        out: folder; made if it is missing.
        sites: number of sites, at least 1.
        cases: cases of each site, at least 1.
        shape: voxels along right, anterior and superior, at least (16, 16, 4).
        seed: decides every image.
        progress: called with (cases done, cases in all) after each case.
        force: replace a phantom with other settings; with the same settings it changes nothing.

    Returns:
        The site folders.

    Raises:
        PFedSAMError: E02 if `out` holds something that is not a phantom; E16 if a number is too small; E24 if it
            holds a phantom with other settings.
    """
    out = Path(out)
    shape = (int(shape[0]), int(shape[1]), int(shape[2]))
    if sites < 1 or cases < 1 or seed < 0 or any(side < least for side, least in zip(shape, (16, 16, 4), strict=True)):
        raise PFedSAMError(
            ErrorCode.WRONG_SETTING,
            f"a phantom of {sites} sites, {cases} cases, shape {shape} and seed {seed} cannot be drawn.",
            "Use at least 1 site, 1 case, shape (16, 16, 4) and seed 0.",
        )
    settings = {"version": VERSION, "seed": seed, "sites": sites, "cases": cases, "shape": list(shape)}
    folders = [out / f"site-{site + 1}" for site in range(sites)]
    marker = _read_marker(out)
    machines = scanners(sites, seed)
    # through JSON, so that it equals what is read back
    content = json.loads(json.dumps({"settings": settings, "scanners": [asdict(scanner) for scanner in machines]}))
    if marker == content | {"complete": True} and all(folder.is_dir() for folder in folders):
        _split(folders, cases)
        return folders
    if marker and marker["settings"] != content["settings"]:
        if not force:
            raise PFedSAMError(
                ErrorCode.NOT_OURS,
                f"{out} holds a phantom with other settings: {_differences(marker['settings'], content['settings'])}.",
                "Choose another folder, or give --force to replace it.",
            )
        _write_marker(out, marker | {"complete": False})
        _remove_old(out, marker, sites)
    out.mkdir(parents=True, exist_ok=True)
    _write_marker(out, content | {"complete": False})
    for site, (folder, scanner) in enumerate(zip(folders, machines, strict=True)):
        for case in range(cases):
            name = _case_file(site + 1, case + 1)
            paths = (folder / "images" / name, folder / "labels" / name)
            if not all(_is_there(path) for path in paths):
                *volumes, affine = draw_case(scanner, shape, np.random.SeedSequence([seed, 0, site, case]))
                for path, volume in zip(paths, volumes, strict=True):
                    _save(path, volume, affine)
            if progress:
                progress(site * cases + case + 1, sites * cases)
    _split(folders, cases)
    _write_marker(out, content | {"complete": True})
    return folders


def _split(folders: Sequence[Path], cases: int) -> None:
    """Write the split of each site that has none and is large enough for one."""
    for folder in folders:
        if cases >= FOLDS and not (folder / DATALIST).exists():
            write_datalist(folder)


def _take_split_away(out: Path, site: int, cases: int) -> None:
    """Remove the split of a site of an earlier phantom if it is as it was written; else keep it under another name."""
    path = out / f"site-{site}" / DATALIST
    if not _is_there(path):
        return
    if cases >= FOLDS and path.is_file() and path.read_bytes() == _split_of(site, cases):
        path.unlink()
    else:
        path.rename(_free(path.with_name(BEFORE)))


def _split_of(site: int, cases: int) -> bytes:
    """The split of a site as a phantom has written it."""
    names = [_case_file(site, case).removesuffix(NIFTI[0]) for case in range(1, cases + 1)]
    return as_bytes({"folds": dealt_folds([Case(name, Path(name), None, name) for name in sorted(names)])})


def _free(path: Path) -> Path:
    """The path, or with the first number behind it that makes it free."""
    paths = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(2)))
    return next(one for one in paths if not _is_there(one))


def _is_there(path: Path) -> bool:
    """Whether there is something, also a link to a disk that is not there now."""
    return path.is_symlink() or path.exists()


def _case_file(site: int, case: int) -> str:
    return f"s{site}-case-{case:02d}.nii.gz"


def _save(path: Path, volume: Volume, affine: Volume) -> None:
    """Write a volume, unless there is something at its path."""
    import nibabel

    if _is_there(path):
        return

    path.parent.mkdir(parents=True, exist_ok=True)
    nifti = nibabel.Nifti1Image(volume, affine)
    nifti.header.set_xyzt_units("mm")
    nibabel.save(nifti, _half(path))
    _half(path).replace(path)


def _half(path: Path) -> Path:
    """Where a file is written until it is whole: beside it, hidden; the next run takes the place of what is left."""
    return path.with_name(f".{path.name}")


def _read_marker(out: Path) -> dict[str, Any]:
    """The marker's content, {} for a new or empty folder; E02 if the folder holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
        int(marker["settings"]["sites"]), int(marker["settings"]["cases"])
        return marker
    except (OSError, ValueError, KeyError, TypeError):
        raise PFedSAMError(
            ErrorCode.SITE_FOLDER,
            f"'{out}' is not empty and holds no phantom ({MARKER}).",
            "Give a new or empty folder.",
        ) from None


def _write_marker(out: Path, content: Mapping[str, Any]) -> None:
    temporary = out / f".{MARKER}"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / MARKER)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {old.get(key)}, not {value}" for key, value in new.items() if old.get(key) != value)


def _remove_old(out: Path, marker: Mapping[str, Any], new_sites: int) -> None:
    """Remove what an earlier phantom wrote and nothing else, and make room for the splits of the new sites."""
    settings = marker["settings"]
    for site in range(1, max(settings["sites"], new_sites) + 1):
        _take_split_away(out, site, settings["cases"])
    for site in range(1, settings["sites"] + 1):
        for kind in ("images", "labels"):
            for case in range(1, settings["cases"] + 1):
                path = out / f"site-{site}" / kind / _case_file(site, case)
                path.unlink(missing_ok=True)
                _half(path).unlink(missing_ok=True)
        for folder in (out / f"site-{site}" / "images", out / f"site-{site}" / "labels", out / f"site-{site}"):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
