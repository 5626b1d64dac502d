"""The one door: which tensors of a network are shared, personal or frozen, and the way of state in and out.

Every parameter and persistent buffer belongs to exactly one *group*, found from its name. A strategy assigns groups to
the roles `shared` and `personal`; every other group is `frozen`. `SHAREABLE_GROUPS` is the
ceiling of what may ever be shared: experts, personal copies and running statistics are not in it, so no configuration
can share them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pfedsam.errors import ErrorCode, PFedSAMError

Role = Literal["shared", "personal", "frozen"]

#: Name patterns of the groups, in order: the first that matches decides.
_GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        ("personal_copy", r"personal\..+"),
        ("experts", r"(.+\.)?experts\..+"),
        ("lora_a", r".+\.lora_a"),
        ("lora_b", r".+\.lora_b"),
        ("statistics", r".+\.(running_mean|running_var|num_batches_tracked)"),
        ("decoder_subset", r"mask_decoder\.(mask_tokens|output_hypernetworks_mlps|output_upscaling)\..+"),
        ("decoder_rest", r"mask_decoder\.(transformer|iou_token|iou_prediction_head)\..+"),
        ("encoder", r"image_encoder\.(patch_embed|pos_embed|layers|blocks|neck)(\..+)?"),
        ("prompt", r"prompt_encoder\.(pe_layer|point_embeddings|not_a_point_embed|mask_downscaling|no_mask_embed)\..+"),
    )
)
#: Layer norms lie across the groups: a strategy may keep them personal (as FedBN keeps batch norms), never share them
#: as a group of their own.
LAYER_NORM = "layer_norm"
_LAYER_NORMS = re.compile(
    r"(image_encoder\.(blocks\.\d+\.norm[12]|neck\.[13]|layers\.\d+\.blocks\.\d+\.(attn|mlp)\.norm)"
    r"|mask_decoder\.(transformer\.(layers\.\d+\.norm[1-4]|norm_final_attn)|output_upscaling\.1))\.(weight|bias)"
)
#: LoRA of the decoder apart from that of the encoder: a strategy that names one of these gives it a role of its own,
#: else it has that of all LoRA (IAT, arXiv 2606.08687). Whoever speaks of `lora_a` without a strategy means both.
DECODER_LORA: dict[str, str] = {"decoder_lora_a": "lora_a", "decoder_lora_b": "lora_b"}
#: Groups that follow from a tensor's name alone.
OWN_GROUPS: tuple[str, ...] = tuple(group for group, _ in _GROUPS)
GROUPS: tuple[str, ...] = (*OWN_GROUPS, LAYER_NORM, *DECODER_LORA)
#: Prefix of a site's own copy of a shared tensor.
COPY = "personal."

#: Groups that a strategy may share. Code, not configuration: a job or a site file can only narrow it.
SHAREABLE_GROUPS: frozenset[str] = frozenset({"lora_a", "lora_b", "decoder_subset", "decoder_rest", "encoder"})
#: Groups that a strategy may keep personal.
MAY_BE_PERSONAL: frozenset[str] = SHAREABLE_GROUPS | {"experts", "personal_copy", LAYER_NORM}
#: Groups that are added to the base model and are therefore no part of `W0`.
ADDED: frozenset[str] = frozenset({"experts", "lora_a", "lora_b", "personal_copy"})


def group_of(name: str) -> str:
    """The group of a tensor name.

    Raises:
        PFedSAMError: E12 if no group knows the name, so that a new tensor can never travel or be lost unnoticed.
    """
    for group, pattern in _GROUPS:
        if pattern.fullmatch(name):
            return group
    raise PFedSAMError(
        ErrorCode.SHARED_TENSORS,
        f"tensor '{name}' belongs to no known group {list(GROUPS)}.",
        "Classify it in pfedsam/parameters.py.",
    )


def base_group(group: str) -> str:
    """The group that a group of a strategy is a part of, as `group_of` names it; else the group itself."""
    return DECODER_LORA.get(group, group)


@dataclass(frozen=True)
class Roles:
    """Which groups are shared and which are personal; every other group is frozen.

    Args:
        shared: groups that are averaged on the server.
        personal: groups that never leave the site.

    Raises:
        PFedSAMError: E16 if a group is unknown, has two roles, or is above the ceiling.
    """

    shared: tuple[str, ...] = ("lora_a", "lora_b", "decoder_subset")
    personal: tuple[str, ...] = ("experts",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", tuple(self.shared))
        object.__setattr__(self, "personal", tuple(self.personal))
        unknown = [group for group in (*self.shared, *self.personal) if group not in GROUPS]
        if unknown:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"unknown parameter group(s) {unknown}.", f"Use some of {list(GROUPS)}."
            )
        above = [group for group in self.shared if base_group(group) not in SHAREABLE_GROUPS]
        if above:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING,
                f"group(s) {above} may never be shared.",
                f"Share some of {sorted(SHAREABLE_GROUPS)}.",
            )
        fixed = [group for group in self.personal if base_group(group) not in MAY_BE_PERSONAL]
        if fixed:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING,
                f"group(s) {fixed} are always frozen.",
                f"Use some of {sorted(MAY_BE_PERSONAL)}.",
            )
        both = sorted(set(self.shared) & set(self.personal))
        if both:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"group(s) {both} are both shared and personal.", "Give each group one role."
            )

    def group(self, name: str) -> str:
        """The group that gives a tensor its role: its own, or one that lies across and is named (E12 if unknown)."""
        group = group_of(name)
        if LAYER_NORM in self.personal and _LAYER_NORMS.fullmatch(name):
            return LAYER_NORM
        of_decoder = f"decoder_{group}"
        is_named = of_decoder in DECODER_LORA and of_decoder in (*self.shared, *self.personal)
        return of_decoder if is_named and name.startswith("mask_decoder.") else group

    def of(self, name: str) -> Role:
        """The role of one tensor name (E12 if the name is unknown)."""
        group = self.group(name)
        if group in self.shared:
            return "shared"
        return "personal" if group in self.personal else "frozen"


def trains_encoder(network: nn.Module, roles: Roles) -> bool:
    """Whether base weights of the encoder are shared or personal: then its features cannot be cached."""
    names = [name for name in tensors(network) if group_of(name) == "encoder"]
    return any(roles.of(name) != "frozen" for name in names)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype (as torch names it, for example `float32`) that a tensor must have."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        count = 1
        for side in self.shape:
            count *= side
        return count * torch.empty((), dtype=getattr(torch, self.dtype)).element_size()


Manifest = dict[str, TensorSpec]


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name (no copy)."""
    return network.state_dict(keep_vars=True)


