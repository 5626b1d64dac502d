"""What a site decides for itself: `local/pfedsam.json` in its NVFlare workspace. No job can change it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from nvflare.apis.fl_context import FLContext
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import write_atomically
from pfedsam.parameters import OWN_GROUPS
from pfedsam.training.strategy import Strategy

SITE_SETTINGS = "pfedsam.json"
#: Where a site takes the data root from if its settings have none.
DATA_VARIABLE = "PFEDSAM_DATA"

#: What `pfedsam site init` writes into a hospital's kit where neither it nor the person says something else.
KIT_DEFAULTS: dict[str, Any] = {
    "least_validation_cases": 5,
    "least_sites": 3,
    "most_rounds": 1000,
    "most_epochs": 100,
    "most_hours": 168,
}


#: Numbers that a strategy may ask for beside the update.
Further = Literal["pfedsam_gap"]
FURTHER: tuple[str, ...] = get_args(Further)


class SiteSettings(BaseModel):
    """The site's own settings.

    Attributes:
        data_root: folder that holds the site folder `<data_root>/<site name>`, or is the site folder itself.
        state_root: where the personal state is kept; see `pfedsam.storage.state.state_root`.
        prepared_root: folder for prepared volumes, which the next job reads in place of the images. They are pictures
            of patients: see `pfedsam.data.kept_volumes`. None keeps none, and each job prepares them anew.
        checkpoint: path of SAM's base weights at this site; by default the environment variable PFEDSAM_CHECKPOINT,
            else the weights folder (see `pfedsam models`).
        device: `auto` or a torch device.
        threads: of torch; by default one in a simulation, where the sites share the cores, else torch's own.
        labels: what this site's label values mean, for example {"3": "disc", "4": "cup"}; None: the bundle's numbers.
        federations: names of the federations that this site has agreed to; None for any.
        may_share: parameter groups that this site is willing to share; None sets no limit but the code's.
        may_tell: numbers of `pfedsam.federated.boundary.METADATA_BY_WEIGHTS` that this site is willing to tell beside
            its update, where a strategy asks for one; None sets no limit but the code's, or tells none where
            `least_noise` asks for noise, since these numbers have none. Where a site tells none, it counts as the mean
            of the others.
        largest_clip, least_noise: a job must clip this site's update to a norm of at most so much, and add noise of at
            least so many times that (see `pfedsam.federated.privacy`); None asks for nothing.
        curves: whether losses, validation Dice and shares of gates and experts are sent as scalars for curves; None:
            in a simulation only, where nothing leaves the machine.
        least_validation_cases: with fewer validation cases no Dice leaves the site, in no result and no scalar.
        least_sites: in a federation of fewer sites this site does not take part, see `pfedsam.federated.least_sites`;
            None for any number.
        peers_see_my_model: whether another site may be sent something from which it can read this site's model, as a
            mixture, or the mean of a group of two (`downloads` of a strategy); None: in a simulation only.
        most_rounds: of a job at this site; None for no limit.
        most_epochs: of all phases of one round together, and of all final phases together; None for no limit.
        most_hours: that a job may take at this site, from its first task on; None for no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_root: str | None = None
    state_root: str | None = None
    prepared_root: str | None = None
    checkpoint: str | None = None
    device: str | None = None
    threads: int | None = Field(None, ge=1)
    labels: dict[str, str] | None = None
    federations: tuple[str, ...] | None = None
    may_share: tuple[str, ...] | None = None
    may_tell: tuple[Further, ...] | None = None
    largest_clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    least_noise: float | None = Field(None, gt=0, allow_inf_nan=False)
    curves: bool | None = None
    least_validation_cases: int = Field(1, ge=1)
    least_sites: int | None = Field(None, ge=1)
    peers_see_my_model: bool | None = Field(None, strict=True)
    most_rounds: int | None = Field(None, ge=1)
    most_epochs: int | None = Field(None, ge=1)
    most_hours: float | None = Field(None, gt=0, allow_inf_nan=False)

    def allowed(self, asked: Iterable[str]) -> tuple[str, ...]:
        """What the site tells of the numbers that a strategy asks for, see `may_tell`."""
        if self.may_tell is None:
            return () if self.least_noise else tuple(asked)
        return tuple(name for name in asked if name in self.may_tell)


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
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{path} could not be read ({type(error).__name__}).", "Check its mode."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        known = sorted(SiteSettings.model_fields)
        raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{path}: {key}: {first['msg']}.", f"Keys: {known}.") from None
    unknown = [group for group in settings.may_share or () if group not in OWN_GROUPS]
    if unknown:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS, f"{path}: 'may_share' names {unknown}.", f"Give some of {list(OWN_GROUPS)}."
        )
    return settings


def require_agreed(federation: str, settings: SiteSettings) -> None:
    """Refuse a federation that the site has not agreed to.

    Raises:
        PFedSAMError: E21 naming it.
    """
    if settings.federations is not None and federation not in settings.federations:
        raise PFedSAMError(
            ErrorCode.FEDERATION_NOT_AGREED,
            f"the job is of federation '{federation}', this site has agreed to {list(settings.federations)}.",
            f"Ask who submitted it, or add the name to 'federations' in local/{SITE_SETTINGS}.",
        )


