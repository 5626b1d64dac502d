"""A bundle's training workflow, built on the data of one site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser, ConfigWorkflow

from pfedsam.bundles import TRAIN, find_bundle, literals_of, local_settings
from pfedsam.data.expected import label_map_of
from pfedsam.data.sections import UNLABELLED
from pfedsam.data.sites import write_split
from pfedsam.errors import ErrorCode, PFedSAMError, failing_as
from pfedsam.networks.model import SegmentAnything
from pfedsam.parameters import Roles, trains_encoder
from pfedsam.training.feature_store import store_settings
from pfedsam.training.precision import slow_precision
from pfedsam.training.preparation import Preparation
from pfedsam.training.style_settings import Augment
from pfedsam.training.trainer import PhaseTrainer

#: Which cases are in which section, for people; in the output folder, which stays at the site.
SPLIT_FILE = "split.json"
#: Where a bundle has its augmentations, and the setting that says how many variants of a slice there are.
RANDOM, VARIANTS = "train#random_transforms", "augmentations"


@dataclass(frozen=True)
class Workflow:
    """What a bundle has built for a site.

    Attributes:
        network: that is trained and validated.
        trainer, evaluator: engines on it.
        cases, validation_cases: the items that they load.
        seed: of the split and of all draws.
    """

    network: SegmentAnything
    trainer: PhaseTrainer
    evaluator: Any
    cases: list[Any]
    validation_cases: list[Any]
    seed: int


def open_workflow(
    bundle: str,
    folder: Path,
    roles: Roles,
    output_dir: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    checkpoint: str | None = None,
    feature_store: str | Path | None = None,
    case_limit: int | None = None,
    label_map: Mapping[str, str] | None = None,
    prepared: str | Path | None = None,
    unlabelled: bool = False,
    augment: Augment | None = None,
) -> Workflow:
    """Build a bundle's training workflow on a site's data, and write down the split in `output_dir`.

    Args:
        bundle, folder, output_dir, overrides, device, checkpoint, feature_store, label_map, prepared: see
            `pfedsam.training.site.SiteTrainer`.
        roles: of the groups; they say whether the trunk of the network is frozen.
        case_limit: at most so many training cases, or None for all.
        unlabelled: also load the cases without a label that may be trained on, after the others.
        augment: of the strategy: what comes behind the bundle's own augmentations.

    Raises:
        PFedSAMError: E28 if there is no such bundle; E32 if it has no augmentations that `augment` could come behind;
            else with the code of whatever is wrong in data, weights or configuration.
    """
    root, told = find_bundle(bundle), f"bundle '{bundle}' could not be started"
    with failing_as(ErrorCode.BUNDLE_FAILED, told, "Try it alone: monai.bundle run."):
        settings: dict[str, Any] = {
            "bundle_root": str(root),
            "dataset_dir": str(folder),
            "output_dir": str(output_dir),
        }
        settings |= {"train#handlers": "$[]", "validate#handlers": "$[]"}  # the round validates, not the epochs
        settings |= store_settings(feature_store) | augmentations(bundle, overrides, augment)
        label_map = label_map_of(folder, bundle, label_map)
        settings |= Preparation(bundle, overrides, label_map, prepared).settings()
        if label_map is not None:
            settings["label_map"] = label_map
        if case_limit is not None or unlabelled:
            listed = "datalist(@dataset_dir, '{}', seed=@seed, folds=@folds)"
            cases = f"{listed.format('training')}[:{case_limit}]"
            settings["train#data_list"] = f"${cases}" + (f" + {listed.format(UNLABELLED)}" if unlabelled else "")
        if device != "auto":
            settings["device"] = f"$torch.device({device!r})"
        workflow = ConfigWorkflow(
            config_file=str(root / "configs" / "train.json"),
            meta_file=str(root / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type="train",
            **{**settings, **local_settings(overrides, checkpoint), **slow_precision(bundle, overrides, device)},
        )
        workflow.initialize()
        parsed = workflow.parser.get_parsed_content
        trainer, evaluator = parsed("train#trainer"), parsed("validate#evaluator")
        cases, validation_cases = parsed("train#data_list"), parsed("validate#data_list")
        write_split(folder, output_dir / SPLIT_FILE, parsed("seed"), parsed("folds"))
        network = trainer.network
        network.frozen_trunk = not trains_encoder(network, roles)
    return Workflow(network, trainer, evaluator, cases, validation_cases, int(parsed("seed")))


def augmentations(bundle: str, overrides: Mapping[str, Any] | None, augment: Augment | None) -> dict[str, Any]:
    """The setting that puts a strategy's transforms behind a bundle's own; none where there are no such transforms.

    Args:
        bundle, overrides, augment: see `open_workflow`.

    Raises:
        PFedSAMError: E32 if the bundle draws no variants of a slice.
    """
    transforms = augment.transforms() if augment is not None else []
    if not transforms:
        return {}
    parser = ConfigParser()
    parser.read_config(str(find_bundle(bundle) / "configs" / TRAIN))
    own, variants = parser.get(RANDOM), literals_of(bundle, overrides).get(VARIANTS)
    if not isinstance(own, list) or variants == 1:
        missing = f"its '{VARIANTS}' is 1" if isinstance(own, list) else f"it has no list '{RANDOM}'"
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"the strategy restyles the variants of a slice, but bundle '{bundle}' draws none: {missing}.",
            f"Set {VARIANTS} to 2 or more, or leave 'augment' out of the strategy.",
        )
    return {RANDOM: [*own, *transforms]}
