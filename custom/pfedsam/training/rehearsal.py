"""Load a site's first training batch and first validation case as training does, without a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from pfedsam.bundles import find_bundle, local_settings
from pfedsam.data.checks import SiteReport
from pfedsam.errors import PFedSAMError, first_of_ours

#: What is loaded: the first item of a data loader of the bundle's training configuration.
_LOADERS = {"training": "train", "validation": "validate"}


def rehearse(report: SiteReport, bundle: str, folder: str | Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Load a training case whose foreground is seen, as a batch, and a validation case through the bundle's transforms.

    The time is that of two cases, however many the site has. What goes wrong is added to the report as an error.

    Args:
        report: of the site, without errors.
        bundle: name of an installed bundle.
        folder: the site folder.
        overrides: of the bundle, as in training.
    """
    for section, part in _LOADERS.items():
        rows = [row for row in report.cases if row.section == section]
        row = next((row for row in rows if row.foreground > row.unseen), rows[0] if rows else None)
        if row is None:
            continue
        try:
            parser = _parser(bundle, folder, part, row.name, overrides)
            batch = next(iter(parser.get_parsed_content(f"{part}#dataloader")))
            shapes = ", ".join(f"{key} {tuple(batch[key].shape)}" for key in ("image", "label"))
            report.loaded.append(f"{section}: {shapes}")
        # a bundle's own transform may raise anything
        except Exception as error:
            found = first_of_ours(error) or PFedSAMError(
                "E05",
                f"case '{row.name}' passes the checks, but bundle '{bundle}' cannot load it for {section}: "
                f"{type(error).__name__}: {_last_line(error)}.",
                "Look at the case and at the bundle's transforms; another bundle may fit (--bundle).",
            )
            report.add_error(found, row.name)


def _parser(bundle: str, folder: str | Path, part: str, case: str, overrides: Mapping[str, Any] | None) -> Any:
    """The bundle's training configuration with one case in the data list of one part."""
    root = find_bundle(bundle)
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "train.json"))
    listed = parser.get(f"{part}#data_list")
    parser["bundle_root"], parser["dataset_dir"] = str(root), str(folder)
    parser[f"{part}#data_list"] = f"$[item for item in {listed.removeprefix('$')} if item['case'] == {case!r}]"
    for key, value in local_settings(overrides).items():
        parser[key] = value
    return parser


def _last_line(error: BaseException) -> str:
    """What the library that raised first says."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
