"""The one train step that serves every strategy: MONAI's trainer, run phase by phase."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from pfedsam.data.known import known_loss, settled
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.prompts import training_boxes
from pfedsam.parameters import Role, Roles, base_state, group_of, set_trainable, short, trains_encoder
from pfedsam.training.added import AddedLosses, Batch
from pfedsam.training.alignment import Contrast
from pfedsam.training.alignment_settings import Episode
from pfedsam.training.episode import add_outer_gradient
from pfedsam.training.feature_cache import TRAINING, FeatureCache
from pfedsam.training.optimiser import Moments, learning_rate, names_by_factor, phase_optimizer
from pfedsam.training.phase import Phase
from pfedsam.training.round_result import PhaseReport
from pfedsam.training.style import Style

logger = logging.getLogger(__name__)


class PhaseTrainer(SupervisedTrainer):
    """Trains the current phase of a strategy. The bundle owns data, loss and kind of optimiser.

    Args:
        phase: settings of the phase that `run` trains until `set_phase` sets another: how a bundle trains alone.
        shared: groups of the shared tensors.
        personal: groups of the personal tensors.
        feature_cache: cache of the frozen trunk, or None.
        amp: bfloat16 autocast on the network's device, CPU or CUDA.
        exclusive: the channels are exclusive classes, the first is the background (softmax); else each is a class of
            its own (sigmoid).
        box_probability: share of the labelled images that get a box around the label as a prompt, see
            `pfedsam.networks.prompts.training_boxes`.
        kwargs: of `monai.engines.SupervisedTrainer`; `network` must be a `SegmentAnything`, and batches must hold
            `image`, `label` and `index`.
    """

    def __init__(
        self,
        *,
        phase: dict[str, Any],
        shared: list[str],
        personal: list[str],
        feature_cache: FeatureCache | None = None,
        amp: bool = False,
        exclusive: bool = False,
        box_probability: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.network: SegmentAnything
        self.autocast, self.exclusive = amp, exclusive
        self.feature_cache, self.box_probability = feature_cache, box_probability
        self.should_stop: Callable[[], bool] = lambda: False
        self._template: Optimizer = self.optimizer
        self._moments = Moments()
        #: Tensors of the network that no federation has trained, for a phase that asks the base SAM.
        self.base: Mapping[str, Tensor] = {}
        self.roles = Roles(tuple(shared), tuple(personal))
        if (alone := Phase.of({"epochs": self.state.max_epochs, **phase})).asks_base:
            self.base = base_state(self.network, self.roles)
        self.add_event_handler(Events.EPOCH_STARTED, PhaseTrainer._draw)
        self.add_event_handler(Events.ITERATION_STARTED, PhaseTrainer._poll)
        self.set_phase(alone, self.roles)

    def set_phase(
        self,
        phase: Phase,
        roles: Roles,
        round_number: int = 0,
        number: int = 0,
        *,
        frozen_this_round: Collection[str] = (),
        anchor: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare `run` to train one phase.

        Args:
            phase: what trains, and how.
            roles: the strategy's roles of the groups.
            round_number: of the federation; it seeds the draws.
            number: of the phase in its round; phases of a round draw the same slices when they have the same number of
                epochs, so that their features are computed once.
            frozen_this_round: groups that are not trained this time, whatever their role.
            anchor: theta as received, for the proximal loss.
        """
        self.phase, self.roles, self.round, self.number = phase, roles, round_number, number
        self.report = PhaseReport()
        self.network.set_experts(phase.experts)
        # a site's copy of the shared tensors is trained in their place
        trained: set[Role] = {"shared" if role == "copy" else role for role in phase.trains}
        set_trainable(self.network, roles, trained)
        for name, parameter in self.network.named_parameters():
            if group_of(name) in frozen_this_round:
                parameter.requires_grad_(False)
        parameters = {name: one for name, one in self.network.named_parameters() if one.requires_grad}
        by_factor = names_by_factor(phase, list(parameters))
        self._trained = [name for names in by_factor.values() for name in names]
        if not parameters:
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"phase '{phase.name}' trains {list(phase.trains)}, but no tensor of the network has that role.",
                "Give the strategy groups that the network has, or leave the phase out.",
            )
        if (phase.warm_up or phase.adversary) and not any(name.startswith("image_encoder.") for name in parameters):
            raise PFedSAMError(
                ErrorCode.CONTRADICTION,
                f"phase '{phase.name}' has {'warm_up' if phase.warm_up else 'adversary'}, but trains nothing in the "
                f"encoder.",
                "Let it train LoRA, or leave the key out.",
            )
        self.optimizer = phase_optimizer(self._template, phase, parameters, by_factor)
        if phase.keep_moments:
            self._moments.restore(self.optimizer, self._trained)
        self.network.frozen_trunk = not trains_encoder(self.network, roles)
        self._added = AddedLosses(
            self.network,
            phase,
            (round_number, number),
            loss=self.loss_function,
            anchor=anchor or {},
            base=self.base,
            exclusive=self.exclusive,
            autocast=self._autocast,
        )
        self._contrast = self._warm_up()
        self._style = Style(phase, self.network, (round_number, number), self.box_probability)
        self.state.epoch = self.state.iteration = 0
        self.state.max_epochs = phase.epochs

    def run(self) -> None:  # type: ignore[override]
        """Train the current phase.

        Raises:
            PFedSAMError: E17 if the loss, a gradient or, at the end, a trained tensor is not finite; E16 if the
                optimiser has nothing to train.
        """
        if self.phase.epochs == 0:
            return
        self._draw_unlabelled(self._unlabelled_share())
        try:
            super().run()
            self._require_finite_parameters()
        except BaseException:
            reset(self)
            raise
        finally:
            self._draw_unlabelled(0.0)
        self.report.teacher_passes = self._added.teacher_passes
        self.report.distilled_steps = self._added.distilled_steps
        self._added.tell()
        if self.phase.keep_moments:
            self._moments.keep(self.optimizer, self._trained)
        if self.feature_cache is not None:
            logger.info(self.feature_cache.summary())

    def moments(self) -> dict[str, Tensor]:
        """The kept moments of the optimiser as `<tensor>#<moment>`. They never leave the site."""
        return self._moments.flat()

    def load_moments(self, moments: dict[str, Tensor]) -> None:
        """Take back what `moments` gave."""
        self._moments.load(moments)

    def logits(self, images: Tensor, items: list[int]) -> Tensor:
        """Logits `(B, C, H, W)` of items of the training data, without boxes, with features from the cache."""
        with self._autocast():
            return self.network.head(self.features(images, items)).float()

    def features(self, images: Tensor, items: list[int]) -> Tensor:
        """Frozen features of a batch, from the cache where it has them."""
        if self.feature_cache is None or not self.network.frozen_trunk:
            return self.network.trunk(images)
        return self.feature_cache.features(self.network.trunk, images, [(TRAINING, item) for item in items])

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> dict[str, Any]:
        """One step, with boxes as prompts where the bundle asks for them."""
        images, label = self.prepare_batch(batchdata, self.state.device, self.non_blocking, **self.to_kwargs)
        items = [int(item) for item in batchdata["index"]]
        self.network.train()
        self._schedule()
        self.optimizer.zero_grad(set_to_none=True)
        boxes = training_boxes(settled(label), items, self.box_probability) if self.box_probability else None
        with self.network.prompted(boxes):
            return self._step(images, label, items)

    def _step(self, images: Tensor, label: Tensor, items: list[int]) -> dict[str, Any]:
        """Features, loss, backward, update."""
        with self._autocast():
            features = self.features(images, items)
        if self._contrast is not None:
            loss, prediction = self._contrast(features, items, self.report.steps), torch.zeros_like(label)
        else:
            loss, prediction, label = self._loss(features, images, label, items)
        value = float(loss.detach())
        self._require_finite(value, "loss is")
        self.fire_event(IterationEvents.LOSS_COMPLETED)
        loss.backward()
        if self._contrast is None and self.phase.episode is not None:
            self._add_outer_gradient(self.phase.episode, features, label)
        self.fire_event(IterationEvents.BACKWARD_COMPLETED)
        self._require_finite(self._gradient_norm(), "the norm of the gradient is")
        self.optimizer.step()
        if self._contrast is None:
            self._added.follow()
        self.report.steps += 1
        self.report.losses.append(value)
        label = settled(label)
        self.state.output = {Keys.IMAGE: images, Keys.LABEL: label, Keys.PRED: prediction.detach(), Keys.LOSS: loss}
        self.fire_event(IterationEvents.MODEL_COMPLETED)
        return self.state.output

    def _loss(self, features: Tensor, images: Tensor, label: Tensor, items: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss with all that the phase adds to it, the logits, and the label that they were compared with."""
        with self._autocast():
            styled, label = self._style(features, label, self.report.steps)
            prediction = self.network.head(styled)
            balance = self.network.balance_loss()  # before a teacher with experts runs
            self.fire_event(IterationEvents.FORWARD_COMPLETED)
        prediction = prediction.float()
        loss = known_loss(self.loss_function, prediction, label)
        batch = Batch(images, features, prediction, label, items, self.report.steps)
        return self._added(loss, batch, balance), prediction, label

    def _add_outer_gradient(self, episode: Episode, features: Tensor, label: Tensor) -> None:
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        draw = (self.round, self.number, self.report.steps)
        add_outer_gradient(self.network, trained, episode, self.loss_function, features, label, draw, self._autocast)

    def _gradient_norm(self) -> float:
        """Norm over the gradients of all that the phase trains: one fused pass, not finite if one element is not."""
        trained = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        return float(get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None]))

    def _require_finite_parameters(self) -> None:
        """Once at the end of a phase: an update can overflow although its gradient did not."""
        trained = {name: one for name, one in self.network.named_parameters() if one.requires_grad}
        spoilt = [name for name, parameter in trained.items() if not bool(torch.isfinite(parameter).all())]
        if spoilt:
            self._require_finite(math.nan, f"{short(spoilt)} hold(s)")

    def _require_finite(self, value: float, told: str) -> None:
        if not math.isfinite(value):
            raise PFedSAMError(
                ErrorCode.NOT_FINITE,
                f"phase '{self.phase.name}', round {self.round}, step {self.state.iteration}: {told} {value}.",
                "Lower the learning rate, or look at the intensities with `pfedsam validate`.",
            )

    def _unlabelled_share(self) -> float:
        if self._contrast is not None:
            return self._contrast.settings.share
        return self._added.unlabelled_share

    def _draw_unlabelled(self, share: float) -> None:
        """How many slices of unlabelled cases an epoch has, for each other slice."""
        sampler: Any = getattr(self.data_loader, "sampler", None)
        if getattr(sampler, "unlabelled_share", share) != share:
            sampler.unlabelled_share = share
            self.state.epoch_length = len(self.data_loader)  # type: ignore[arg-type]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.state.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def _warm_up(self) -> Contrast | None:
        """The loss that takes the place of all others in the first rounds of a warm-up."""
        settings = self.phase.warm_up
        if settings is None or self.round >= settings.rounds:
            return None
        return Contrast(self.network, settings, self.base, (self.round, self.number), self._autocast)

    def _schedule(self) -> None:
        """Set the learning rate of this step, see `pfedsam.training.optimiser.learning_rate`."""
        steps = self.phase.epochs * self.state.epoch_length
        rate = learning_rate(self.phase, self.round, self.state.iteration, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]

    def _draw(self) -> None:
        sampler: Any = getattr(self.data_loader, "sampler", None)
        if hasattr(sampler, "set_draw"):
            sampler.set_draw(self.round, self.state.epoch)

    def _poll(self) -> None:
        if self.should_stop():
            self.terminate()


def reset(engine: Any) -> None:
    """Let an ignite engine run again after an exception: it keeps a spent generator, and would do nothing."""
    engine._internal_run_generator = None
