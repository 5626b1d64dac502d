"""A strategy is data: which groups of tensors have which role, and the list of phases of local training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pfedsam.parameters import Roles
from pfedsam.ranges import MOST_ROUNDS
from pfedsam.training.download_settings import Downloads
from pfedsam.training.extra_losses import Number, Settings, Whole
from pfedsam.training.judgement import JUDGING
from pfedsam.training.load_settings import Load
from pfedsam.training.phase import Name, Phase
from pfedsam.training.reported_weights import REPORTED
from pfedsam.training.server_settings import ServerStep
from pfedsam.training.serving import Serving
from pfedsam.training.style_settings import Augment

MOST_PHASES = 20


class Strategy(Settings):
    """Roles, phases of a round, and the phases after the last aggregation.

    Attributes:
        name: of the strategy, for logs and tables.
        shared: groups that are averaged (see `pfedsam.parameters.GROUPS`).
        personal: groups that stay at the site.
        phases: the phases of one round, in order.
        final: the phases after the last aggregation; they may train personal tensors only, as nothing is sent.
        interpolation: alpha, where on the way from the global model (0) to the personal one as the final phases left it
            (1) the one lies that the site keeps: the tensors in which the two differ, the experts' last layers or the
            site's copy of the shared ones, are interpolated linearly (WiSE-FT: Wortsman et al., arXiv 2109.01903). Less
            than 1 is for sites with few cases, whose personal model follows them too closely. [ours]
        serving: None keeps what `interpolation` says; else the site itself finds out how long its final phase runs and
            where on that way the model lies that it keeps, or whether the global one is better, see `Serving`.
        validate_every: the global model is validated before the training of every such round; the last theta always is.
        aggregation: how the sites' updates become one, see `pfedsam.training.aggregation`: `norm_clipped`, the weighted
            mean in which no site owns more than its share; `mean`, every claim as it is; `trimmed_mean`, `median`,
            `krum`; or, for LoRA's factors, with the bounds of `norm_clipped`: `svd`, the weighted mean of the products,
            factored again to the same rank; `alternate`: B in even rounds and A in odd ones, so that the mean is exact.
        weights: of the sites in the mean: by `cases`, or `uniform`, which also keeps the number of cases at the site:
            nothing that is sent tells it then. So does `dro`, by which sites count the more the worse the global model
            has been on their validation cases, see `pfedsam.training.site_weights`; and `gaa`, by which they count the
            more the further their training moves the predictions, a number that each then sends, see
            `pfedsam.training.gap_weights`.
        augment: what comes behind the bundle's own augmentations of a slice, in all phases. None: nothing.
        load: how much of the global model a site loads at the start of a round, the rest being its own of the last
            round, which then is its personal model. None: all of it.
        server: what the server does with the mean of the updates. None: it adds it.
        downloads: what each site downloads. None: all get the same, the mean.
    """

    LATER = frozenset({"load", "server", "downloads"})

    name: Name = "pfedsam"
    shared: tuple[str, ...] = ("lora_a", "lora_b", "decoder_subset")
    personal: tuple[str, ...] = ("experts",)
    phases: tuple[Phase, ...] = Field((), max_length=MOST_PHASES)
    final: tuple[Phase, ...] = Field((), max_length=MOST_PHASES)
    interpolation: Number = Field(1.0, gt=0, le=1)
    serving: Serving | None = None
    validate_every: Whole = Field(1, ge=1, le=MOST_ROUNDS)
    aggregation: Literal["norm_clipped", "mean", "trimmed_mean", "median", "krum", "svd", "alternate"] = "norm_clipped"
    weights: Literal["cases", "uniform", "dro", "gaa"] = "cases"
    augment: Augment | None = None
    load: Load | None = None
    server: ServerStep | None = None
    downloads: Downloads | None = None

    @model_validator(mode="after")
    def _roles_are_possible(self) -> Strategy:
        _ = self.roles
        return self

    @model_validator(mode="after")
    def _weights_count(self) -> Strategy:
        if self.weights in REPORTED and self.aggregation not in JUDGING:
            raise ValueError(
                f"weights '{self.weights}' need one of {list(JUDGING)}: "
                "'mean' is NVFlare's own, and rules by rank ignore weights"
            )
        return self

    @model_validator(mode="after")
    def _downloads_are_means(self) -> Strategy:
        if self.downloads is None:
            return self
        if self.aggregation not in (means := ("norm_clipped", "mean")):
            raise ValueError(f"'downloads' mix models by weights, so 'aggregation' must be one of {list(means)}")
        if self.weights not in (weights := ("cases", "uniform")):
            raise ValueError(
                f"'downloads' need weights {list(weights)}: '{self.weights}' are of one model for all sites"
            )
        if not self.shared:
            raise ValueError("'downloads' are of shared tensors, and there are none")
        return self

    @model_validator(mode="after")
    def _server_steps_along_a_mean(self) -> Strategy:
        if self.server is None:
            return self
        if self.aggregation not in (means := ("norm_clipped", "mean")):
            raise ValueError(f"'server' goes on along a mean, so 'aggregation' must be one of {list(means)}")
        if self.downloads is not None or not self.shared:
            what = "'downloads' give each site another" if self.downloads else "nothing is shared"
            raise ValueError(f"'server' is for one model of all sites, but {what}")
        return self

    @model_validator(mode="after")
    def _final_trains_personal_only(self) -> Strategy:
        wrong = [phase.name for phase in self.final if "shared" in phase.trains]
        if wrong:
            raise ValueError(f"final phase(s) {wrong} train shared tensors, but nothing is sent after them")
        return self

    @model_validator(mode="after")
    def _warms_up_in_rounds_alone(self) -> Strategy:
        wrong = [phase.name for phase in (*self.final, *self._alone) if phase.warm_up is not None]
        if wrong:
            raise ValueError(f"'warm_up' of {wrong}: it is for the first rounds, and these run after the last")
        return self

    @model_validator(mode="after")
    def _interpolates_what_has_two_ends(self) -> Strategy:
        others = [group for group in self.personal if group != "experts"]
        if self.interpolation < 1 and (others or not self.final):
            what = f"{others} are in no global model" if others else "there is no final phase"
            raise ValueError(f"interpolation is between the global model and a final personal one, but {what}")
        return self

    @model_validator(mode="after")
    def _serves_what_can_be_compared(self) -> Strategy:
        if self.serving is None:
            return self
        others = [group for group in self.personal if group != "experts"]
        if self.interpolation < 1:
            raise ValueError(
                "serving finds out where between the global model and the personal one; leave interpolation out"
            )
        if len(self.final) != 1 or others:
            what = (
                f"{others} are in no global model" if others else f"there are {len(self.final)} final phases, not one"
            )
            raise ValueError(f"serving compares the models of one final phase with the global one, but {what}")
        return self

    @model_validator(mode="after")
    def _loads_what_is_shared(self) -> Strategy:
        if self.load is None:
            return self
        others = [phase.name for phase in self.phases if phase.trains != ("shared",) or phase.experts]
        others += [phase.name for phase in self.final if "copy" not in phase.trains]
        if others or self.serving or not self.shared:
            raise ValueError(
                "with 'load' the rounds train the shared tensors alone, without experts, final phases the copy, and "
                f"there is no 'serving': see {others or 'serving' if self.shared else 'shared'}"
            )
        if self.aggregation == "alternate":
            raise ValueError("with 'load' a factor that is not trained differs between the sites: no 'alternate'")
        return self

    @property
    def roles(self) -> Roles:
        """The roles of the groups (E16 if they are impossible)."""
        return Roles(self.shared, self.personal)

    def rounds_alone(self) -> Strategy | None:
        """The rounds without the final phases, if nothing personal takes part in them, else None.

        Strategies that differ in what is personal only then have the same rounds, and the same global model.
        """
        if any(phase.trains != ("shared",) or phase.experts or phase.distillation for phase in self.phases):
            return None
        if self.load is not None:
            return None
        phases = tuple(
            phase.model_copy(update={"name": f"global_{number}" if number else "global"})
            for number, phase in enumerate(self.phases)
        )
        alone = {"name": "rounds", "personal": (), "phases": phases, "final": (), "interpolation": 1.0, "serving": None}
        return self.model_copy(update=alone)

    @property
    def final_epochs(self) -> tuple[int, ...]:
        """Epochs of each run of a final phase, those of a cross-fit included."""
        if self.serving is None:
            return tuple(phase.epochs for phase in self.final)
        return self.serving.runs()

    @property
    def every_phase(self) -> tuple[Phase, ...]:
        """Those of a round, the final ones, and that of the site alone."""
        return (*self.phases, *self.final, *self._alone)

    @property
    def learns_from_unlabelled(self) -> bool:
        """Whether a phase trains on cases without a label."""
        return any(phase.learns_from_unlabelled for phase in self.every_phase)

    @property
    def needs_unshared(self) -> bool:
        """Whether a site needs the tensors of a network that no federation has trained."""
        return bool(self._alone or self.load) or any(phase.asks_base for phase in self.every_phase)

    @property
    def has_copy(self) -> bool:
        """Whether a site keeps a copy of the shared tensors of its own."""
        return bool(self._alone or self.load) or any("copy" in phase.trains for phase in (*self.phases, *self.final))

    @property
    def _alone(self) -> tuple[Phase, ...]:
        return (self.serving.alone,) if self.serving and self.serving.alone else ()

    @property
    def tells_gap(self) -> bool:
        """Whether a site reports how far its training has moved the predictions."""
        return self.weights == "gaa"

    @property
    def keeps(self) -> bool:
        """Whether a site has a personal model beside the global one."""
        return bool(self.personal) or self.has_copy

    @property
    def remembers(self) -> bool:
        """Whether a site takes anything of its own from one round to the next: a personal model or moments."""
        return self.keeps or any(phase.keep_moments for phase in self.phases)

    @property
    def rounds_are_personal(self) -> bool:
        """Whether the rounds, and not only the final phases, train a personal model beside the global one."""
        own = self.load is not None or any(set(phase.trains) - {"shared"} for phase in self.phases)
        return bool(self.shared) and own

    def frozen_this_round(self, round_number: int) -> frozenset[str]:
        """Groups that are not trained in a round though they are shared."""
        if self.aggregation != "alternate":
            return frozenset()
        return frozenset({"lora_a"} if round_number % 2 == 0 else {"lora_b"})
