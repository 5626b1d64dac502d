"""Where a corrected mask goes: it becomes the label of its case in the site folder, and never replaces a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pfedsam.data.picture import Picture
from pfedsam.data.site_folder import files_by_name
from pfedsam.data.suffixes import case_name
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.inference.writers import write_label

IMAGES, LABELS, CORRECTIONS = "images", "labels", "corrections"
#: So many corrections of a case are kept.
_MOST = 1000


def site_folder_of(image: Path) -> Path | None:
    """The site folder that an image lies in as a case, `<site>/images/<case>`; None if it lies in none."""
    image = Path(os.path.abspath(image))
    return image.parent.parent if image.parent.name == IMAGES and case_name(image) else None


def save_correction(label: NDArray[np.uint8], image: Picture) -> Path:
    """Write a mask as the label of its image, readable by its owner alone.

    Args:
        label: `(x, y, z)` in the grid of the image's file.
        image: in a site folder.

    Returns:
        `<site>/labels/<case>`; where the case has a label, `<site>/corrections/<case>`, with a number for each further
        one. In the format of the image: NIfTI, of a picture PNG.

    Raises:
        PFedSAMError: E02 if the image is in no site folder, E24 if the case has too many corrections.
        OSError: if it cannot be written; nothing is left of it then.
    """
    site, name = site_folder_of(image.source), case_name(image.source)
    if site is None or name is None:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, *no_site_folder(image.source))
    taken = name in files_by_name(site / LABELS, LABELS)
    folder = site / (CORRECTIONS if taken else LABELS)
    folder.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".viewer.") as scratch:
        made = write_label(label, image, Path(scratch) / "label")
        made.chmod(0o600)
        ending = made.name.removeprefix("label")
        for number in range(1, _MOST):
            target = folder / (f"{name}{ending}" if number == 1 else f"{name}-{number}{ending}")
            if _placed(made, target):
                return target
            if not taken:
                # somebody has made the label meanwhile
                break
    message = f"{target} is there already, so the correction was not written."
    raise PFedSAMError(ErrorCode.NOT_OURS, message, "Move it away, then save again.")


def no_site_folder(image: Path) -> tuple[str, str]:
    """Why a correction of an image cannot be saved, and what to do."""
    return (
        f"'{image}' is not in a site folder, so a correction has no place.",
        "Put it into <site>/images, and open it from there.",
    )


def _placed(made: Path, target: Path) -> bool:
    """Put a whole file in its place unless there is one; whether it was put there."""
    try:
        os.link(made, target)
    except FileExistsError:
        return False
    # file systems without hard links
    except OSError:
        return _copied(made, target)
    return True


def _copied(made: Path, target: Path) -> bool:
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file, made.open("rb") as source:
            shutil.copyfileobj(source, file)
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return True
