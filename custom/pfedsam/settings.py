"""The settings of a bundle: what each means, its unit and its range, and who may set it. Imports no torch.

A job overrides what is a job's to set, with literal values inside closed ranges. Paths, devices and the meaning of
label values are a site's own settings, classes and groups the bundle's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.networks.weights import CHECKPOINTS
from pfedsam.ranges import LARGEST_SEED, MOST_EPOCHS

#: Who sets a setting: a job (and who trains alone), a site, or only the author of the bundle.
By = Literal["job", "site", "bundle"]
#: What the registry of backbones says of each, which takes torch to read: the image side is a multiple of so many
#: pixels, and so many blocks can be adapted.
MULTIPLES = {"lite_medsam": 4, "vit_b": 16, "vit_l": 16, "vit_h": 16, "vit_test": 16}
BLOCKS = {"lite_medsam": 10, "vit_b": 12, "vit_l": 24, "vit_h": 32, "vit_test": 3}
#: What other tools call some settings. Either may be written; inside there is one name.
ALIASES = {"num_experts": "experts", "router": "gate", "target_modules": "lora_places"}
_LIST = "See `pfedsam settings`."


def _once_each(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("each name once")
    return names


LoRAPlaces = Annotated[list[Literal["qv", "projection", "mlp"]], AfterValidator(_once_each)]
ExpertPlaces = Annotated[list[Literal["encoder", "neck", "decoder"]], AfterValidator(_once_each)]
Blocks = Annotated[int, Field(ge=0, le=max(BLOCKS.values()))]


def _told(by: By, meaning: str, unit: str = "", **bounds: Any) -> Any:
    # no setting has to be given, but null is no value
    return Field(None, description=meaning, json_schema_extra={"unit": unit, "by": by}, **bounds)


def _job(meaning: str, unit: str = "", **bounds: Any) -> Any:
    return _told("job", meaning, unit, **bounds)


class Settings(BaseModel):
    """Every literal at the top of a bundle's `configs/train.json`; here some of them, for example a job's overrides."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    backbone: Literal["lite_medsam", "vit_b", "vit_l", "vit_h", "vit_test"] = _job("Image encoder.")
    checkpoint: str = _job("Base weights: the backbone's own, or a name of `pfedsam models`.")
    image_size: int = _job("Side of the network's input.", "pixels", ge=32, le=2048, multiple_of=4)
    field_of_view_mm: float = _job("Side of the square that is seen of each slice.", "mm", ge=1, le=2000)
    adapted_blocks: Literal["auto", "all"] | Blocks = _job("So many of the last encoder blocks get LoRA and experts.")
    lora_rank: int = _job("Rank of LoRA in the encoder, 0 for none.", ge=0, le=256)
    lora_places: LoRAPlaces = _job("Layers of an adapted block that get LoRA.")
    decoder_rank: int = _job("Rank of LoRA in the decoder, 0 for none.", ge=0, le=256)
    experts: int = _job("Experts of each mixture, 0 for no mixture.", ge=0, le=64)
    bottleneck: int = _job("Hidden width of an expert.", "channels", ge=1, le=1024)
    expert_scale: float = _job("Factor of what the experts add.", ge=0, le=100)
    expert_places: ExpertPlaces = _job("Where mixtures are.")
    gate: Literal["image", "token"] = _job("What a gate looks at.")
    top_k: int = _job("Gates that count, 0 for all; at most `experts`.", ge=0, le=64)
    checkpointing: bool = _job("Compute activations again in the backward pass: less memory, more time.")
    grey: Literal["neighbours", "same"] = _job("The three channels of a grey slice.")
    seed: int = _job("Of draws and initial values; the test fold is seed modulo `folds`.", ge=0, le=LARGEST_SEED)
    folds: int = _job("Folds of the patients of a site without a split of its own.", ge=2, le=100)
    batch_size: int = _job("Slices of a training step.", "slices", ge=1, le=1024)
    val_batch_size: int = _job("Slices that are predicted at a time.", "slices", ge=1, le=1024)
    positives_per_case: int = _job("At most so many labelled slices of a case in an epoch.", "slices", ge=1, le=1000)
    negatives_per_case: int = _job("At most so many slices without.", "slices", ge=0, le=1000)
    augmentations: int = _job("Variants drawn of each slice, 1 for a single one.", "variants", ge=1, le=100)
    amp: bool = _job("bfloat16 autocast; switched off, and said, where a processor only imitates it and is slower.")
    box_probability: float = _job("Share of the training steps that have box prompts.", ge=0, le=1)
    cache_limit_gb: float = _job("For cached features of the frozen trunk, 0 for no cache.", "GiB", ge=0, le=1024)
    cache_dtype: Literal["float32", "float16", "bfloat16"] = _job("How these features are stored.")

    dataset_dir: str = _told("site", "The site folder.", "path")
    output_dir: str = _told("site", "Where the bundle may write.", "path")
    device: str = _told("site", "Where it computes: cpu, cuda:0 ...")
    cache_dir: str = _told("site", "Folder of a cache on disk; null: in memory.", "path")
    label_map: dict[str, str] = _told("site", "What the site's label values mean.")

    class_names: list[str] = _told("bundle", "Names of the classes, by channel.")
    class_values: list[list[int]] = _told("bundle", "Class numbers that belong to each channel.")
    shared: list[str] = _told("bundle", "Parameter groups that are averaged; in a federation the strategy's.")
    personal: list[str] = _told("bundle", "Parameter groups that stay at the site; in a federation the strategy's.")
    max_epochs: int = _told("bundle", "Of a training alone, not of a federation.", "epochs", ge=1, le=MOST_EPOCHS)
    val_interval: int = _told("bundle", "Between validations of a training alone.", "epochs", ge=1, le=MOST_EPOCHS)
    learning_rate: float = _told("bundle", "Of a training alone, not of a federation.", gt=0, le=10)


