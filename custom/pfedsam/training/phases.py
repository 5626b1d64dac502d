"""A strategy is data: which groups of tensors have which role, and the list of phases of local training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from pfedsam.errors import PFedSAMError
from pfedsam.parameters import Roles


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From plain settings.

        Raises:
            PFedSAMError: E16 naming the first wrong key, its value and what was expected.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or cls.__name__
            raise PFedSAMError(
                "E16",
                f"{cls.__name__.lower()} setting '{where}' = {first.get('input')!r}: {first['msg']}.",
                "The settings are described in pfedsam/training/phases.py.",
            ) from None


class Distillation(_Settings):
    """Extra loss `weight * temperature^2 * KL(teacher || student)` of a phase (METHOD.md, one round, step 2).

    The teacher is the network as it is when the phase starts: with the experts off it is the global model as received
    (`global_to_local`, in a phase that trains personal tensors); with the experts on it is the last personal pair
    (`local_to_global`, in a phase that trains shared tensors); both phases with a teacher are `mutual`. [ours]

    Attributes:
        teacher: `global` (experts off) or `personal` (experts on).
        weight: lambda. [ours]
        temperature: tau, softens both distributions (Hinton et al., arXiv 1503.02531). [ours]
        band: a pixel is in the band if its label is 1, or the teacher's or the student's probability exceeds this; the
            divergence is averaged over the band and over the rest separately, 1:1, because nearly all pixels are
            background. [ours]
        warmup_rounds: rounds without distillation: an untrained teacher teaches noise. [ours]
        quality_gate: no distillation while the teacher's Dice on the training slices is below the student's. [ours]
    """

    teacher: Literal["global", "personal"] = "global"
    weight: float = Field(0.5, ge=0)
    temperature: float = Field(2.0, gt=0)
    band: float = Field(0.05, gt=0, lt=1)
    warmup_rounds: int = Field(2, ge=0)
    quality_gate: bool = True


class Phase(_Settings):
    """One step of local training.

    Attributes:
        name: for logs and curves.
        trains: roles whose parameters are trained.
        experts: whether the experts are on in the student.
        epochs: passes over one drawn epoch of slices.
        learning_rate: of the bundle's optimiser in this phase.
        keep_moments: go on with the optimiser's moments of the last round (personal tensors) or start anew (shared).
        warmup_rounds: in these first rounds the learning rate rises linearly from a tenth over the phase's steps.
        distillation: the extra loss, or None.
        balance: weight of the experts' load-balance loss, where only the top k gates count.
    """

    name: str
    trains: tuple[Literal["shared", "personal"], ...] = Field(min_length=1)
    experts: bool
    epochs: int = Field(1, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    keep_moments: bool = False
    warmup_rounds: int = Field(0, ge=0)
    distillation: Distillation | None = None
    balance: float = Field(0.01, ge=0)


class Strategy(_Settings):
    """Roles, phases of a round, and the phases after the last aggregation.

    Attributes:
        name: of the strategy, for logs and tables.
        shared: groups that are averaged (see `pfedsam.parameters.GROUPS`).
        personal: groups that stay at the site.
        phases: the phases of one round, in order.
        final: the phases after the last aggregation; they may train personal tensors only, as nothing is sent.
        validate_every: the global model is validated before the training of every such round; the last theta always is.
    """

    name: str = "pfedsam"
    shared: tuple[str, ...] = ("lora_a", "lora_b", "decoder_subset")
    personal: tuple[str, ...] = ("experts",)
    phases: tuple[Phase, ...] = ()
    final: tuple[Phase, ...] = ()
    validate_every: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _roles_are_possible(self) -> Strategy:
        _ = self.roles
        return self

    @model_validator(mode="after")
    def _final_trains_personal_only(self) -> Strategy:
        wrong = [phase.name for phase in self.final if phase.trains != ("personal",)]
        if wrong:
            raise ValueError(f"final phase(s) {wrong} train shared tensors, but nothing is sent after them")
        return self

    @property
    def roles(self) -> Roles:
        """The roles of the groups (E16 if they are impossible)."""
        return Roles(self.shared, self.personal)
