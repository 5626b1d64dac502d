"""The global model that a new site starts from, out of whatever a federation has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_safetensors
from pfedsam.parameters import Manifest, check_state
from pfedsam.storage.global_model import FINGERPRINT, about_of, read_global_model, round_of
from pfedsam.storage.job_plan import PLAN_FILE, plan_arguments
from pfedsam.storage.run_models import chosen_training, find_run_model, trainings_of
from pfedsam.storage.site_model import read
from pfedsam.storage.state_list import list_states

#: What the server of a federation, and `simulate`, write.
GLOBAL_MODEL = "global_model.safetensors"


@dataclass(frozen=True)
class GlobalStart:
    """A global model, and what it tells of itself.

    Attributes:
        file: a global model, or a site's model, whose shared part it is then.
        bundle: name of the bundle, None if nothing tells it.
        overrides: settings of the bundle that its network was built with.
        round: the last round that was aggregated into it.
        of_site: whether the file is a site's model.
    """

    file: Path
    bundle: str | None
    overrides: dict[str, Any]
    round: int
    of_site: bool

    def tensors(self, expected: Manifest) -> tuple[dict[str, Tensor], str]:
        """The shared tensors by name, and the base fingerprint.

        Args:
            expected: names, shapes and dtypes that they must have.

        Raises:
            PFedSAMError: E10 or E13 if the file cannot be read, E12 if the tensors do not fit.
        """
        if not self.of_site:
            return read_global_model(self.file, expected)
        model = read(self.file)
        check_state(model.shared, expected, code=ErrorCode.SHARED_TENSORS, what=f"global model in {self.file}")
        return model.shared, str(model.info.get("fingerprint"))


def find_start(path: Path, strategy: str | None = None, seed: int | None = None) -> GlobalStart:
    """The global model that a path means.

    Args:
        path: a `global_model.safetensors`; a site's state or model; the folder of a `simulate` or of a `compare`.
        strategy, seed: of a comparison; each may be left out if there is one only.

    Raises:
        PFedSAMError: E10 or E13 if there is none or it cannot be read, E32 for a strategy or a seed where there is no
            comparison, or for a model that shares nothing.
    """
    file = _file(path, strategy, seed)
    if not file.is_file():
        message = f"there is no global model {path}."
        raise PFedSAMError(
            ErrorCode.WRONG_CHECKPOINT,
            message,
            f"Give the {GLOBAL_MODEL} of a federation, or the folder of a finished `pfedsam simulate` or `compare`.",
        )
    if _is_global(file):
        bundle, overrides = _told_beside(file)
        return GlobalStart(file, bundle, overrides, round_of(file), of_site=False)
    model = read(file)
    if not model.shared:
        message = f"{file} shares nothing: it was trained alone (strategy '{model.info.get('strategy')}')."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Take the model of a strategy with a global one.")
    bundle, overrides = _told(model.info)
    number = model.info.get("round")
    return GlobalStart(file, bundle, overrides, number if type(number) is int else 0, of_site=True)


def _file(path: Path, strategy: str | None, seed: int | None) -> Path:
    """The file that a path means. The shared part is the same at all sites of a training: any site's model will do."""
    if not path.is_dir():
        return path
    trainings = trainings_of(path)
    if trainings:
        return next(iter(chosen_training(path, trainings, strategy, seed).models.values()))
    if (path / GLOBAL_MODEL).is_file() and strategy is None and seed is None:
        return path / GLOBAL_MODEL
    return find_run_model(path, None, strategy, seed, shared=True)[0]


def _is_global(file: Path) -> bool:
    try:
        return FINGERPRINT in read_safetensors(file)[1]
    except ValueError:
        return False


def _told_beside(file: Path) -> tuple[str | None, dict[str, Any]]:
    """Bundle and settings of a global model: what its file tells, else a site's state or the job's plan beside it."""
    if about := about_of(file):
        return _told(about)
    for entry in list_states(file.parent / "state"):
        if entry.info:
            return _told(entry.info)
    if (file.parent / "config" / PLAN_FILE).is_file():
        return _told(plan_arguments(file.parent))
    return None, {}


def _told(info: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    bundle, overrides = info.get("bundle"), info.get("overrides")
    return bundle if isinstance(bundle, str) else None, dict(overrides) if isinstance(overrides, dict) else {}
