"""A site's model as one file: the shared tensors, the personal tensors trained beside them, and what belongs to them.

The file is safetensors (no code can hide in it) with a JSON text as metadata and a SHA-256 over both, so that a
damaged file is not taken for a model. A personal part is only valid with the shared part it was trained beside, so both
always travel in one file. The file never leaves the site.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pfedsam.data.seen import SEEN, Seen, patient_of
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_safetensors, write_atomically
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import (
    COPY,
    Roles,
    check_state,
    load_personal_state,
    load_shared_state,
    manifest,
    personal_state,
    shared_state,
    trains_encoder,
    update_digest,
)

#: Format version of the files. Version 1 had the same layout and no digest: damage in it cannot be seen.
SCHEMA = 2
_WITHOUT_DIGEST = "1"
_PARTS = ("shared", "personal", "moments")


@dataclass
class SiteModel:
    """What a site keeps.

    Attributes:
        shared: the shared tensors that `personal` was trained beside.
        personal: the personal tensors.
        moments: of the personal optimiser (empty in an exported model).
        info: `fingerprint`, `roles`, `round`, `seen` (see `pfedsam.data.seen`) and what else is told about the model;
            plain JSON values.
    """

    shared: dict[str, Tensor]
    personal: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, network: SegmentAnything, roles: Roles, **info: Any) -> SiteModel:
        """The model that a network holds now."""
        own_info = {
            "fingerprint": network.base_fingerprint,
            "roles": {"shared": list(roles.shared), "personal": list(roles.personal)},
        }
        return cls(shared_state(network, roles), personal_state(network, roles), info={**own_info, **info})

    @classmethod
    def load(cls, path: str | Path) -> SiteModel:
        """Read a model file; see `read`."""
        return read(path)

    def save(self, path: str | Path) -> None:
        """Write the model to a file, atomically; see `write`."""
        write(path, self)

    @property
    def roles(self) -> Roles:
        """Roles of the groups when the model was trained."""
        roles = self.info.get("roles")
        groups = [roles.get(role) if isinstance(roles, dict) else None for role in ("shared", "personal")]
        lists = [
            tuple(names) for names in groups if isinstance(names, list) and all(type(name) is str for name in names)
        ]
        if len(lists) != len(groups):
            raise PFedSAMError(
                ErrorCode.PERSONAL_STATE, f"the model's roles are {roles!r}, expected two lists of groups."
            )
        return Roles(*lists)

    def load_into(self, network: SegmentAnything) -> None:
        """Put both parts into a network.

        Raises:
            PFedSAMError: E11 if the network has other base weights or settings, E12 or E13 if tensors do not fit.
        """
        if self.info.get("fingerprint") != network.base_fingerprint:
            raise PFedSAMError(
                ErrorCode.OTHER_BASE_WEIGHTS,
                f"the model was trained on base weights {str(self.info.get('fingerprint'))[:12]}, "
                f"this network has {str(network.base_fingerprint)[:12]}.",
                "Use the same backbone, image size and checkpoint as in training.",
            )
        # all is checked before a part is loaded: half a model is no model
        own = {name: tensor for name, tensor in self.personal.items() if not name.startswith(COPY)}
        check_state(
            own, manifest(network, self.roles, "personal"), code=ErrorCode.PERSONAL_STATE, what="personal state"
        )
        if self.copy:
            expected = manifest(network, self.roles, "shared")
            check_state(self.copy, expected, code=ErrorCode.PERSONAL_STATE, what="personal copy of the shared tensors")
        network.frozen_trunk = not trains_encoder(network, self.roles)
        load_shared_state(network, self.roles, self.shared)
        load_personal_state(network, self.roles, own)

    @property
    def copy(self) -> dict[str, Tensor]:
        """The site's own copy of the shared tensors, by their shared names; empty if the strategy has none."""
        named = self.personal.items()
        return {name.removeprefix(COPY): tensor for name, tensor in named if name.startswith(COPY)}

    def use(self, network: SegmentAnything, personal: bool) -> None:
        """After `load_into`: make the network the personal model, or the global one (experts off, no copy)."""
        network.set_experts(personal)
        load_shared_state(network, self.roles, self.copy if personal and self.copy else self.shared)

    def load_as(self, network: SegmentAnything, personal: bool) -> None:
        """Make a network the site's personal model, or the global one: `load_into`, then `use`. For bundles.

        Args:
            network: of the same base weights and settings.
            personal: experts on, and the site's copy of the shared tensors if it has one; else experts off, no copy.

        Raises:
            PFedSAMError: as `load_into`.
        """
        self.load_into(network)
        self.use(network, personal)


