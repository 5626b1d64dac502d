"""Which model of a run a person means: what `simulate` and `compare` leave in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.files import read_object
from pfedsam.storage.model_files import find_model
from pfedsam.storage.state_files import info_of
from pfedsam.storage.state_list import list_states, newest_states

#: Of a comparison: the folder of all trainings, what each of them says of itself, and its models by round.
TRAININGS, TRAINING_FILE, MODELS = "trainings", "training.json", "models"
_WHICH = "Name a strategy and a seed, or give the folder of one training."


@dataclass(frozen=True)
class Training:
    """One training of a comparison.

    Attributes:
        strategy, seed: what was trained.
        held_out: a site that took no part, None if all did.
        folder: in the comparison's folder.
        models: the newest model file of each site.
    """

    strategy: str
    seed: int
    held_out: str | None
    folder: Path
    models: dict[str, Path]

    @property
    def name(self) -> str:
        """For people."""
        unseen = f", without {self.held_out}" if self.held_out else ""
        return f"{self.strategy}, seed {self.seed}{unseen}"


def trainings_of(path: Path) -> list[Training]:
    """The trainings that hold a model, in the folder of a comparison or of one training; none in any other folder.

    Raises:
        PFedSAMError: E29 if a training does not say what it is.
    """
    folders = [path] if (path / TRAINING_FILE).is_file() else sorted((path / TRAININGS).glob("*/"))
    found = [_training(folder) for folder in folders if (folder / TRAINING_FILE).is_file()]
    return sorted((one for one in found if one.models), key=lambda one: (one.strategy, one.seed, one.held_out or ""))


def find_run_model(
    path: Path, site: str | None = None, strategy: str | None = None, seed: int | None = None, *, shared: bool = False
) -> tuple[Path, str | None]:
    """The model file that a path means, and its site if that is known.

    Args:
        path: the folder of a comparison, of one of its trainings, or what `pfedsam.storage.model_files.find_model`
            takes.
        site: which site; may be left out if there is one only.
        strategy, seed: of a comparison; each may be left out if there is one only.
        shared: the global model is wanted, so that any site will do where they share the whole of it.

    Raises:
        PFedSAMError: E13 if there is no such model, or several: the sentence names them; E32 for a strategy or a seed
            where there is no comparison.
    """
    trainings = trainings_of(path)
    if not trainings:
        if strategy is not None or seed is not None:
            message = f"{path} is no comparison, so there is no strategy or seed to choose."
            raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Leave them out.")
        return find_model(path, site, shared=shared)
    training = chosen_training(path, trainings, strategy, seed)
    if site is None and (len(training.models) == 1 or (shared and _is_shared(training))):
        site = next(iter(training.models))
    if site not in training.models:
        problem = f"no model of site '{site}'" if site else f"models of {len(training.models)} sites"
        message = f"{training.folder} ({training.name}) holds {problem}."
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE, message, f"Name one. There are: {', '.join(sorted(training.models))}."
        )
    return training.models[site], site


def chosen_training(path: Path, trainings: Sequence[Training], strategy: str | None, seed: int | None) -> Training:
    """The one training that is meant (E13 if there is none or several: the sentence names them).

    Args:
        path: the folder that holds them, for the sentence.
        trainings: of `trainings_of`.
        strategy, seed: each may be left out if there is one only.
    """
    fitting = [one for one in trainings if strategy in (None, one.strategy) and seed in (None, one.seed)]
    if len(fitting) == 1:
        return fitting[0]
    problem = f"{len(fitting)} trainings" if fitting else "no such training"
    listed = "; ".join(one.name for one in fitting or trainings)
    raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{path} holds {problem}.", f"{_WHICH} There are: {listed}.")


def _is_shared(training: Training) -> bool:
    """Whether the global model is the same at all sites: nothing of it but the experts is a site's own."""
    roles = info_of(next(iter(training.models.values()))).get("roles")
    return isinstance(roles, dict) and bool(roles.get("shared")) and not set(roles.get("personal", ())) - {"experts"}


def _training(folder: Path) -> Training:
    told = read_object(folder / TRAINING_FILE, "Run the comparison again.")
    strategy, seed, held_out = (told.get(key) for key in ("strategy", "seed", "held_out"))
    if not isinstance(strategy, str) or type(seed) is not int:
        message = f"{folder / TRAINING_FILE} names no strategy and seed."
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, message, "Run the comparison again.")
    return Training(strategy, seed, held_out, folder, _models(folder))


def _models(folder: Path) -> dict[str, Path]:
    """The newest model of each site: of a training in one process by its round, of the simulator its state."""
    rounds = sorted((one for one in (folder / MODELS).glob("*/") if one.name.isdigit()), key=lambda one: int(one.name))
    models = {file.stem: file for one in rounds for file in sorted(one.glob("*.safetensors"))}
    for federation in {entry.federation for entry in list_states(folder / "state")}:
        models |= {site: entry.file for site, entry in newest_states(folder / "state", federation).items()}
    return models