def partition(network: nn.Module, roles: Roles) -> dict[str, Role]:
    """The role of every parameter and persistent buffer; E12 if a name is unknown."""
    return {name: roles.of(name) for name in tensors(network)}


def manifest(network: nn.Module, roles: Roles, role: Role) -> Manifest:
    """Names, shapes and dtypes of the tensors of one role. Works on the meta device too."""
    return {
        name: TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors(network).items()
        if roles.of(name) == role
    }


def check_state(state: Mapping[str, Any], expected: Manifest, *, code: str, what: str) -> None:
    """Check names, shapes, dtypes and finiteness of a state.

    Args:
        state: tensors or numpy arrays by name.
        expected: the manifest that the state must equal.
        code: error code to raise with.
        what: what the state is, for the sentence.

    Raises:
        PFedSAMError: with the first difference found.
    """
    remedy = "Both sides must use the same bundle, backbone, number of classes and strategy."
    missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or extra:
        raise PFedSAMError(code, f"{what}: missing tensors {short(missing)}, unknown tensors {short(extra)}.", remedy)
    for name, spec in expected.items():
        value = state[name]
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            raise PFedSAMError(code, f"{what}: '{name}' is {type(value).__name__}, expected an array.", remedy)
        shape, dtype = tuple(value.shape), str(value.dtype).removeprefix("torch.")
        if shape != spec.shape or dtype != spec.dtype:
            raise PFedSAMError(
                code, f"{what}: '{name}' is {dtype}{list(shape)}, expected {spec.dtype}{list(spec.shape)}.", remedy
            )
        tensor = torch.as_tensor(value)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PFedSAMError(code, f"{what}: '{name}' holds values that are not finite.", "Lower the learning rate.")