def require_unseen(strategy: Strategy, settings: SiteSettings, simulated: bool = False) -> None:
    """Refuse downloads that tell another site this site's model, if it has not agreed to that.

    Args:
        strategy: of the job.
        settings: of the site.
        simulated: whether all sites are on one machine.

    Raises:
        PFedSAMError: E35 naming what tells it.
    """
    downloads, agreed = strategy.downloads, settings.peers_see_my_model
    if downloads is None or not downloads.tells_models or (simulated if agreed is None else agreed):
        return
    what = "mixtures" if downloads.kind == "mixtures" else f"groups of {downloads.least_size}"
    raise PFedSAMError(
        ErrorCode.PEERS_WOULD_SEE,
        f"the job's downloads are {what}: another site could read this site's model.",
        f"Ask for groups of at least 3, or set 'peers_see_my_model' in local/{SITE_SETTINGS} "
        "(`pfedsam site init --peers-see-my-model`).",
    )


def require_epochs(strategy: Strategy, settings: SiteSettings) -> None:
    """Refuse a strategy that trains longer in a round, or after the last one, than the site allows.

    Raises:
        PFedSAMError: E26 naming both numbers.
    """
    in_a_round = sum(phase.epochs for phase in strategy.phases)
    for when, epochs in (("a round", in_a_round), ("the final phase", sum(strategy.final_epochs))):
        if settings.most_epochs is not None and epochs > settings.most_epochs:
            raise _too_much(f"{epochs} epochs in {when}", settings.most_epochs, "most_epochs")


def require_round(number: int, settings: SiteSettings) -> None:
    """Refuse a round, counted from 0, after the last one that the site allows.

    Raises:
        PFedSAMError: E26 naming both numbers.
    """
    if settings.most_rounds is not None and number >= settings.most_rounds:
        raise _too_much(f"round {number + 1}", settings.most_rounds, "most_rounds")


class TimeLimit:
    """Hours that a job may take at the site. Its start is kept in a file: a learner may be built anew for each task.

    Args:
        file: of the job's folder at the site; `start` writes it.
        hours: see `most_hours` of `SiteSettings`.
    """

    def __init__(self, file: Path, hours: float | None) -> None:
        self.file, self.hours = file, hours
        self._end: float | None = None

    def start(self) -> None:
        """Take the time of the job's first task, or note that it is now.

        Raises:
            PFedSAMError: E01 if the file cannot be written.
        """
        if self.hours is not None:
            self._end = self._started() + self.hours * 3600

    def over(self) -> bool:
        """Whether the time is over."""
        return self._end is not None and time.time() >= self._end

    def require_left(self) -> None:
        """Refuse to go on when the time is over.

        Raises:
            PFedSAMError: E26.
        """
        if self.over():
            raise _too_much("more time", f"{self.hours:g} hours", "most_hours")

    def _started(self) -> float:
        """In seconds of the clock."""
        try:
            return float(self.file.read_text())
        except (OSError, ValueError):
            now = time.time()
        try:
            write_atomically(self.file, f"{now}".encode())
        except OSError as error:
            raise PFedSAMError(
                ErrorCode.SITE_SETTINGS, f"{self.file} could not be written: {error}.", "Look at the disk."
            ) from None
        return now


def _too_much(asked: str, allowed: Any, key: str) -> PFedSAMError:
    return PFedSAMError(
        ErrorCode.BEYOND_LIMITS,
        f"the job asks for {asked}, this site allows {allowed}.",
        f"Ask who submitted it, or set another '{key}' in local/{SITE_SETTINGS} (see `pfedsam site init --help`).",
    )


def prepared_path(settings: SiteSettings, site: str) -> Path | None:
    """Where a site keeps its prepared volumes, None if it keeps none."""
    return None if settings.prepared_root is None else Path(settings.prepared_root).expanduser() / site


def prepared_folder(settings: SiteSettings, site: str) -> Path | None:
    """See `prepared_path`; the folder is made if need be.

    Raises:
        PFedSAMError: E01 if it cannot be made.
    """
    folder = prepared_path(settings, site)
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS,
            f"the folder of prepared volumes {folder} cannot be made: {error}.",
            f"Set another 'prepared_root' in local/{SITE_SETTINGS}, or none.",
        ) from None
    return folder


def site_folder(data_root: str | None, site: str) -> Path:
    """The site folder under a data root, or under the environment variable PFEDSAM_DATA if there is none.

    Raises:
        PFedSAMError: E01 if neither is given, E02 if there is no site folder.
    """
    data_root = data_root or os.environ.get(DATA_VARIABLE)
    if not data_root:
        raise PFedSAMError(
            ErrorCode.SITE_SETTINGS,
            f"local/{SITE_SETTINGS} has no data_root, and the environment variable {DATA_VARIABLE} is not set.",
            f"Set one of them, for example: export {DATA_VARIABLE}=$PWD/runs/phantom (made by `pfedsam phantom`).",
        )
    root = Path(os.path.expanduser(data_root))
    for folder in (root / site, root):
        if (folder / "images").is_dir():
            return folder
    raise PFedSAMError(
        ErrorCode.SITE_FOLDER,
        f"neither {root / site} nor {root} is a site folder.",
        "A site folder holds images/ and labels/.",
    )