@dataclass(frozen=True)
class Setting:
    """What is told of a setting.

    Attributes:
        name: its id in the bundle's configuration.
        meaning: one sentence.
        unit: "" for none.
        allowed: its type and range, in words.
        by: who may set it.
    """

    name: str
    meaning: str
    unit: str
    allowed: str
    by: By


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "object": "names with values",
    "null": "null",
}


def _in_words(schema: Mapping[str, Any]) -> str:
    """Type and range of a JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        items = schema["items"]
        return f"a list of some of {', '.join(items['enum'])}, each once" if "enum" in items else "a list"
    words = _TYPES[schema["type"]]
    least, above, most = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if most is not None:
        words += f" from {least} to {most}" if above is None else f" above {above}, at most {most}"
    return words + (f", a multiple of {schema['multipleOf']}" if "multipleOf" in schema else "")


@cache
def all_settings() -> dict[str, Setting]:
    """Every setting by name, in the order in which they are told."""
    settings = {}
    for name, schema in Settings.model_json_schema()["properties"].items():
        if name == "checkpoint":
            schema = {**schema, "enum": ["default", *CHECKPOINTS]}
        other = next((f" Also `{other}`." for other, own_name in ALIASES.items() if own_name == name), "")
        settings[name] = Setting(name, schema["description"] + other, schema["unit"], _in_words(schema), schema["by"])
    return settings


#: Names of the settings that a job may override.
JOB_SETTINGS = tuple(name for name, setting in all_settings().items() if setting.by == "job")


def checked(overrides: Any) -> dict[str, Any]:
    """The settings that a job overrides, by the names that the bundles have for them.

    Args:
        overrides: literal values by name, or by one of `ALIASES`; None for none.

    Raises:
        PFedSAMError: E18 for anything else, for a setting that is not a job's, or for a value outside its type and
            range: the setting, its value and what is allowed are named; E32 for a setting under both of its names.
    """
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise PFedSAMError(
            ErrorCode.OVERRIDE_NOT_ALLOWED, f"overrides are {shown(overrides)}, expected names with values.", _LIST
        )
    overrides = by_one_name(overrides, ALIASES)
    for name in overrides:
        if name not in JOB_SETTINGS:
            raise _not_for_a_job(name)
    try:
        Settings.model_validate(dict(overrides))
    except ValidationError as error:
        raise _wrong(str(error.errors()[0]["loc"][0]), overrides) from None
    if overrides.get("checkpoint", "default") not in ("default", *CHECKPOINTS):
        raise _wrong("checkpoint", overrides)
    return dict(overrides)


def require_literals(content: Mapping[str, Any], where: str) -> list[str]:
    """Check the settings that a bundle's own configuration gives as literals; expressions are left to MONAI.

    Args:
        content: the top level of a bundle's `train.json`.
        where: the file, for the sentence.

    Returns:
        Names of the settings that were checked.

    Raises:
        PFedSAMError: E29 naming the setting, its value and what is allowed.
    """
    expression = ("$", "@", "%")
    given = {name: content[name] for name in all_settings() if content.get(name) is not None}
    given = {name: value for name, value in given.items() if not str(value).startswith(expression)}
    try:
        Settings.model_validate(given)
    except ValidationError as error:
        setting = all_settings()[str(error.errors()[0]["loc"][0])]
        problem = f"{where}: setting '{setting.name}' is {shown(given[setting.name])}, expected {setting.allowed}."
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, problem, _LIST) from None
    return list(given)


def by_one_name(given: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Values under our names for what may have two.

    Args:
        given: values by name.
        aliases: our names by others.

    Raises:
        PFedSAMError: E32 if something is given under both names.
    """
    for other, own_name in aliases.items():
        if other in given and own_name in given:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION, f"'{other}' and '{own_name}' are one setting.", "Give one of them."
            )
    return {aliases.get(name, name) if isinstance(name, str) else name: value for name, value in given.items()}


