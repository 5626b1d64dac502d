"""The file of the global model: shared tensors and the base fingerprint, as safetensors.

The format holds arrays and strings only: reading it never runs code, whoever wrote the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_safetensors, write_atomically
from pfedsam.parameters import Manifest, check_state

#: Metadata keys of the file.
FINGERPRINT = "pfedsam_fingerprint"
SCHEMA = "pfedsam_schema"
ROUND = "pfedsam_round"
ABOUT = "pfedsam_about"
SCHEMA_VERSION = "1"

_HEX = re.compile(r"[0-9a-f]{64}")
_REMEDY = "Write it with `pfedsam init-global`, or take a global_model.safetensors of an earlier run."


def write_global_model(
    path: str | Path,
    state: Mapping[str, Any],
    fingerprint: str,
    expected: Manifest,
    round_number: int = -1,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the shared tensors of a global model, atomically.

    Args:
        path: file to write; its folder must exist. An old file stays whole until the new one is complete.
        state: tensors or numpy arrays by name.
        fingerprint: SHA-256 of the base weights that the tensors belong to, 64 hexadecimal digits.
        expected: names, shapes and dtypes that the state must have.
        round_number: the last round that was aggregated into it, -1 for theta_0.
        about: `bundle` and `overrides` of the network; plain JSON values.

    Raises:
        PFedSAMError: E10 for a malformed fingerprint, E12 if the state does not fit or is not finite.
    """
    if not _HEX.fullmatch(fingerprint):
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, "the base fingerprint of a global model must be 64 hexadecimal digits."
        )
    check_state(state, expected, code=ErrorCode.SHARED_TENSORS, what=f"global model for {Path(path).name}")
    tensors = {name: torch.as_tensor(value).contiguous() for name, value in state.items()}
    metadata = {FINGERPRINT: fingerprint, SCHEMA: SCHEMA_VERSION, ROUND: str(round_number), "format": "pt"}
    metadata[ABOUT] = json.dumps(dict(about or {}))
    write_atomically(path, save(tensors, metadata=metadata))


def read_global_model(path: str | Path, expected: Manifest) -> tuple[dict[str, Tensor], str]:
    """Read the shared tensors of a global model.

    Args:
        path: file written by `write_global_model`.
        expected: names, shapes and dtypes that the state must have.

    Returns:
        The tensors by name, on the CPU, and the base fingerprint.

    Raises:
        PFedSAMError: E10 if the file is missing, unreadable or of another schema, E12 if its tensors do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise PFedSAMError(ErrorCode.WRONG_CHECKPOINT, f"there is no global model {path}.", _REMEDY)
    try:
        state, metadata = read_safetensors(path)
    except ValueError as error:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"global model {path} could not be read ({error}).", _REMEDY
        ) from None
    fingerprint = metadata.get(FINGERPRINT, "")
    if metadata.get(SCHEMA) != SCHEMA_VERSION or not _HEX.fullmatch(fingerprint):
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"global model {path} has no schema {SCHEMA_VERSION} or no fingerprint.",
            _REMEDY,
        )
    check_state(state, expected, code=ErrorCode.SHARED_TENSORS, what=f"global model {path}")
    return state, fingerprint


def round_of(path: str | Path) -> int:
    """The last round that was aggregated into a global model, -1 for theta_0.

    Raises:
        PFedSAMError: E10 if the file cannot be read.
    """
    try:
        return int(read_safetensors(path)[1].get(ROUND, -1))
    except ValueError as error:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"global model {path} could not be read ({error}).", _REMEDY
        ) from None


def about_of(path: str | Path) -> dict[str, Any]:
    """Bundle and overrides of the network of a global model, as far as its file tells them.

    Raises:
        PFedSAMError: E10 if the file cannot be read.
    """
    try:
        about = json.loads(read_safetensors(path)[1].get(ABOUT, "{}"))
    except ValueError as error:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"global model {path} could not be read ({error}).", _REMEDY
        ) from None
    return about if isinstance(about, dict) else {}
