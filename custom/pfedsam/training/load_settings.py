"""How a site loads the global model at the start of a round: settings of the soft load."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pfedsam.training.extra_losses import Number, Settings, Whole

Share = Annotated[Number, Field(ge=0, le=1)]


class Load(Settings):
    """A site begins a round with `m * global + (1 - m) * own`, unit by unit (after FCA, arXiv 2504.18020).

    Own is what the site's training of the last round has left. It is the site's copy of the shared tensors, and stays
    there with m; who knows the global model can compute it from the update, as in every federation. Theirs: the
    formula, a binary and a smooth m. [ours]: the unit, one rank of a LoRA pair or another tensor as a whole; how m
    follows from the drift, since only text was at hand; and that the update that is sent is the difference to the
    global model as received, so that the mean of the sites' models is exact.

    Attributes:
        mode: what m is. `smooth`: 1 minus the unit's drift; `binary`: 1 up to `threshold` of drift and 0 above;
            `share`: `share` for all units; `learned`: from 1 on, by steps down the loss on the site's training slices
            (as the adaptive load of FedICRA, arXiv 2304.05635). The drift is from 0, own as global, to 1, see
            `pfedsam.training.drift`.
        share: m in mode `share`. 1: a site begins with the global model, as in `fedavg_lora`; 0: it goes on with its
            own, as alone, with the rates of the phase.
        threshold: of the drift in mode `binary`.
        steps: batches in mode `learned`, at most.
        rate: by how much a step in mode `learned` moves the m on which the loss depends most. [ours]
    """

    mode: Literal["smooth", "binary", "share", "learned"] = "smooth"
    share: Share = 1.0
    threshold: Share = 0.5
    steps: Annotated[Whole, Field(ge=1, le=1000)] = 8
    rate: Annotated[Number, Field(gt=0, le=1)] = 0.25
