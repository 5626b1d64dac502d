"""What a number depends on, as hashes, and which code on which machine made it: for keys of runs and their cards."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.bundles import LOAD_MODEL, LOAD_MODEL_BEFORE, OVERRIDES, find_bundle, folder, scripts_of, settings_of
from pfedsam.data.site_folder import Split
from pfedsam.files import content_hash, hash_of
from pfedsam.networks.backbones import get_backbone
from pfedsam.networks.weights import CHECKPOINTS

#: Settings that change nothing but speed or memory.
INDIFFERENT = ("cache_limit_gb", "val_batch_size", "checkpointing")
#: A setting that could not be overridden when records were made: a bundle's own value is in none of their hashes. A run
#: that overrides it has another key.
LATER = ("field_of_view_mm",)
#: Folders of the source tree on which the numbers depend.
_CODE = ("custom", "jobs", "bundles")


def split_hash(splits: Mapping[str, Split]) -> str:
    """Hash of which case is in which section, by site."""
    case_names = {site: {s: [c.name for c in cases] for s, cases in split.items()} for site, split in splits.items()}
    return hash_of(case_names)[:16]


def case_hash(site: str, case: str) -> str:
    """What stands for a case, or for a patient, of a site in a record.

    A pseudonym, not anonymous: who has the names, or tries all that are possible, finds the one.
    """
    return hash_of([site, case])[:12]


def weights_checksum(bundle: str, overrides: Mapping[str, Any]) -> str:
    """Checksum of the base weights; "" where they are random, or a file that is not there."""
    settings = settings_of(bundle, overrides)
    own, named = get_backbone(settings["backbone"]).checkpoint, settings.get("checkpoint", "default")
    if own is None:
        return ""
    name = own if named == "default" else named
    if name in CHECKPOINTS:
        return CHECKPOINTS[name].checksum
    return f"sha256:{content_hash(Path(name))}" if Path(name).is_file() else ""


def defaults(bundle: str) -> str:
    """Hash of a bundle's own settings, which hold wherever a run overrides none; without what is this machine's."""
    settings = settings_of(bundle)
    return hash_of({key: value for key, value in settings.items() if key not in (*INDIFFERENT, *LATER, "checkpoint")})[
        :16
    ]


def bundle_hash(name: str) -> str:
    """Hash of what a bundle does in training and evaluation; its settings are told by name, see `defaults`."""
    root = find_bundle(name)
    configs = {file: json.loads((root / "configs" / file).read_text()) for file in ("train.json", "evaluate.json")}
    # Records of weeks of training hold a hash of evaluate.json with two lines where it has one now. No recorded number
    # depends on which: `evaluate_site` calls `SiteModel.use` itself before each model, whatever `initialize` left.
    evaluate = configs["evaluate.json"]
    if "initialize" in evaluate:
        evaluate["initialize"] = _as_before(evaluate["initialize"])
    contents = {file: {k: v for k, v in content.items() if k not in OVERRIDES} for file, content in configs.items()}
    return hash_of([contents, scripts_of(root)])[:16]


def _as_before(steps: Any) -> Any:
    """Steps of a configuration, with the two lines that `LOAD_MODEL` replaced in its place."""
    if not isinstance(steps, list):
        return steps
    return [line for step in steps for line in (LOAD_MODEL_BEFORE if step == LOAD_MODEL else (step,))]


def machine() -> str:
    """Processor, system and libraries, for people; no name of the machine."""
    import monai
    import torch

    return (
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, MONAI {monai.__version__}, {torch.get_num_threads()} thread(s)"
    )


def commit() -> str:
    """Version of the source tree, or nothing for an installed package."""
    root = folder("bundles").parent
    return code_version(root) if (root / ".git").exists() else ""


def code_version(root: Path) -> str:
    """The last commit that changed the code in a source tree, with a `+` if the code differs from it, "" without git.

    Code is what is in `custom`, `jobs` and `bundles`: a new line of results makes no new version.
    """

    def git(*words: str) -> str:
        command = ("git", "--no-optional-locks", *words, "--", *_CODE)
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
