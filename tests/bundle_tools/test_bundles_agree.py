"""Bundles agree wherever they can: what differs between two of them, or between training and inference, is listed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pfedsam.bundles import folder

BUNDLES = ("brain_lesion_mri", "fundus_disc_cup", "prostate_mri")
#: Where the prostate's bundle differs from the brain's: file, path, the brain's value, the prostate's.
DIFFERENT = [
    ("inference.json", "class_names", ["lesion"], ["prostate"]),
    ("inference.json", "field_of_view_mm", 256.0, 160.0),
    ("inference.json", "postprocessing/transforms/3/output_postfix", "lesion", "prostate"),
    ("train.json", "class_names", ["lesion"], ["prostate"]),
    ("train.json", "field_of_view_mm", 256.0, 160.0),
]
#: Where the pages about them differ: paths in metadata.json.
DESCRIBED = (
    *("name", "task", "data_source", "references", "image_classes", "label_classes", "pred_classes"),
    "network_data_format/outputs/pred/channel_def/0",
)
#: What a training and an inference have by one name and not alike, with the reason.
OWN_BY_NATURE = {
    "imports": "each names what it calls",
    "initialize": "a training sets its seed, an inference loads a model",
    "run": "one trains, one evaluates",
}


def config(bundle: str, name: str) -> Any:
    return json.loads((folder("bundles") / bundle / "configs" / name).read_text())


def differences(one: Any, other: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Paths at which two configurations differ, with both values; a list of texts or numbers is one value."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{path}/{key}")]
    if (
        isinstance(one, list)
        and isinstance(other, list)
        and len(one) == len(other)
        and any(type(x) is dict for x in one)
    ):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{path}/{number}")]
    return [] if one == other else [(path.removeprefix("/"), one, other)]


def test_the_prostates_bundle_is_the_brains_but_for_a_few_values() -> None:
    found = [
        (name, *difference)
        for name in ("evaluate.json", "inference.json", "multi_gpu_train.json", "train.json")
        for difference in differences(config("brain_lesion_mri", name), config("prostate_mri", name))
    ]
    assert found == DIFFERENT


def test_the_prostates_metadata_are_the_brains_but_for_what_describes_the_task() -> None:
    found = differences(config("brain_lesion_mri", "metadata.json"), config("prostate_mri", "metadata.json"))
    assert {path for path, _, _ in found} == set(DESCRIBED)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_an_inference_is_as_the_training_wherever_both_have_a_key(bundle: str) -> None:
    training, inference = config(bundle, "train.json"), config(bundle, "inference.json")
    # gradients that are computed twice are for training only
    assert training["network_def"].pop("checkpointing") == "@checkpointing"
    both = [key for key in inference if key in training]
    assert {key for key in both if inference[key] != training[key]} == set(OWN_BY_NATURE)
    assert {"class_names", "image_size", "network", "network_def", "val_batch_size"} <= set(both)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_an_image_is_prepared_for_inference_as_for_validation(bundle: str) -> None:
    """`SlabSpacingd` gives the numbers of `Spacingd` with less memory; a validation prepares labels, too."""

    def of_the_image(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        mine = [{**one, "keys": "image"} for one in steps if "image" in one["keys"]]
        return [{key: value for key, value in one.items() if key != "labels" or value is None} for one in mine]

    found = of_the_image(config(bundle, "inference.json")["preprocessing"]["transforms"])
    expected = of_the_image(config(bundle, "train.json")["validate"]["deterministic_transforms"])
    for one in found:
        if one["_target_"] == "pfedsam.inference.resampling.SlabSpacingd":
            one["_target_"] = "Spacingd"
    assert found == expected


@pytest.mark.parametrize("bundle", BUNDLES)
def test_an_evaluation_replaces_keys_of_the_training_and_adds_its_own(bundle: str) -> None:
    """What it adds, an inference has by the same name; an inference without a training takes the bundle's weights."""
    evaluation, inference = config(bundle, "evaluate.json"), config(bundle, "inference.json")
    added = {"model_file", "experts_on"}
    assert evaluation["experts_on"] == inference["experts_on"]
    assert evaluation["model_file"] == "$@output_dir + '/model.safetensors'"
    assert inference["model_file"] == "$default_model(@output_dir, @bundle_root)"
    assert set(evaluation) == added | {"section", "validate#data_list", "validate#handlers", "initialize", "run"}
