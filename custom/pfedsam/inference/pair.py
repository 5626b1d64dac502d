"""A global model and a site's experts as one model."""

from __future__ import annotations

from pathlib import Path

import torch

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.parameters import TensorSpec
from pfedsam.storage.global_model import read_global_model, round_of
from pfedsam.storage.site_model import SiteModel, read


def pair(global_model: Path, state: Path, mix: bool = False) -> SiteModel:
    """Put a global model beside a site's personal tensors, without the optimiser's moments.

    Args:
        global_model: file of the shared tensors.
        state: of the site.
        mix: take a global model that the experts were not trained beside. It costs Dice, silently.

    Raises:
        PFedSAMError: E10 to E13 if a file is wrong, E11 if they are of different base weights, E12 if the global model
            is not the one that the experts were trained beside.
    """
    model = read(state)
    expected = {n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in model.shared.items()}
    theta, fingerprint = read_global_model(global_model, expected)
    if fingerprint != model.info.get("fingerprint"):
        raise PFedSAMError(
            ErrorCode.OTHER_BASE_WEIGHTS,
            f"{global_model} is of base weights {fingerprint[:12]}, {state} of "
            f"{str(model.info.get('fingerprint'))[:12]}.",
            "Take the model of a job of the same bundle and settings.",
        )
    same = all(torch.equal(theta[name], tensor) for name, tensor in model.shared.items())
    if not same and not mix:
        raise PFedSAMError(
            ErrorCode.SHARED_TENSORS,
            f"the experts in {state} (round {model.info.get('round')}) were trained beside another global model than "
            f"{global_model} (round {round_of(global_model)}).",
            "Fit them anew with `pfedsam personalize --global`, or mix the two knowingly with --mix.",
        )
    return SiteModel(theta, model.personal, {}, {**model.info, "mixed": not same})
