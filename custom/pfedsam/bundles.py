"""Where bundles are, and what network a bundle describes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.errors import PFedSAMError, first_of_ours
from pfedsam.networks.weights import CHECKPOINTS

#: Path of the base weights on this machine, for all sites and the server that run on it.
CHECKPOINT_VARIABLE = "PFEDSAM_CHECKPOINT"

#: Folder of this machine's own bundles. No job can set it.
BUNDLES_VARIABLE = "PFEDSAM_BUNDLES"
_METADATA = "*/configs/metadata.json"

#: Ids of a bundle's configuration that a job may override, and the types of literal it may give. Paths never.
OVERRIDES: dict[str, tuple[type, ...]] = {
    "backbone": (str,),
    "checkpoint": (str,),
    "image_size": (int,),
    "field_of_view_mm": (int, float),
    "adapted_blocks": (int, str),
    "lora_rank": (int,),
    "lora_places": (list,),
    "decoder_rank": (int,),
    "experts": (int,),
    "bottleneck": (int,),
    "expert_scale": (int, float),
    "expert_places": (list,),
    "gate": (str,),
    "top_k": (int,),
    "checkpointing": (bool,),
    "grey": (str,),
    "seed": (int,),
    "folds": (int,),
    "batch_size": (int,),
    "val_batch_size": (int,),
    "positives_per_case": (int,),
    "negatives_per_case": (int,),
    "augmentations": (int,),
    "amp": (bool,),
    "box_probability": (int, float),
    "cache_limit_gb": (int, float),
    "cache_dtype": (str,),
}


def folder(kind: str) -> Path:
    """The folder of packaged `bundles` or `jobs`: inside the installed package, else in the source tree."""
    here = Path(__file__).resolve().parent
    installed = here / kind
    return installed if installed.is_dir() else here.parents[1] / kind


def own_bundles() -> Path:
    """Where this machine's own bundles are: `PFEDSAM_BUNDLES`, else `~/.pfedsam/bundles`."""
    return Path(os.environ.get(BUNDLES_VARIABLE) or Path.home() / ".pfedsam" / "bundles")


def installed_bundles() -> dict[str, Path]:
    """Folders of the packaged bundles and of this machine's own, by name; a packaged one comes first."""
    found = [path.parent.parent for root in (folder("bundles"), own_bundles()) for path in root.glob(_METADATA)]
    return {path.name: path for path in reversed(found)}


def find_bundle(name: str) -> Path:
    """The folder of an installed bundle, by name.

    Raises:
        PFedSAMError: E16 if there is no such bundle. A path is never accepted: a job could point it anywhere.
    """
    known = installed_bundles()
    if name not in known:
        raise PFedSAMError(
            "E16",
            f"there is no installed bundle '{name}'.",
            f"Installed bundles: {sorted(known)}; one of your own goes into {own_bundles()}.",
        )
    return known[name]


def checked_overrides(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Only listed ids with literal values may be overridden by a job.

    Raises:
        PFedSAMError: E18 for an id that is not listed, a value of another type, or a string that MONAI would execute
            or resolve (`$`, `@`, `%`) or that looks like a path.
    """
    checked = {}
    for key, value in (overrides or {}).items():
        if key not in OVERRIDES:
            raise PFedSAMError("E18", f"override '{key}' is not allowed.", f"Allowed: {sorted(OVERRIDES)}.")
        kinds = OVERRIDES[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise PFedSAMError("E18", f"override '{key}' is {value!r}.", f"Give a literal {names}.")
        words = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        if not all(isinstance(word, str) and word.isidentifier() for word in words):
            raise PFedSAMError("E18", f"override '{key}' is {value!r}.", "Give plain names: no expression, no path.")
        if key == "checkpoint" and value not in ("default", *CHECKPOINTS):
            raise PFedSAMError("E18", f"override 'checkpoint' is {value!r}.", f"Names: {['default', *CHECKPOINTS]}.")
        checked[key] = value
    return checked


def local_settings(overrides: Mapping[str, Any] | None = None, checkpoint: str | None = None) -> dict[str, Any]:
    """The listed overrides, and this machine's own path of the base weights, which no job can give.

    Args:
        overrides: see `checked_overrides`.
        checkpoint: path of the base weights; by default the environment variable `PFEDSAM_CHECKPOINT`, if it is set.
    """
    path = checkpoint or os.environ.get(CHECKPOINT_VARIABLE)
    return {**checked_overrides(overrides), **({"checkpoint": path} if path else {})}


def network_of(
    bundle: str, overrides: Mapping[str, Any] | None = None, *, weights: bool = True, checkpoint: str | None = None
) -> Any:
    """The bundle's network.

    Args:
        bundle: name of an installed bundle.
        overrides: see `checked_overrides`.
        weights: False for names, shapes and dtypes only: on the meta device, without weights or memory.
        checkpoint: see `local_settings`.

    Raises:
        PFedSAMError: E10 if the base weights cannot be loaded, E16 or E18 for wrong settings.
    """
    import torch

    parser = _parser(bundle, local_settings(overrides, checkpoint))
    if not weights:
        parser["checkpoint"] = None
    try:
        with torch.device("cpu" if weights else "meta"):
            return parser.get_parsed_content("network_def")
    except Exception as error:
        # MONAI wraps an error of a component in a RuntimeError
        raise first_of_ours(error) or PFedSAMError(
            "E16", f"the network of bundle '{bundle}' could not be built: {error}", "Check the overrides."
        ) from error


def settings_of(bundle: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The bundle's literal settings (the top level of its training configuration) with the overrides applied.

    Raises:
        PFedSAMError: E16 or E18 for wrong settings.
    """
    parser = _parser(bundle, local_settings(overrides))
    plain = {key: value for key, value in parser.get().items() if not isinstance(value, dict)}
    return {key: parser.get_parsed_content(key) for key in plain if key in OVERRIDES}


def _parser(bundle: str, settings: Mapping[str, Any]) -> Any:
    """MONAI's parser of the bundle's training configuration, with some settings replaced."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(find_bundle(bundle) / "configs" / "train.json"))
    for key, value in settings.items():
        parser[key] = value
    return parser


def metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a bundle's folder."""
    return json.loads((folder / "configs" / "metadata.json").read_text())


def class_names(folder: Path) -> list[str]:
    """Names of a bundle's classes, by channel; label value n is the n-th name."""
    channels = metadata(folder)["network_data_format"]["outputs"]["pred"]["channel_def"]
    return [channels[str(number)] for number in range(len(channels))]


def is_rgb(folder: Path) -> bool:
    """Whether a bundle takes colour pictures."""
    return metadata(folder)["network_data_format"]["inputs"]["image"]["format"] == "RGB"


def field_of_view(bundle: str, overrides: Mapping[str, Any] | None = None) -> float | None:
    """Side in millimetres of the square that a bundle sees of each slice, None if it sees all.

    Raises:
        PFedSAMError: E16 or E18 for wrong settings.
    """
    key = "field_of_view_mm"
    settings = json.loads((find_bundle(bundle) / "configs" / "train.json").read_text()) | checked_overrides(overrides)
    if settings.get(key) is None:
        return None
    if not 0 < float(settings[key]) < float("inf"):
        raise PFedSAMError("E16", f"{key} is {settings[key]}.", "Give the side of the field in millimetres, above 0.")
    return float(settings[key])
