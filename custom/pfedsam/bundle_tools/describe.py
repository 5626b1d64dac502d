"""What a bundle's network really is: its settings, its parameters by group and role, bytes on the wire, cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pfedsam.bundles import network_of, settings_of
from pfedsam.networks.adaptation import AUTO
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import GROUPS, Role, Roles, TensorSpec, group_of, tensors

#: Settings that decide what is trained, in the order in which they are told; a bundle may have others.
SWITCHES = (
    *("backbone", "checkpoint", "image_size", "adapted_blocks", "lora_rank", "lora_places", "decoder_rank"),
    *("experts", "bottleneck", "expert_scale", "expert_places", "gate", "top_k"),
    *("grey", "augmentations", "batch_size", "amp", "checkpointing", "cache_limit_gb", "cache_dtype"),
)


@dataclass(frozen=True)
class GroupSize:
    """Tensors, parameters (with persistent buffers) and bytes of one group."""

    group: str
    role: Role
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Description:
    """What `describe` found.

    Attributes:
        settings: the bundle's switches with the overrides applied.
        groups: sizes of the groups that the network has, in the order of `pfedsam.parameters.GROUPS`; `layer_norm` is
            one where layer norms have a role of their own, `personal_copy` where a site keeps a copy of what is shared.
        decoder_share: `subset`, `full`, `lora`, `frozen`, or several of them.
        trunk_gflop: forward pass of one image through the frozen trunk, which the feature cache saves, in GFLOP (a
            multiplication and an addition are two).
        head_gflop: forward pass of one image through the rest.
    """

    settings: dict[str, Any]
    groups: tuple[GroupSize, ...]
    decoder_share: str
    trunk_gflop: float
    head_gflop: float

    def parameters(self, role: Role) -> int:
        """Number of parameters of a role."""
        return sum(size.parameters for size in self.groups if size.role == role)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "payload_bytes": self.payload}

    @property
    def payload(self) -> int:
        """Bytes of the shared tensors in their own dtype: for each site, round and direction, before serialisation."""
        return sum(size.bytes for size in self.groups if size.role == "shared")


def describe(
    bundle: str, roles: Roles, overrides: Mapping[str, Any] | None = None, *, copies: bool = False
) -> Description:
    """Describe the network of a bundle without weights or memory (on the meta device).

    Args:
        bundle: name of an installed bundle.
        roles: of the strategy.
        copies: whether a site keeps a copy of the shared tensors of its own (`has_copy` of the strategy).
        overrides: see `pfedsam.bundles.checked_overrides`.

    Raises:
        PFedSAMError: E16 or E18 for wrong settings.
    """
    network = network_of(bundle, overrides, weights=False)
    named: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    for name, tensor in tensors(network).items():
        named[roles.group(name)][name] = tensor
    if copies:
        named["personal_copy"] = {name: t for name, t in tensors(network).items() if roles.of(name) == "shared"}
    groups = tuple(_size(group, members, roles) for group, members in named.items() if members)
    literals = settings_of(bundle, overrides)
    trunk, head = _gflop(network)
    settings = {key: literals[key] for key in SWITCHES if key in literals}
    if settings.get("adapted_blocks") == AUTO:
        blocks = network.image_encoder.adaptable_blocks()
        settings["adapted_blocks"] = len(blocks) - network.first_adapted
    return Description(settings, groups, _decoder_share(network, roles), trunk, head)


def _size(group: str, named: Mapping[str, Tensor], roles: Roles) -> GroupSize:
    role: Role = "personal" if group == "personal_copy" else roles.of(next(iter(named)))
    sizes = [TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")).bytes for t in named.values()]
    return GroupSize(group, role, len(named), sum(t.numel() for t in named.values()), sum(sizes))


def _decoder_share(network: SegmentAnything, roles: Roles) -> str:
    parts = []
    if "decoder_subset" in roles.shared:
        parts.append("full" if "decoder_rest" in roles.shared else "subset")
    elif "decoder_rest" in roles.shared:
        parts.append("rest")
    lora = any(name.startswith("mask_decoder.") and group_of(name) == "lora_b" for name in tensors(network))
    if lora and "lora_b" in roles.shared:
        parts.append("lora")
    return " + ".join(parts) or "frozen"


@torch.no_grad()
def _gflop(network: SegmentAnything) -> tuple[float, float]:
    counts = []
    side = network.image_size
    x = torch.empty(1, 3, side, side, device="meta")
    for part in (network.trunk, network.head):
        with FlopCounterMode(display=False) as counter:
            x = part(x)
        counts.append(counter.get_total_flops() / 1e9)
    return counts[0], counts[1]
