"""Where bundles are, and what network a bundle describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.errors import ErrorCode, PFedSAMError, failing_as, shown
from pfedsam.files import file_digest, read_object
from pfedsam.settings import Setting, all_settings, checked, require_together

#: Path of the base weights on this machine, for all sites and the server that run on it.
CHECKPOINT_VARIABLE = "PFEDSAM_CHECKPOINT"

#: Folder of this machine's own bundles. No job can set it.
BUNDLES_VARIABLE = "PFEDSAM_BUNDLES"
TRAIN, METADATA = "train.json", "metadata.json"
#: The line of a bundle's `initialize` that loads a site's model, and the two that were there before. They leave out a
#: site's copy of the shared tensors, so a strategy that has one got its global model.
LOAD_MODEL = "$read_model(@model_file).load_as(@network, @experts_on)"
LOAD_MODEL_BEFORE = ("$read_model(@model_file).load_into(@network)", "$@network.set_experts(@experts_on)")
_BUNDLES = f"*/configs/{METADATA}"

#: What a job may override of a bundle's configuration, by id, see `pfedsam.settings`. Paths never.
OVERRIDES: dict[str, Setting] = {name: setting for name, setting in all_settings().items() if setting.by == "job"}


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
    folders = [path.parent.parent for root in (folder("bundles"), own_bundles()) for path in root.glob(_BUNDLES)]
    return {path.name: path for path in reversed(folders)}


def find_bundle(name: str) -> Path:
    """The folder of an installed bundle, by name.

    Raises:
        PFedSAMError: E28 if there is no such bundle. A path is never accepted: a job could point it anywhere.
    """
    known = installed_bundles()
    if not isinstance(name, str) or name not in known:
        raise PFedSAMError(
            ErrorCode.UNKNOWN_NAME,
            f"there is no installed bundle {shown(name)}.",
            f"Installed bundles: {sorted(known)}; one of your own goes into {own_bundles()}.",
        )
    return known[name]


def scripts_of(folder: Path) -> dict[str, str]:
    """Digests of the Python files that a bundle brings, by path in its folder."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted((folder / "scripts").rglob("*.py"))}


def checked_overrides(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Only a job's settings may be overridden, with literal values inside their ranges; see `pfedsam.settings`.

    Raises:
        PFedSAMError: E18 naming the setting, its value and what is allowed.
    """
    return checked(overrides)


def require_settings(bundle: str, overrides: Mapping[str, Any] | None = None) -> None:
    """Refuse overrides that are wrong, each by itself or together with the bundle's own values. Needs no MONAI.

    Raises:
        PFedSAMError: E28 if there is no such bundle, E29 if its configuration cannot be read, E18 for wrong settings.
    """
    require_together(literals_of(bundle, overrides), bundle)


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
        PFedSAMError: E10 if the base weights cannot be loaded, E30 if the network cannot be built, E16 or E18 for wrong
            settings.
    """
    import torch

    require_settings(bundle, overrides)
    parser = _parser(bundle, local_settings(overrides, checkpoint))
    if not weights:
        parser["checkpoint"] = None
    # MONAI wraps an error of a component in a RuntimeError
    message = f"the network of bundle '{bundle}' could not be built"
    with (
        failing_as(ErrorCode.BUNDLE_FAILED, message, "Check the overrides."),
        torch.device("cpu" if weights else "meta"),
    ):
        return parser.get_parsed_content("network_def")


def settings_of(bundle: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The bundle's literal settings (the top level of its training configuration) with the overrides applied.

    Raises:
        PFedSAMError: E16 or E18 for wrong settings.
    """
    require_settings(bundle, overrides)
    parser = _parser(bundle, local_settings(overrides))
    plain = {key: value for key, value in parser.get().items() if not isinstance(value, dict)}
    return {key: parser.get_parsed_content(key) for key in plain if key in OVERRIDES}


def _parser(bundle: str, settings: Mapping[str, Any]) -> Any:
    """MONAI's parser of the bundle's training configuration, with some settings replaced."""
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(find_bundle(bundle) / "configs" / TRAIN))
    for key, value in settings.items():
        parser[key] = value
    return parser


def _configuration(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a bundle's configuration (E29 if it cannot be read or is no JSON object)."""
    return read_object(folder / "configs" / name, "Correct the bundle.")


def metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a bundle's folder (E29 if they cannot be read)."""
    return _configuration(folder, METADATA)


def class_names(folder: Path) -> list[str]:
    """Names of a bundle's classes, by channel; label value n is the n-th name (E29 if the metadata tell none)."""
    channels = _told_of_network(folder, "outputs", "pred", "channel_def")
    numbers = [str(number) for number in range(len(channels))] if isinstance(channels, dict) else []
    if not numbers or any(not isinstance(channels.get(number), str) for number in numbers):
        where = folder / "configs" / METADATA
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE,
            f"{where}: channel_def is {shown(channels)}.",
            'For example: {"0": "lesion"}',
        )
    return [channels[number] for number in numbers]


def is_rgb(folder: Path) -> bool:
    """Whether a bundle takes colour pictures (E29 if the metadata do not tell)."""
    return _told_of_network(folder, "inputs", "image", "format") == "RGB"


def _told_of_network(folder: Path, *keys: str) -> Any:
    """A value of the metadata's `network_data_format`."""
    value: Any = metadata(folder)
    for key in ("network_data_format", *keys):
        if not isinstance(value, dict) or key not in value:
            where, path = ".".join(("network_data_format", *keys)), folder / "configs" / METADATA
            raise PFedSAMError(
                ErrorCode.CONFIGURATION_FILE,
                f"{path} has no {where}.",
                "See the metadata of the bundle brain_lesion_mri.",
            )
        value = value[key]
    return value


def literals_of(bundle: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The top level of a bundle's training configuration as it is written, with the overrides on top. Needs no MONAI.

    Raises:
        PFedSAMError: E28 if there is no such bundle, E29 if its configuration cannot be read, E18 for wrong settings.
    """
    return {**_configuration(find_bundle(bundle), TRAIN), **checked_overrides(overrides)}


def class_values(bundle: str, overrides: Mapping[str, Any] | None = None) -> tuple[tuple[int, ...], ...]:
    """The class numbers that belong to each class of a bundle: `((1, 2), (2,))` for two nested ones.

    Raises:
        PFedSAMError: as `class_names` and `literals_of`.
    """
    names, told = class_names(find_bundle(bundle)), literals_of(bundle, overrides).get("class_values")
    if not isinstance(told, list) or len(told) != len(names):
        return tuple((number,) for number in range(1, len(names) + 1))
    return tuple(tuple(numbers) for numbers in told)


def field_of_view(bundle: str, overrides: Mapping[str, Any] | None = None) -> float | None:
    """Side in millimetres of the square that a bundle sees of each slice, None if it sees all.

    Raises:
        PFedSAMError: E16 or E18 for wrong settings.
    """
    key = "field_of_view_mm"
    value = literals_of(bundle, overrides).get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise PFedSAMError(
            ErrorCode.WRONG_SETTING, f"{key} is {value!r}.", "Give the side of the field in millimetres, above 0."
        )
    return float(value)