def write(path: str | Path, model: SiteModel) -> None:
    """Write a model, atomically.

    Raises:
        OSError: if the disk is full or not writable; a file that was there before is intact.
    """
    tensors = {name: tensor.contiguous() for name, tensor in _named(model).items()}
    info = json.dumps(model.info)
    metadata = {"schema": str(SCHEMA), "info": info, "sha256": _digest(info, tensors)}
    write_atomically(path, save(tensors, metadata=metadata))


def read(path: str | Path) -> SiteModel:
    """Read a model. Nothing in the file is executed.

    Raises:
        PFedSAMError: E13 if the file is missing, damaged, of another schema or no site model, or holds values that are
            not finite.
    """
    path = Path(path)
    remedy = "Give a path from below the table of `pfedsam state list --root <run>`, or a training's model.safetensors."
    if not path.is_file():
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"there is no model file {path}.", remedy)
    try:
        tensors, metadata = read_safetensors(path)
        schema, info = metadata.get("schema"), json.loads(metadata.get("info", "null"))
    except ValueError as error:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{path} is not readable: {error}.", remedy) from None
    if schema == _WITHOUT_DIGEST:
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE,
            f"{path} is of schema 1, which has no digest (expected {SCHEMA}): damage in it would not be seen.",
            "A state: take another federation name, or `pfedsam state delete` it. A model: train it again.",
        )
    if schema != str(SCHEMA) or not isinstance(info, dict) or not isinstance(info.get("roles"), dict):
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE, f"{path} has schema {schema}, expected {SCHEMA} with roles.", remedy
        )
    _check_digest(path, tensors, metadata)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts or not rest:
            raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{path} holds an unknown tensor '{name}'.", remedy)
        parts[part][rest] = tensor
    model = SiteModel(**parts, info=info)
    require_finite(model, str(path))
    return model


def require_finite(model: SiteModel, what: str) -> None:
    """Refuse a model that training has spoilt: no site can go on from it.

    Args:
        model: the model.
        what: what it is, for the sentence.

    Raises:
        PFedSAMError: E13 naming the first tensor with a value that is not finite.
    """
    for name, tensor in _named(model).items():
        if not bool(torch.isfinite(tensor).all()):
            raise PFedSAMError(
                ErrorCode.PERSONAL_STATE,
                f"{what}: '{name}' holds values that are not finite.",
                "Take an earlier state or model.",
            )


def _named(model: SiteModel) -> dict[str, Tensor]:
    """All tensors by their names in the file."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "shared": model.shared,
        "personal": model.personal,
        "moments": model.moments,
    }
    return {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def _digest(info: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the JSON text and, in the order of their names, name, dtype, shape and bytes of each tensor."""
    digest = hashlib.sha256(info.encode())
    update_digest(digest, tensors)
    return digest.hexdigest()


def _check_digest(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    expected, digest = metadata.get("sha256"), _digest(metadata["info"], tensors)
    if digest == expected:
        return
    raise PFedSAMError(
        ErrorCode.PERSONAL_STATE,
        f"{path} is damaged: its content has SHA-256 {digest[:12]}, the file says {(expected or 'nothing')[:12]}.",
        "Check the disk. A job goes on from the state before it; a model of its own comes back from a backup only.",
    )


def save_alone(
    path: str,
    network: SegmentAnything,
    trainer: Any,
    training: Sequence[Mapping[str, Any]] | None = None,
    validation: Sequence[Mapping[str, Any]] = (),
) -> None:
    """What a bundle does at the end of a training without a federation.

    Args:
        path: file to write.
        network: what was trained.
        trainer: the bundle's.
        training, validation: the bundle's lists of cases, whose patients the model keeps as seen; without the first it
            does not say which patients it was trained on.
    """
    seen = {}
    if training is not None:
        known = Seen.nothing().add("training", map(patient_of, training))
        seen[SEEN] = known.add("validation", map(patient_of, validation)).to_dict()
    write(path, SiteModel.of(network, trainer.roles, epochs=trainer.state.epoch, round=None, **seen))
    print(f"model written to {path}")


def model_settings(
    model_file: str | Path, bundle: str | None, overrides: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The bundle of a model and the settings that its network was built with; what is given comes first.

    Raises:
        PFedSAMError: E13 if the file is no model, E33 if it names no bundle and none is given.
    """
    info = read(model_file).info
    name = bundle or info.get("bundle")
    if not isinstance(name, str):
        raise PFedSAMError(ErrorCode.RUN_INCOMPLETE, f"{model_file} names no bundle.", "Name it: --bundle.")
    own_overrides = info.get("overrides")
    return name, {**(own_overrides if isinstance(own_overrides, dict) else {}), **overrides}


__all__ = ["SiteModel", "model_settings", "read", "require_finite", "save_alone", "write"]
