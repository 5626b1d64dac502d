"""What each site downloads, where not all get the same: settings of groups of similar sites and of mixtures."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pfedsam.ranges import MOST_SITES
from pfedsam.training.extra_losses import Number, Rounds, Settings, Switch, Whole
from pfedsam.training.judgement import KEPT

MOST_GROUPS = 20


class Downloads(Settings):
    """What each site downloads, see `pfedsam.training.site_downloads`.

    Attributes:
        kind: `groups`: sites whose updates point alike form a group with a theta of its own (after SPP-FGC, arXiv
            2511.10915); `mixtures`: each site has its own mixture of all (after APPLE, arXiv 2110.08394). [ours]
        warmup_rounds: so many first rounds end with the mean of all sites.
        memory: what an update counts for in the similarity, for each round that has passed since: 1 is the sum over
            all rounds, 0 the last update alone.
        groups: how many; 0 lets the eigenvalues of the similarity say it.
        most_groups: where they say it, at most so many.
        least_size: a smaller group has the mean of all sites, and so have all if that would tell the model of fewer
            sites than these.
        temperature: of mixtures: the weight of another site is as `exp(cosine / temperature)`, times what it counts.
        peers_see_models: the author of the job knows that a site may read one other site's model from what it
            downloads, as it can from a mixture or in a group of two. The file of each site must allow it, too
            (`peers_see_my_model`).
    """

    kind: Literal["groups", "mixtures"] = "groups"
    warmup_rounds: Rounds = 2
    memory: Annotated[Number, Field(ge=0, le=1)] = 0.9
    groups: Annotated[Whole, Field(ge=0, le=MOST_GROUPS)] = 0
    most_groups: Annotated[Whole, Field(ge=1, le=MOST_GROUPS)] = 4
    least_size: Annotated[Whole, Field(ge=1, le=MOST_SITES)] = KEPT
    temperature: Annotated[Number, Field(gt=0, le=100)] = 0.5
    peers_see_models: Switch = False

    @property
    def tells_models(self) -> bool:
        """Whether a site can read one other site's model from what it downloads."""
        return self.kind == "mixtures" or self.least_size < KEPT

    @model_validator(mode="after")
    def _said_so(self) -> Downloads:
        if self.tells_models and not self.peers_see_models:
            what = "a mixture" if self.kind == "mixtures" else f"a group of {self.least_size}"
            raise ValueError(
                f"{what} can tell a site the model of another; say so with 'peers_see_models': true, and each site's "
                f"own file must allow it with peers_see_my_model. Groups of at least {KEPT} do not tell it"
            )
        return self
