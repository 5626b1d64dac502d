"""What a site decides for itself: `local/pfedsam.json` in its NVFlare workspace. No job can change it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfedsam.errors import PFedSAMError
from pfedsam.parameters import GROUPS

SITE_SETTINGS = "pfedsam.json"
#: Where a site takes the data root from if its settings have none.
DATA_VARIABLE = "PFEDSAM_DATA"

#: What `pfedsam site init` writes into a hospital's kit where neither it nor the person says something else.
KIT_DEFAULTS: dict[str, Any] = {"least_validation_cases": 5, "least_sites": 3}


class SiteSettings(BaseModel):
    """The site's own settings.

    Attributes:
        data_root: folder that holds the site folder `<data_root>/<site name>`, or is the site folder itself.
        state_root: where the personal state is kept; see `pfedsam.state.state_root`.
        checkpoint: path of SAM's base weights at this site; by default the environment variable PFEDSAM_CHECKPOINT,
            else the weights folder (see `pfedsam models`).
        device: `auto` or a torch device.
        threads: of torch; by default one in a simulation, where the sites share the cores, else torch's own.
        labels: what this site's label values mean, for example {"3": "disc", "4": "cup"}; None: the bundle's numbers.
        federations: names of the federations that this site has agreed to; None for any.
        may_share: parameter groups that this site is willing to share; None sets no limit but the code's.
        largest_clip, least_noise: a job must clip this site's update to a norm of at most so much, and add noise of at
            least so many times that (see `pfedsam.federated.privacy`); None asks for nothing.
        curves: whether losses, validation Dice and shares of gates and experts are sent as scalars for curves; None:
            in a simulation only, where nothing leaves the machine.
        least_validation_cases: with fewer validation cases no Dice leaves the site, in no result and no scalar.
        least_sites: in a federation of fewer sites this site does not take part, see `pfedsam.federated.least_sites`;
            None for any number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_root: str | None = None
    state_root: str | None = None
    checkpoint: str | None = None
    device: str | None = None
    threads: int | None = Field(None, ge=1)
    labels: dict[str, str] | None = None
    federations: tuple[str, ...] | None = None
    may_share: tuple[str, ...] | None = None
    largest_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    least_noise: float | None = Field(None, gt=0, allow_inf_nan=False)
    curves: bool | None = None
    least_validation_cases: int = Field(1, ge=1)
    least_sites: int | None = Field(None, ge=1)


def site_settings(fl_ctx: FLContext) -> SiteSettings:
    """The settings of the site that runs the job; all defaults if it has no file.

    Raises:
        PFedSAMError: E01 naming the file and the wrong key.
    """
    return read_settings(Path(fl_ctx.get_engine().get_workspace().get_site_config_dir()) / SITE_SETTINGS)


def read_settings(path: Path) -> SiteSettings:
    """The settings in a file; all defaults if there is none.

    Raises:
        PFedSAMError: E01 naming the file and the wrong key.
    """
    if not path.exists():
        return SiteSettings()
    try:
        settings = SiteSettings.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PFedSAMError("E01", f"{path} could not be read ({type(error).__name__}).", "Check its mode.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        known = sorted(SiteSettings.model_fields)
        raise PFedSAMError("E01", f"{path}: {key}: {first['msg']}.", f"Keys: {known}.") from None
    unknown = [group for group in settings.may_share or () if group not in GROUPS]
    if unknown:
        raise PFedSAMError("E01", f"{path}: 'may_share' names {unknown}.", f"Give some of {list(GROUPS)}.")
    return settings


def require_agreed(federation: str, settings: SiteSettings) -> None:
    """Refuse a federation that the site has not agreed to.

    Raises:
        PFedSAMError: E21 naming it.
    """
    if settings.federations is not None and federation not in settings.federations:
        raise PFedSAMError(
            "E21",
            f"the job is of federation '{federation}', this site has agreed to {list(settings.federations)}.",
            f"Ask who submitted it, or add the name to 'federations' in local/{SITE_SETTINGS}.",
        )


def site_folder(data_root: str | None, site: str) -> Path:
    """The site folder under a data root, or under the environment variable PFEDSAM_DATA if there is none.

    Raises:
        PFedSAMError: E01 if neither is given, E02 if there is no site folder.
    """
    data_root = data_root or os.environ.get(DATA_VARIABLE)
    if not data_root:
        raise PFedSAMError(
            "E01",
            f"local/{SITE_SETTINGS} has no data_root, and the environment variable {DATA_VARIABLE} is not set.",
            f"Set one of them, for example: export {DATA_VARIABLE}=$PWD/runs/phantom (made by `pfedsam phantom`).",
        )
    root = Path(os.path.expanduser(data_root))
    for folder in (root / site, root):
        if (folder / "images").is_dir():
            return folder
    raise PFedSAMError(
        "E02", f"neither {root / site} nor {root} is a site folder.", "A site folder holds images/ and labels/."
    )
