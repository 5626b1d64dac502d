"""One step of local training: what trains, how long, how fast, and what is added to the loss on labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pfedsam.parameters import OWN_GROUPS
from pfedsam.ranges import MOST_EPOCHS
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
from pfedsam.training.style_settings import Mixup, PatchSwap

#: What other tools call two keys of a phase.
ALIASES = {"lr_multipliers": "rates", "proximal_mu": "proximal"}

Name = Annotated[str, Field(max_length=100)]


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

    LATER = frozenset({"warm_up", "adversary", "episode"})

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

    @property
    def asks_base(self) -> bool:
        """Whether it asks the SAM that no federation has trained."""
        return self.warm_up is not None or (self.pseudo is not None and self.pseudo.refine == "box")

    @property
    def learns_from_unlabelled(self) -> bool:
        """Whether it trains on cases without a label."""
        return self.pseudo is not None or self.warm_up is not None

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
