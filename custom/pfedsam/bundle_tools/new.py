"""A bundle for the user's own task, made of one of ours: configuration and a page, no code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from pfedsam.bundle_tools.mirroring import without_mirroring
from pfedsam.bundles import folder
from pfedsam.errors import ErrorCode, PFedSAMError

Modality = Literal["mri", "grey", "rgb"]

#: What a bundle for a modality is made of.
TEMPLATES: dict[str, str] = {"mri": "brain_lesion_mri", "grey": "fundus_disc_cup", "rgb": "fundus_disc_cup"}
#: In place of the scaling of colours: what is white in an X-ray differs from device to device.
_GREY_WINDOW = {"_target_": "pfedsam.data.transforms.IntensityWindowd", "keys": "image", "lower": 0.5, "upper": 99.5}
_UNCHANGED = ("LICENSE", "configs/logging.conf")
_CONFIGS = ("train.json", "inference.json", "evaluate.json", "multi_gpu_train.json")


def new_bundle(
    name: str, classes: Sequence[str], modality: Modality, out: Path, nested: bool = False, mirrored: bool = False
) -> Path:
    """Write a bundle.

    Args:
        name: of the bundle; it becomes the folder's name.
        classes: names of the classes; label value n is the n-th, 0 is background.
        modality: `mri` for grey volumes, `grey` for grey pictures, `rgb` for colour pictures.
        out: folder to write `<name>` into.
        nested: each class lies inside the one before (disc and cup); else they are beside each other.
        mirrored: classes mirror each other, as left and right lung: no training image is mirrored left to right then,
            since the left lung of a mirrored image would be labelled as a left one and look like a right one.

    Returns:
        The bundle's folder.

    Raises:
        PFedSAMError: E16 for a name that is no identifier or double classes, E28 for an unknown modality, E24 for a
            folder that exists.
    """
    check_names(name, classes, modality)
    target = out / name
    if target.exists():
        raise PFedSAMError(ErrorCode.NOT_OURS, f"{target} exists.", "Choose another name, or remove it.")
    source = folder("bundles") / TEMPLATES[modality]
    (target / "configs").mkdir(parents=True)
    (target / "docs").mkdir()
    for file in _UNCHANGED:
        shutil.copy(source / file, target / file)
    last = len(classes)
    values = [list(range(n, last + 1)) if nested else [n] for n in range(1, last + 1)]
    for config in _CONFIGS:
        content = json.loads((source / "configs" / config).read_text())
        if "class_names" in content:
            content["class_names"] = list(classes)
        if "class_values" in content:
            content["class_values"] = values
        if modality == "grey":
            content = _windowed(content)
        if mirrored and config == "train.json":
            without_mirroring(content)
        if config == "inference.json":
            content["postprocessing"]["transforms"][-1]["output_postfix"] = "label"
        (target / "configs" / config).write_text(pretty(content))
    metadata = _metadata(
        json.loads((source / "configs" / "metadata.json").read_text()), name, classes, nested, modality
    )
    (target / "configs" / "metadata.json").write_text(pretty(metadata))
    page = Environment(loader=PackageLoader("pfedsam.bundle_tools", "."), undefined=StrictUndefined, autoescape=False)
    context = {"name": name, "classes": list(classes), "modality": modality, "nested": nested, "metadata": metadata}
    context["mirrored"] = mirrored
    (target / "docs" / "README.md").write_text(page.get_template("README.md.j2").render(context) + "\n")
    return target


def check_names(name: str, classes: Sequence[str], modality: str) -> None:
    """Refuse names that no bundle can have.

    Raises:
        PFedSAMError: E16 for a name that is no identifier or double classes, E28 for an unknown modality.
    """
    words = [name, *classes]
    if modality not in TEMPLATES:
        raise PFedSAMError(
            ErrorCode.UNKNOWN_NAME, f"there is no modality '{modality}'.", f"Modalities: {', '.join(TEMPLATES)}."
        )
    if not classes or len(set(classes)) < len(classes) or not all(word.isidentifier() for word in words):
        raise PFedSAMError(
            ErrorCode.WRONG_SETTING,
            f"name and classes are {words}.",
            "Give plain, different words: letters, digits, _.",
        )


def _windowed(node: Any) -> Any:
    """A configuration that scales between percentiles what the template scales from 0 to 255."""
    if isinstance(node, dict):
        scales = node.get("_target_") == "ScaleIntensityRanged"
        return dict(_GREY_WINDOW) if scales else {key: _windowed(value) for key, value in node.items()}
    return [_windowed(value) for value in node] if isinstance(node, list) else node


def _metadata(
    metadata: dict[str, Any], name: str, classes: Sequence[str], nested: bool, modality: Modality
) -> dict[str, Any]:
    task = f"Segmentation of {', '.join(classes)} by a personalised, federated Segment Anything Model"
    metadata |= {
        "version": "0.1.0",
        "changelog": {"0.1.0": "first version"},
        "name": name,
        "task": task,
        "data_source": "site folders of the user",
        "label_classes": ", ".join(f"{n}: {class_name}" for n, class_name in enumerate(["background", *classes])),
        "pred_classes": f"{len(classes)} channel(s) of logits, one a class"
        + (", each inside the last" if nested else ""),
        "eval_metrics": {},
    }
    if modality == "grey":
        metadata["description"] = metadata["description"].replace("A fundus photograph goes", "A grey picture goes")
        metadata["image_classes"] = "one grey channel, three times, scaled by the picture's percentiles"
        metadata["network_data_format"]["inputs"]["image"]["channel_def"] = dict.fromkeys("012", "grey")
    elif modality == "rgb":
        metadata["description"] = metadata["description"].replace("A fundus photograph goes", "A colour picture goes")
        metadata["image_classes"] = "three channels of a colour picture in [0, 1]"
    output = metadata["network_data_format"]["outputs"]["pred"]
    output |= {
        "num_channels": len(classes),
        "channel_def": {str(n): class_name for n, class_name in enumerate(classes)},
    }
    return metadata


def pretty(content: Any) -> str:
    """JSON as people write it: short lists on one line."""
    short = re.compile(r"\[\s+([^\[\]{}]*?)\s+\]")

    def joined(match: re.Match[str]) -> str:
        line = "[" + re.sub(r"\s*\n\s*", " ", match.group(1)) + "]"
        return line if len(line) < 100 else match.group(0)

    return short.sub(joined, json.dumps(content, indent=4, ensure_ascii=False)) + "\n"
