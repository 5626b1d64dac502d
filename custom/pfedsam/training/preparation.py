"""How a bundle's volumes are prepared and kept: what that depends on, and the settings that make a workflow do it.

The data of a site are read once in a start: the check hands each case that it has read to `Preparation`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

import pfedsam
from pfedsam.bundles import TRAIN, find_bundle, local_settings, scripts_of
from pfedsam.data.checks import check_site
from pfedsam.data.expected import expected_by, label_map_of
from pfedsam.data.kept_volumes import KeptVolumes
from pfedsam.data.picture import Picture
from pfedsam.data.prepared import PreparedVolumes, prepared, stored_part
from pfedsam.data.site_folder import Case
from pfedsam.data.site_report import require_valid
from pfedsam.files import hash_of

#: The bundle's part that prepares a section, and the place of its dataset.
PARTS = {"training": "train", "validation": "validate"}
#: What was found of each case, in the folder of prepared volumes.
CHECKS = "checks.json"
#: Datasets of MONAI that hold all volumes in memory.
_IN_MEMORY = ("CacheDataset", "monai.data.CacheDataset")
#: What decides how a volume is prepared, beside the bundle.
_LIBRARIES = ("monai", "torch", "numpy")
_REFERENCE = re.compile(r"@([A-Za-z_][\w#:]*)")


def require_trainable(
    folder: Path,
    bundle: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    label_map: Mapping[str, str] | None = None,
    prepared: Path | None = None,
) -> None:
    """Refuse a site's data that a bundle cannot be trained on. What is read for that is prepared, if it is kept.

    Args:
        folder: site folder.
        bundle, overrides, label_map, prepared: see `pfedsam.training.site.SiteTrainer`.

    Raises:
        PFedSAMError: the first thing that is wrong with the site (E02 to E09).
    """
    label_map = label_map_of(folder, bundle, label_map)
    expected = expected_by(bundle, overrides, label_map)
    if prepared is None:
        return require_valid(check_site(folder, **expected))
    preparation = Preparation(bundle, overrides, label_map, prepared)
    return require_valid(check_site(folder, **expected, known=prepared / CHECKS, visit=preparation))


class Preparation:
    """How a bundle prepares the volumes of a site.

    Args:
        bundle: name of an installed bundle.
        overrides: see `pfedsam.training.site.SiteTrainer`.
        label_map: what the site's label values mean, None if they are the bundle's.
        folder: where prepared volumes are kept, see `pfedsam.data.kept_volumes`; None to keep none.

    Raises:
        PFedSAMError: E28 if there is no such bundle, E16 or E18 for wrong settings.
    """

    def __init__(
        self,
        bundle: str,
        overrides: Mapping[str, Any] | None = None,
        label_map: Mapping[str, str] | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.folder, self._root = None if folder is None else Path(folder), find_bundle(bundle)
        self._parser = ConfigParser()
        self._parser.read_config(str(self._root / "configs" / TRAIN))
        told = {} if label_map is None else {"label_map": dict(label_map)}
        for key, value in {**local_settings(overrides), **told}.items():
            self._parser[key] = value
        # before anything is parsed: that changes how the parser writes the configuration
        self._keys = {section: self._key(part) for section, part in PARTS.items()}

    def settings(self) -> dict[str, Any]:
        """Of the bundle's training workflow: few volumes in memory; with a folder none, and features in a file."""
        settings: dict[str, Any] = {}
        if self.folder is not None and self._parser.get("cache_dir", "none") is None:
            settings["cache_dir"] = str(self.folder)
        kept = {section: self._kept(section) for section in PARTS}
        if self._parser.get("train#dataset#_target_") == "pfedsam.data.slices.SliceDataset":
            settings["train#dataset#kept"] = kept["training"]
        if self._parser.get("validate#dataset#_target_") in _IN_MEMORY:
            settings["validate#dataset"] = {
                "_target_": f"{PreparedVolumes.__module__}.{PreparedVolumes.__qualname__}",
                "data": "@validate#data_list",
                "transform": "@validate#preprocessing",
                "kept": kept["validation"],
            }
        return settings

    def __call__(self, case: Case, section: str, image: Picture, label: Picture) -> None:
        """Prepare a case that was read, and keep it if it is not kept yet; see `pfedsam.data.checks.Visit`."""
        if case.label is None or section not in self._stores:
            return
        store, transform = self._stores[section]
        item = {"image": str(case.image), "label": str(case.label)}
        try:
            if store.find(item) is None:
                store.save(item, prepared({"image": image, "label": label}, transform))
        # it goes wrong again where the workflow loads the case, and is told there; a full disk is not tried each time
        except Exception:
            self._stores.clear()

    def _kept(self, section: str) -> dict[str, Any] | None:
        """Arguments of `KeptVolumes` for a section."""
        return None if self.folder is None else {"folder": str(self.folder), "key": self._keys[section]}

    @cached_property
    def _stores(self) -> dict[str, tuple[KeptVolumes, Any]]:
        """Where the volumes of a section are kept, and the transform that prepares them."""
        parts = {section: f"{part}#preprocessing" for section, part in PARTS.items()}
        return {
            section: (KeptVolumes(**kept), stored_part(self._parser.get_parsed_content(place))[0])
            for section, place in parts.items()
            if (kept := self._kept(section)) is not None
        }

    def _key(self, part: str) -> str:
        """Of all that decides how a part of the bundle prepares a volume: its transforms, the settings that they refer
        to, the bundle's own code, and the versions of the libraries.
        """
        places, told = [f"{part}#preprocessing"], {}
        while places:
            place = places.pop().replace("::", "#")
            if place in told:
                continue
            text = json.dumps(self._parser.get(place), default=str)
            told[place] = text
            places += _REFERENCE.findall(text)
        libraries = {name: version(name) for name in _LIBRARIES}
        return hash_of([told, scripts_of(self._root), pfedsam.__version__, libraries])[:24]
