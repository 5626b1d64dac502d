"""A strategy is data: which groups of tensors have which role, and the list of phases of local training."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from pfedsam.parameters import OWN_GROUPS, Roles
from pfedsam.ranges import MOST_EPOCHS, MOST_ROUNDS
from pfedsam.settings import by_one_name
from pfedsam.training.alignment_settings import Adversary, Episode, WarmUp
from pfedsam.training.extra_losses import (
    LARGEST_FACTOR,
    LARGEST_RATE,
    Distillation,
    Factor,
    Number,
    PseudoLabels,
    Rounds,
    Settings,
    Smoothness,
    Switch,
    Whole,
)
from pfedsam.training.judgement import JUDGING
from pfedsam.training.load_settings import Load
from pfedsam.training.reported_weights import REPORTED
from pfedsam.training.style_settings import Augment, Mixup, PatchSwap

#: What other tools call two keys of a phase.
ALIASES = {"lr_multipliers": "rates", "proximal_mu": "proximal"}

MOST_PHASES, MOST_STEPS = 20, 100_000
Name = Annotated[str, Field(max_length=100)]
Length = Annotated[Whole, Field(ge=1, le=MOST_EPOCHS)]


class Phase(Settings):
    """One step of local training.

    Attributes:
        name: for logs and curves.
        trains: roles whose parameters are trained; `copy` is the site's own copy of the shared tensors, which starts as
            the global model and is a part of the personal state.
        experts: whether the experts are on in the student.
        epochs: passes over one drawn epoch of slices.
        learning_rate: of the bundle's optimiser in this phase.
        rates: factors of the learning rate by group of tensors, 1 for those that are not named: what is pretrained,
            such as the decoder, takes a lower rate than LoRA [ours], and LoRA's B, which starts at zero, a higher one
            than its A (LoRA+: Hayou et al., arXiv 2402.12354).
        keep_moments: go on with the optimiser's moments of the last round (personal tensors) or start anew (shared).
        warmup_rounds: in these first rounds the learning rate rises linearly from a tenth over the phase's steps.
        decay: the learning rate is multiplied by this once for every round before (exponential decay).
        inverse_time_decay: d in `rate / (1 + d * rounds before)`, a fall that fits few rounds and many. On sites that
            differ, averaging comes to rest with a rate that falls so (Li et al., arXiv 1907.02189).
        anneal: `cosine`: within the phase the learning rate falls to zero as half a cosine over its steps (SGDR without
            restarts: Loshchilov and Hutter, arXiv 1608.03983).
        distillation: the extra loss, or None.
        pseudo: what is learnt from voxels of which no label says what they are: of cases without a label, which are
            drawn for this phase alone, and of weak labels. None: nothing.
        smooth: the loss that lets a prediction change where the image does, on images with such voxels, or None.
        patch_swap: patches of the features take mean and spread of other patches of the batch. None: they do not.
        mixup: images of a batch and their masks are mixed by pairs. None: they are not.
        warm_up: the first rounds train without labels, on all images. None: none does.
        adversary: a discriminator of styles that the encoder is trained against. None: there is none.
        episode: each step also looks at another style behind it. None: it does not.
        balance: weight of the experts' load-balance loss, where only the top k gates count.
        proximal: mu of the extra loss `mu / 2 * ||w - theta||^2`, w what is trained of the shared tensors or of their
            copy, theta as received (FedProx: Li et al., arXiv 1812.06127; Ditto: Li et al., arXiv 2012.04221).

    `rates` may also be written `lr_multipliers`, and `proximal` `proximal_mu`.
    """

    name: Name
    trains: tuple[Literal["shared", "personal", "copy"], ...] = Field(min_length=1, max_length=2)
    experts: Switch
    epochs: Whole = Field(1, ge=0, le=MOST_EPOCHS)
    learning_rate: Number = Field(1e-3, gt=0, le=LARGEST_RATE)
    rates: dict[str, Annotated[Number, Field(gt=0, le=LARGEST_FACTOR)]] = Field(default_factory=dict)
    keep_moments: Switch = False
    warmup_rounds: Rounds = 0
    decay: Number = Field(1.0, gt=0, le=1)
    inverse_time_decay: Factor = 0.0
    anneal: Literal["none", "cosine"] = "none"
    distillation: Distillation | None = None
    pseudo: PseudoLabels | None = None
    smooth: Smoothness | None = None
    patch_swap: PatchSwap | None = None
    mixup: Mixup | None = None
    warm_up: WarmUp | None = None
    adversary: Adversary | None = None
    episode: Episode | None = None
    balance: Factor = 0.01
    proximal: Factor = 0.0

    @model_validator(mode="before")
    @classmethod
    def _by_one_name(cls, given: Any) -> Any:
        return by_one_name(given, ALIASES) if isinstance(given, dict) else given

    @field_validator("rates")
    @classmethod
    def _of_groups(cls, rates: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(rates) - set(OWN_GROUPS))
        if unknown:
            raise ValueError(f"no group(s) {unknown}; there are {list(OWN_GROUPS)}")
        return rates

    @model_validator(mode="after")
    def _copy_alone(self) -> Phase:
        if "copy" in self.trains and "shared" in self.trains:
            raise ValueError("a phase trains the shared tensors or the site's copy of them, not both")
        return self

    @model_validator(mode="after")
    def _mixed_alone(self) -> Phase:
        keys = ("distillation", "pseudo", "smooth", "episode")
        others = [key for key in keys if getattr(self, key) is not None]
        if self.mixup is not None and others:
            raise ValueError(f"mixup and {others} in one phase: a mixed image is none that a teacher has seen")
        return self


class Serving(Settings):
    """How a site finds out what it keeps after the final phase. [ours]

    Models on the way of the final phase are compared with the global one, patient by patient, on patients that they
    were not fitted to: on the validation cases (`pfedsam.training.by_validation`), which the global model has not seen
    either; or, with folds, by cross-fit on the training patients (`pfedsam.training.cross_fit`), which the global model
    was trained on, so that it wins more often than it should. Where no gain stands out, the global model is kept.

    Attributes:
        folds: 0: the validation cases decide, and the final phase runs once. Else the number of folds of a cross-fit,
            at most one a patient: for each the final phase is run without its patients.
        epochs: after how many epochs of the final phase a model is compared. The largest takes the place of the phase's
            own `epochs`; the phase is stopped after those that were chosen, with the learning rates of the largest.
        alphas: which of the models between the global one (0) and the personal one (1) are compared.
        margin: the mean gain over the global model must be more than so many of its standard errors; else the global
            model is kept: the rule of one standard error (Breiman et al., Classification and Regression Trees, 1984).
        spread: standard deviation of patients' gains that is expected before any is seen. It counts as much as one
            patient: a site with one or two validation patients can choose, too. 0: of one patient nothing follows.
        least_steps: a site with few slices makes few steps in an epoch. Where the largest of `epochs` is fewer steps
            than these, all are multiplied by the one whole number that makes them as many; those of `alone` likewise.
        alone: a phase that trains the site's copy of the shared tensors from where the first round of a federation
            begins: the model that the site would have by itself, at the end of this phase, is compared, too. None: it
            is not.
    """

    folds: Whole = Field(0, ge=0, le=10)
    epochs: tuple[Length, ...] = Field((2, 4, 8), min_length=1, max_length=10)
    alphas: tuple[Annotated[Number, Field(gt=0, le=1)], ...] = Field(
        (0.25, 0.5, 0.75, 1.0), min_length=1, max_length=10
    )
    margin: Factor = 1.0
    spread: Annotated[Number, Field(ge=0, le=1)] = 0.05
    least_steps: Annotated[Whole, Field(ge=0, le=MOST_STEPS)] = 0
    alone: Phase | None = None

    @field_validator("folds")
    @classmethod
    def _leaves_some(cls, folds: int) -> int:
        if folds == 1:
            raise ValueError("one fold leaves no patient to train on; 0 is for the validation cases")
        return folds

    @model_validator(mode="after")
    def _alone_is_alone(self) -> Serving:
        if self.alone and (self.alone.trains != ("copy",) or self.alone.experts or self.alone.distillation):
            raise ValueError("'alone' trains the copy, without experts and without a teacher: nothing is the others'")
        return self

    def runs(self) -> tuple[int, ...]:
        """Epochs of each run of a phase: in each fold, and at last of what was chosen, at most; or once."""
        longest, alone = max(self.epochs), (self.alone.epochs,) if self.alone else ()
        return (longest, *alone) * self.folds + (max((longest, *alone)),) if self.folds else (longest, *alone)

    def stretched(self, steps: int, most_epochs: int | None = None) -> Serving:
        """As it is at a site, see `least_steps`.

        Args:
            steps: of an epoch at the site.
            most_epochs: of all runs together, or None for no limit: what the site's own settings allow.
        """

        def factor(epochs: int) -> int:
            needed = ceil(self.least_steps / (epochs * steps))
            allowed = needed if most_epochs is None else most_epochs // sum(self.runs())
            return max(1, min(needed, allowed, MOST_EPOCHS // epochs))

        change: dict[str, Any] = {"epochs": tuple(epochs * factor(max(self.epochs)) for epochs in self.epochs)}
        if self.alone:
            longer = self.alone.epochs * factor(self.alone.epochs)
            change["alone"] = self.alone.model_copy(update={"epochs": longer})
        return self.model_copy(update=change)


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
    """

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
    def _final_trains_personal_only(self) -> Strategy:
        wrong = [phase.name for phase in self.final if "shared" in phase.trains]
        if wrong:
            raise ValueError(f"final phase(s) {wrong} train shared tensors, but nothing is sent after them")
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

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A strategy that does not use it is told, and hashed, as before there was a load."""
        told: dict[str, Any] = handler(self)
        if told.get("load") is None:
            told.pop("load", None)
        return told

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
    def learns_from_unlabelled(self) -> bool:
        """Whether a phase trains on cases without a label."""
        return any(phase.pseudo is not None or phase.warm_up is not None for phase in (*self.phases, *self.final))

    @property
    def needs_unshared(self) -> bool:
        """Whether a site needs the tensors of a network that no federation has trained."""
        alone = self.load is not None or (self.serving is not None and self.serving.alone is not None)
        return alone or any(
            phase.warm_up is not None or (phase.pseudo is not None and phase.pseudo.refine == "box")
            for phase in (*self.phases, *self.final)
        )

    @property
    def has_copy(self) -> bool:
        """Whether a site keeps a copy of the shared tensors of its own."""
        alone = self.load is not None or (self.serving is not None and self.serving.alone is not None)
        return alone or any("copy" in phase.trains for phase in (*self.phases, *self.final))

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