def shared_state(network: nn.Module, roles: Roles) -> dict[str, Tensor]:
    """A copy of the shared tensors on the CPU."""
    return _state(network, roles, "shared")


def base_state(network: nn.Module, roles: Roles) -> dict[str, Tensor]:
    """A copy of all that may be trained but the experts, on the CPU: of a network that nobody has trained yet."""
    state = {**_state(network, roles, "shared"), **_state(network, roles, "personal")}
    return {name: tensor for name, tensor in state.items() if group_of(name) != "experts"}


def personal_state(network: nn.Module, roles: Roles) -> dict[str, Tensor]:
    """A copy of the personal tensors on the CPU. It never leaves the site."""
    return _state(network, roles, "personal")


def load_shared_state(network: nn.Module, roles: Roles, state: Mapping[str, Any]) -> None:
    """Copy shared tensors into the network; E12 if names, shapes, dtypes or values do not fit."""
    _load(network, roles, "shared", state, code=ErrorCode.SHARED_TENSORS, what="shared state")


def load_personal_state(network: nn.Module, roles: Roles, state: Mapping[str, Any]) -> None:
    """Copy personal tensors into the network; E13 if names, shapes, dtypes or values do not fit."""
    _load(network, roles, "personal", state, code=ErrorCode.PERSONAL_STATE, what="personal state")


def set_trainable(network: nn.Module, roles: Roles, trained: Iterable[Role]) -> list[nn.Parameter]:
    """Let exactly the parameters of the given roles require a gradient, and return them in the order of their names."""
    wanted, chosen = set(trained) - {"frozen"}, []
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(roles.of(name) in wanted)
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


@contextmanager
def swapped_parameters(network: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """The network with other values in some parameters inside a `with` block, without a copy of the network.

    Args:
        network: its parameters are the same objects inside and after, and have their former data after.
        state: values by the parameters' names, on any device: they are moved to each parameter's own.
    """
    parameters = {name: parameter for name, parameter in network.named_parameters() if name in state}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = state[name].to(parameter.device)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


def base_fingerprint(network: nn.Module, settings: Mapping[str, Any]) -> str:
    """SHA-256 over the base weights `W0` (every tensor that was not added to SAM) and the network's settings.

    Call it when the checkpoint is loaded and before anything is trained: the decoder belongs to `W0` at that moment.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    update_digest(digest, {name: t for name, t in tensors(network).items() if group_of(name) not in ADDED})
    return digest.hexdigest()


def update_digest(digest: hashlib._Hash, state: Mapping[str, Tensor]) -> None:
    """Add name, dtype, shape and bytes of each tensor, in the order of the names, to a hash."""
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _state(network: nn.Module, roles: Roles, role: Role) -> dict[str, Tensor]:
    # `.contiguous().clone()`, so that a copy never shares storage with the network or another tensor
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in tensors(network).items()
        if roles.of(name) == role
    }


@torch.no_grad()
def _load(network: nn.Module, roles: Roles, role: Role, state: Mapping[str, Any], *, code: str, what: str) -> None:
    check_state(state, manifest(network, roles, role), code=code, what=what)
    for name, tensor in tensors(network).items():
        if name in state:
            tensor.copy_(torch.as_tensor(state[name]))


def short(names: list[str], limit: int = 3) -> str:
    """The first names of a list, and how many more there are, for a sentence."""
    return str(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
