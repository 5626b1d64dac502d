"""How a site finds out what it keeps: settings."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from pfedsam.ranges import MOST_EPOCHS
from pfedsam.training.extra_losses import Factor, Number, Settings, Whole
from pfedsam.training.phase import Phase

MOST_STEPS = 100_000
Length = Annotated[Whole, Field(ge=1, le=MOST_EPOCHS)]


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
