"""The safe way of a checkpoint into a network: nothing in it is executed, and every tensor must fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pfedsam.errors import ErrorCode, PFedSAMError, few
from pfedsam.networks.vit import resize_positions
from pfedsam.networks.weights import check_file
from pfedsam.parameters import ADDED, group_of

#: Keys under which training scripts keep a state dict.
WRAPPERS = ("model", "state_dict", "model_state_dict")
#: What wrappers of a network put before all names of its tensors.
PREFIXES = ("module.", "sam.", "model.")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: Mask tokens of every published SAM checkpoint: one for a single mask and three for ambiguous prompts.
SAM_TOKENS = 4


def read_checkpoint(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    """Read a checkpoint without executing anything in it.

    Args:
        path: a `.pth` file with a state dict, or with one under a key of `WRAPPERS`; a prefix of `PREFIXES` that all
            names have is taken away.
        checksum: expected, as `sha256:<hex>`; None if the file is the user's own.

    Raises:
        PFedSAMError: E10 if the file is missing, has another checksum, is no checkpoint, holds code or several models.
    """
    if not path.is_file():
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"there is no checkpoint at {path}.", "Give the path of a SAM checkpoint."
        )
    if checksum is not None:
        check_file(path, checksum)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise anything
        # torch's advice to load what is not safe, in colours, is left out
        reason = _COLOUR.sub("", str(error).split(". ")[0].split("\n")[0]) or type(error).__name__
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT, f"{path} is not a safe checkpoint: {reason}", "Fetch the file again."
        ) from None
    state = _unwrapped(path, state)
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        wrong = [str(n) for n, value in state.items() if not isinstance(n, str) or not isinstance(value, Tensor)]
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"{path} holds no state dict of tensors: {few(map(repr, wrong), 3)} is none.",
            f"Give a SAM checkpoint: tensors by name, or the same under one of {list(WRAPPERS)}.",
        )
    return _without_prefix(state)


def _unwrapped(path: Path, state: Any) -> dict[str, Any]:
    """The state dict that training scripts keep beside epoch and optimiser, however often it is wrapped."""
    while isinstance(state, dict):
        wrapped = [name for name in WRAPPERS if isinstance(state.get(name), dict)]
        if len(wrapped) > 1:
            raise PFedSAMError(
                ErrorCode.WRONG_CHECKPOINT, f"{path} holds several models: {wrapped}.", "Save the one that is meant."
            )
        if not wrapped:
            return state
        state = state[wrapped[0]]
    raise PFedSAMError(
        ErrorCode.WRONG_CHECKPOINT, f"{path} holds {type(state).__name__}, no state dict.", "Give a SAM checkpoint."
    )


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers of a network put before all of them (`module.` of several GPUs)."""
    while state:
        prefix = next((one for one in PREFIXES if all(name.startswith(one) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_base(network: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load SAM's weights, strictly, before or after the network was adapted.

    A network with C mask tokens takes token `i` and its hypernetwork from SAM's token `i % 4`; position tables are
    interpolated to the network's image size (`resize_positions`).

    Raises:
        PFedSAMError: E10 naming the first missing, unknown or misshapen tensor, or one that is not finite.
    """
    target = {name: tensor for name, tensor in network.state_dict().items() if group_of(name) not in ADDED}
    state = _with_tokens(state, len(target["mask_decoder.mask_tokens.weight"]))
    state = resize_positions(state, network.get_submodule("image_encoder"))
    missing, unknown = sorted(set(target) - set(state)), sorted(set(state) - set(target))
    shapes = [n for n in target if n in state and target[n].shape != state[n].shape]
    for names, what in ((missing, "is missing"), (unknown, "is unknown"), (shapes, "has another shape")):
        if names:
            others = f"; the file has {few(map(repr, unknown), 3)}" if what == "is missing" and unknown else ""
            raise PFedSAMError(
                ErrorCode.WRONG_CHECKPOINT,
                f"{source}: tensor '{names[0]}' {what} ({len(names)} such tensors){others}.",
                "The checkpoint must belong to the chosen backbone.",
            )
    broken = [name for name in target if not bool(torch.isfinite(state[name]).all())]
    if broken:
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            f"{source}: tensor {few(map(repr, broken), 3)} holds values that are not finite (NaN or infinity).",
            "The checkpoint is damaged, or its training diverged: take an earlier one.",
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])


def _with_tokens(state: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The state with the mask tokens and hypernetworks of SAM repeated or cut to `tokens`."""
    hyper, mask = "mask_decoder.output_hypernetworks_mlps.", "mask_decoder.mask_tokens.weight"
    adapted = {name: value for name, value in state.items() if not name.startswith(hyper)}
    if mask in state and state[mask].ndim == 2 and len(state[mask]):
        adapted[mask] = state[mask][[i % len(state[mask]) for i in range(tokens)]]
    for i in range(tokens):
        prefix = f"{hyper}{i % SAM_TOKENS}."
        adapted |= {
            f"{hyper}{i}." + name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
    return adapted