def require_together(settings: Mapping[str, Any], where: str) -> None:
    """Refuse values that are right each by itself, but not together.

    Args:
        settings: of a bundle, with the overrides on top. What is no literal, as an expression of MONAI, is not looked
            at: it is checked when the network is built.
        where: the bundle, for the sentence.

    Raises:
        PFedSAMError: E18 naming both settings and their values.
    """
    backbone = settings.get("backbone")
    if not isinstance(backbone, str) or backbone not in BLOCKS:
        backbone = None
    size, blocks, top_k, experts = (
        value if type(value) is int else None
        for value in (settings.get(key) for key in ("image_size", "adapted_blocks", "top_k", "experts"))
    )
    wrong = []
    if backbone and size is not None and size % MULTIPLES[backbone]:
        wrong.append(f"image_size is {size}, backbone '{backbone}' needs a multiple of {MULTIPLES[backbone]}")
    if backbone and blocks is not None and blocks > BLOCKS[backbone]:
        wrong.append(f"adapted_blocks is {blocks}, backbone '{backbone}' has {BLOCKS[backbone]}")
    if experts and top_k is not None and top_k > experts:
        wrong.append(f"top_k is {top_k}, but there are {experts} experts")
    named = CHECKPOINTS.get(str(settings.get("checkpoint")))
    # vit_test has random weights, whatever is named
    if named and backbone not in (None, "vit_test", named.backbone):
        wrong.append(f"checkpoint is '{settings['checkpoint']}' of backbone '{named.backbone}', not of '{backbone}'")
    if wrong:
        raise PFedSAMError(
            ErrorCode.OVERRIDE_NOT_ALLOWED, f"bundle '{where}': {'; '.join(wrong)}.", "Change one of them with --set."
        )


def _not_for_a_job(name: Any) -> PFedSAMError:
    setting = all_settings().get(name) if isinstance(name, str) else None
    if setting is not None:
        return PFedSAMError(
            ErrorCode.OVERRIDE_NOT_ALLOWED, f"override {name!r} is not allowed: only a {setting.by} sets it.", _LIST
        )
    close = difflib.get_close_matches(str(name), JOB_SETTINGS, n=1)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return PFedSAMError(
        ErrorCode.OVERRIDE_NOT_ALLOWED,
        f"override {shown(name)} is not allowed: there is no such setting.",
        f"{hint}{_LIST}",
    )


def _wrong(name: str, overrides: Mapping[str, Any]) -> PFedSAMError:
    setting = all_settings()[name]
    unit = f" ({setting.unit})" if setting.unit else ""
    return PFedSAMError(
        ErrorCode.OVERRIDE_NOT_ALLOWED,
        f"override '{name}' is {shown(overrides[name])}, expected {setting.allowed}{unit}.",
        _LIST,
    )
