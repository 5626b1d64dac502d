"""The paths in the package that bundles and jobs name are a promise: users' own files name them too, so none moves."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from pfedsam import site_model
from pfedsam.bundle_tools.new import new_bundle
from pfedsam.bundles import folder
from pfedsam.deployment.allowed_classes import needed_classes
from pfedsam.storage import site_model as moved
from pfedsam.storage.job_plan import CLIENT, SERVER

#: What configurations of bundles name: classes and functions. A new one is a new promise.
OF_BUNDLES = (
    "pfedsam.data.loading.ReadImaged",
    "pfedsam.data.sites.datalist",
    "pfedsam.data.sites.result_name",
    "pfedsam.data.sites.site_images",
    "pfedsam.data.slices.EpochSampler",
    "pfedsam.data.slices.SliceChannelsd",
    "pfedsam.data.slices.SliceDataset",
    "pfedsam.data.transforms.ClassChannelsd",
    "pfedsam.data.transforms.ClassNumbersd",
    "pfedsam.data.transforms.IntensityWindowd",
    "pfedsam.data.transforms.PictureAsVolumed",
    "pfedsam.data.transforms.VolumeAsPictured",
    "pfedsam.inference.resampling.SlabSpacingd",
    "pfedsam.inference.saving.VolumeWriter",
    "pfedsam.inferers.CachedSliceInferer",
    "pfedsam.networks.sam.build_network",
    "pfedsam.site_model.default_model",
    "pfedsam.site_model.load_model",
    "pfedsam.site_model.read",
    "pfedsam.site_model.save_alone",
    "pfedsam.training.distributed.RankSampler",
    "pfedsam.training.distributed.average_gradients",
    "pfedsam.training.distributed.start_processes",
    "pfedsam.training.feature_cache.FeatureCache",
    "pfedsam.training.trainer.PhaseTrainer",
)
#: What jobs name, and what sites and servers therefore allow.
OF_JOBS = (
    "pfedsam.federated.aggregators.ProductAggregator",
    "pfedsam.federated.aggregators.RobustAggregator",
    "pfedsam.federated.aggregators.RobustModelSelector",
    "pfedsam.federated.encryption.DecryptModel",
    "pfedsam.federated.encryption.EncryptUpdate",
    "pfedsam.federated.encryption.EncryptedGuard",
    "pfedsam.federated.encryption.EncryptedStatePersistor",
    "pfedsam.federated.filters.IncomingGuard",
    "pfedsam.federated.filters.PersonalisedFilter",
    "pfedsam.federated.final_phase.FinalPersonalPhase",
    "pfedsam.federated.learner.PFedSAMLearner",
    "pfedsam.federated.least_sites.LeastSites",
    "pfedsam.federated.packing.PackPayload",
    "pfedsam.federated.packing.UnpackPayload",
    "pfedsam.federated.persistor.SharedStatePersistor",
    "pfedsam.federated.plan.Plan",
    "pfedsam.federated.privacy.ClipAndNoise",
    "pfedsam.federated.scalars.ListedScalars",
)
_IMPORT = re.compile(r"\bfrom (pfedsam[\w.]*) import (\w+)")
_PATH = re.compile(r"\bpfedsam(?:\.\w+)+")


def named(folders: Path) -> set[str]:
    """Paths in the package that the configurations under a folder name, in any text."""
    found: set[str] = set()
    for config in folders.rglob("*.json"):
        text = config.read_text()
        json.loads(text)
        found |= {".".join(pair) for pair in _IMPORT.findall(text)} | set(_PATH.findall(_IMPORT.sub("", text)))
    return found


def test_bundles_name_what_is_promised_and_nothing_else(tmp_path: Path) -> None:
    assert named(folder("bundles")) == set(OF_BUNDLES)
    new_bundle("grey", ["a"], "mri", tmp_path)
    new_bundle("colour", ["a"], "rgb", tmp_path)
    assert named(tmp_path) <= set(OF_BUNDLES)


def test_jobs_name_what_is_promised_and_nothing_else() -> None:
    allowed = {name for side in (SERVER, CLIENT) for name in needed_classes(side)}
    assert named(folder("jobs")) | {name for name in allowed if name.startswith("pfedsam.")} == set(OF_JOBS)


@pytest.mark.parametrize("path", [*OF_BUNDLES, *OF_JOBS])
def test_what_is_promised_is_there(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert callable(getattr(import_module(module), name))


def test_a_name_of_before_is_the_same_object() -> None:
    assert all(
        getattr(site_model, name) is getattr(moved, name) for name in ("SiteModel", "read", "save_alone", "write")
    )
