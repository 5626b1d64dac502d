"""Which model file a path means: a file, the folder of a training, a run folder or a state root."""

from __future__ import annotations

from pathlib import Path

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.storage.state_files import CURRENT, PREVIOUS
from pfedsam.storage.state_list import StateEntry, list_states, newest_states

#: What a training of one site writes in its folder.
TRAINED = "model.safetensors"
_MODELS = "Give a site's model file, the folder of a training or a finished run, or a state folder."


def find_model(path: Path, site: str | None = None, *, shared: bool = False) -> tuple[Path, str | None]:
    """The model file that a path means, and its site if that is known.

    Args:
        path: a model file, the folder of a training, a run folder, a site's state folder or a state root.
        site: which site of a run or state root; may be left out if there is one only.
        shared: the global model is wanted, so that any site will do where they share the whole of it.

    Raises:
        PFedSAMError: E13 if there is no model, no such site, or several; E32 for a site where there is one model.
    """
    model_file = only_model(path)
    if model_file is None:
        entry = _entry(path / "state" if (path / "state").is_dir() else path, site, shared)
        return entry.file, entry.site
    known = None if model_file == path or model_file.name == TRAINED else path.resolve().parent.name
    if site not in (None, known):
        message = f"{model_file} is the model of one site, so '{site}' cannot be looked for in it."
        raise PFedSAMError(ErrorCode.CONTRADICTION, message, "Leave the site out, or give the folder of the run.")
    return model_file, known


def only_model(path: Path) -> Path | None:
    """The file of a path that means one model, None for a folder that may hold those of several sites."""
    if not path.is_dir():
        return path
    return next((path / name for name in (CURRENT, PREVIOUS, TRAINED) if (path / name).is_file()), None)


def _entry(root: Path, site: str | None, shared: bool) -> StateEntry:
    """The state under a root that is meant (E13 with the sites that there are)."""
    entries = list_states(root)
    if not entries:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{root} holds no model.", _MODELS)
    listed = f"There are: {', '.join(sorted({entry.site for entry in entries}))}."
    matching = [entry for entry in entries if site in (None, entry.site)]
    if not matching:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, f"{root} holds no model of site '{site}'.", listed)
    sites, federations = {entry.site for entry in matching}, sorted({entry.federation for entry in matching})
    if len(federations) > 1:
        message = f"{root} holds models of {len(federations)} federations: {', '.join(federations)}."
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, message, "Give the state folder of one, or a file.")
    if len(sites) > 1 and (not shared or any(map(_own_groups, matching))):
        raise PFedSAMError(
            ErrorCode.PERSONAL_STATE, f"{root} holds models of {len(sites)} sites.", f"Name one. {listed}"
        )
    newest = [entry for name, entry in newest_states(root, federations[0]).items() if name in sites]
    if not newest:
        raise PFedSAMError(ErrorCode.PERSONAL_STATE, matching[0].problem, "Give a file of a backup.")
    return max(newest, key=lambda entry: (entry.info.get("round") or 0, entry.info.get("final") is True))


def _own_groups(entry: StateEntry) -> set[str]:
    """Groups of a site's tensors, beside the experts, that are in the site's global model and in no other's."""
    roles = entry.info.get("roles")
    personal = roles.get("personal") if isinstance(roles, dict) else None
    return set(personal or ()) - {"experts"}
