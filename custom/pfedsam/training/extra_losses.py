"""What a phase adds to its loss on labels: settings of the teacher, of pseudo-labels and of smoothness."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.ranges import MOST_ROUNDS

LARGEST_RATE, LARGEST_FACTOR = 10.0, 1000.0
# a text or a truth value is no number
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Factor = Annotated[Number, Field(ge=0, le=LARGEST_FACTOR)]
Rounds = Annotated[Whole, Field(ge=0, le=MOST_ROUNDS)]
Place = Annotated[Number, Field(gt=0, le=1)]
Part = Annotated[Number, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Settings from a file: no other keys, finite numbers, never changed.

    Attributes:
        LATER: keys that came later and are None unless they are given. Where they are None they are not told, so that
            runs, jobs and shared rounds of before keep their hashes and can go on.
    """

    LATER: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_what_is_off(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.LATER or value is not None}

    @classmethod
    def of(cls, settings: object) -> Self:
        """From plain settings, as they are in a JSON file.

        Raises:
            PFedSAMError: E16 naming the first wrong key, its value and what was expected.
        """
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or cls.__name__
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING,
                f"{cls.__name__.lower()} setting '{where}' = {shown(first.get('input'))}: {first['msg']}.",
                "The settings are described in jobs/README.md, under the settings of a strategy.",
            ) from None


class Distillation(Settings):
    """Extra loss `weight * temperature^2 * KL(teacher || student)` of a phase (Hinton et al., arXiv 1503.02531).

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
        by_image: the divergence on each image counts as much as the teacher's soft Dice on it: where it contradicts the
            site's labels, it says nothing. [ours]
    """

    teacher: Literal["global", "personal"] = "global"
    weight: Factor = 0.5
    temperature: Number = Field(2.0, gt=0, le=100)
    band: Number = Field(0.05, gt=0, lt=1)
    warmup_rounds: Rounds = 2
    quality_gate: Switch = True
    by_image: Switch = False


class PseudoLabels(Settings):
    """Labels that teachers give to voxels of which no label says what they are (after FGASL, arXiv 2501.07378).

    Two teachers: the model as the phase starts, in a round the global model as received, and the running average of
    what the phase trains (Tarvainen and Valpola, arXiv 1703.01780). Their mean probability is a pseudo-label where its
    entropy is among the lowest. Those that find a class and those that find none are judged apart [ours]: most voxels
    are background, and surely so. The student learns them from features of which a part is dropped.

    Attributes:
        teachers: `round`, `average`, or both.
        share: slices of cases without a label that an epoch draws for each other slice.
        weight: of the loss on pseudo-labels, which is the bundle's own.
        warmup_rounds: rounds without pseudo-labels: an untrained teacher finds nothing.
        quantile: share of the voxels whose entropy is low enough, in the first round with pseudo-labels and after
            `ramp_rounds` more.
        ramp_rounds: rounds over which the share rises.
        threshold_decay: the entropy that is low enough is a running average over the steps, of this decay.
        decay: of the average teacher's parameters, by step.
        consistency: weight of the mean squared difference between the student's probabilities with and without the
            dropped features.
        dropout: share of the features that is dropped.
        refine: `box`: the teachers' mask on an image gives a box, the base SAM segments in it, and only voxels of which
            both say the same are pseudo-labels, weighed by the Dice of the two (after SEE, arXiv 2506.08955).
        agreement: least such Dice; below it, or where the teachers find nothing, an image has no pseudo-labels.
    """

    teachers: tuple[Literal["round", "average"], ...] = Field(("average", "round"), min_length=1, max_length=2)
    share: Annotated[Number, Field(ge=0, le=20)] = 1.0
    weight: Factor = 1.0
    warmup_rounds: Rounds = 1
    quantile: tuple[Place, Place] = (0.15, 0.3)
    ramp_rounds: Rounds = 5
    threshold_decay: Part = 0.9
    decay: Part = 0.99
    consistency: Factor = 0.3
    dropout: Part = 0.3
    refine: Literal["none", "box"] = "none"
    agreement: Part = 0.5

    @model_validator(mode="after")
    def _different(self) -> PseudoLabels:
        if len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"teachers {list(self.teachers)}: one is named twice")
        return self

    def quantile_in(self, round_number: int) -> float:
        """The share of voxels in a round."""
        first, last = self.quantile
        passed = min(max(round_number - self.warmup_rounds, 0) / max(self.ramp_rounds, 1), 1.0)
        return first + (last - first) * passed


class Smoothness(Settings):
    """Losses that let a prediction change where the image does, on images with voxels that no label knows.

    Attributes:
        weight: of the gated CRF (Obukhov et al., arXiv 1906.04651).
        affinity: weight of the distance between a prediction and itself carried along what looks alike. [ours]
        rgb: standard deviation of intensities, 0 to 1, that count as alike.
        xy: standard deviation of the distance, in pixels.
        radius: neighbours up to so many pixels away.
    """

    weight: Factor = 0.1
    affinity: Factor = 0.0
    rgb: Annotated[Number, Field(gt=0, le=10)] = 0.1
    xy: Annotated[Number, Field(gt=0, le=1000)] = 6.0
    radius: Annotated[Whole, Field(ge=1, le=15)] = 5
