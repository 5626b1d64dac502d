"""The one train step: what each phase trains, that a run can be repeated, and how it ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.losses import DiceCELoss
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import Tensor
from torch.utils.data import DataLoader

from pfedsam.data.slices import EpochSampler, SliceDataset
from pfedsam.errors import PFedSAMError, first_of_ours
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, group_of, manifest, shared_state, tensors
from pfedsam.training.extra_losses import Distillation
from pfedsam.training.feature_cache import FeatureCache
from pfedsam.training.phase import Phase
from pfedsam.training.trainer import PhaseTrainer

torch.set_num_threads(1)
SIDE, CASES, BATCH = 32, 2, 4
ROLES = Roles()
#: Distillation from the first step on, whatever the teacher is worth.
ALWAYS = Distillation(weight=0.5, warmup_rounds=0, quality_gate=False)


def phase(role: str = "personal", **settings: Any) -> Phase:
    return Phase(**{"name": role, "trains": (role,), "experts": role == "personal", "learning_rate": 1e-2, **settings})


def case(number: int) -> dict[str, Tensor]:
    """A noisy volume with a bright square in four of its six slices."""
    image = torch.rand(1, SIDE, SIDE, 6, generator=torch.Generator().manual_seed(number)) * 0.3
    label = torch.zeros(1, SIDE, SIDE, 6)
    label[:, 6 + 3 * number : 18 + 3 * number, 8:20, 1:5] = 1
    return {"image": image + 0.6 * label, "label": label}


@pytest.fixture(scope="module")
def built() -> SegmentAnything:
    return build_network("vit_test", SIDE)


@pytest.fixture(scope="module")
def make(built) -> Callable[..., PhaseTrainer]:
    """Builds a trainer like a bundle does, each with its own copy of one network."""

    def trainer(
        first: Phase | None = None, *, per_case=(8, 4), workers=0, optimizer: Any = torch.optim.AdamW, **settings: Any
    ):
        network = settings.pop("network", None) or copy.deepcopy(built)
        augment = Compose(
            [RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=0), RandGaussianNoised(keys="image", std=0.02)]
        )
        data = SliceDataset([case(i) for i in range(CASES)], lambda item: dict(item), augment, variants=2)
        loader = DataLoader(data, batch_size=BATCH, sampler=EpochSampler(data, *per_case), num_workers=workers)
        return PhaseTrainer(
            **{
                "max_epochs": 1,
                "device": torch.device("cpu"),
                "train_data_loader": loader,
                "network": network,
                "loss_function": DiceCELoss(sigmoid=True, batch=True),
                "optimizer": optimizer(network.parameters(), lr=1e-3),
                "phase": (first or phase()).model_dump(),
                "shared": list(ROLES.shared),
                "personal": list(ROLES.personal),
                **settings,
            }
        )

    return trainer


@pytest.fixture(scope="module")
def good(make) -> SegmentAnything:
    """A network whose shared tensors are trained. Tests copy it."""
    trainer = make()
    trained(trainer, phase("shared", epochs=8, learning_rate=3e-2))
    return trainer.network


#: Steps of an epoch: eight slices with a label and four without.
STEPS = 12 // BATCH


def values(trainer: PhaseTrainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(trainer.network).items()}


def changed(trainer: PhaseTrainer, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in tensors(trainer.network).items() if not torch.equal(tensor, before[name])}


def trained(trainer: PhaseTrainer, *phases: Phase, round_number: int = 2) -> list[float]:
    """Train phases in order and give the losses of all steps."""
    losses: list[float] = []
    for number, current in enumerate(phases):
        trainer.set_phase(current, ROLES, round_number, number)
        trainer.run()
        losses += trainer.report.losses
    return losses


def seen_items(trainer: PhaseTrainer) -> list[list[int]]:
    """The items of each epoch, filled while it trains."""
    epochs: list[list[int]] = []
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda: epochs.append([]))
    trainer.add_event_handler(
        IterationEvents.LOSS_COMPLETED, lambda engine: epochs[-1].extend(engine.state.batch["index"].tolist())
    )
    return epochs


# what trains ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["shared", "personal"])
@pytest.mark.parametrize("distillation", [None, ALWAYS], ids=["plain", "distilled"])
def test_phase_changes_all_tensors_of_its_role_and_no_other(make, role, distillation):
    trainer = make()
    trained(trainer, phase("personal"))  # away from the start, where most gradients are zero
    before = values(trainer)
    trained(trainer, phase(role, epochs=2, distillation=distillation))
    expected = set(manifest(trainer.network, ROLES, role))
    assert changed(trainer, before) == expected


def test_phase_of_both_roles_changes_both(make):
    trainer = make()
    before = values(trainer)
    trained(trainer, phase(trains=("shared", "personal"), epochs=3))
    roles = {ROLES.of(name) for name in changed(trainer, before)}
    assert roles == {"shared", "personal"}


def test_bundle_trains_its_own_phase_without_a_federation(make):
    trainer = make(phase(trains=("shared", "personal"), epochs=3))
    trainer.run()
    assert trainer.report.steps == 3 * STEPS == trainer.state.iteration
    assert len(trainer.report.losses) == trainer.report.steps


def test_epochs_of_a_bundle_hold_where_its_phase_names_none(make):
    settings = {"name": "alone", "trains": ["personal"], "experts": True}
    trainer = make(phase=settings, max_epochs=2)
    trainer.run()
    assert trainer.report.steps == 2 * STEPS


def test_shared_and_personal_training_each_lower_the_loss(make, built, good):
    losses = trained(make(network=copy.deepcopy(built)), phase("shared", epochs=4))
    assert sum(losses[-STEPS:]) < 0.9 * sum(losses[:STEPS])
    losses = trained(make(network=copy.deepcopy(good)), phase("personal", epochs=6))
    assert sum(losses[-STEPS:]) < 0.9 * sum(losses[:STEPS])


@pytest.mark.parametrize("mu", [0.0, 50.0])
def test_proximal_loss_adds_mu_times_the_distance_to_the_anchor_to_the_gradient(make, mu):
    def gradients(anchored: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trainer = make()
        anchor = {name: tensor + 0.1 for name, tensor in shared_state(trainer.network, ROLES).items()}
        trainer.set_phase(phase("shared", proximal=mu), ROLES, 0, anchor=anchor if anchored else None)
        found: dict[str, Tensor] = {}

        def first_step() -> None:
            if not found:
                found.update({n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.requires_grad})
                trainer.terminate()

        trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, first_step)
        trainer.run()
        return found, anchor

    (plain, _), (proximal, anchor) = gradients(False), gradients(True)
    assert plain and plain.keys() == proximal.keys() == anchor.keys()
    for name in plain:
        # at the first step each tensor is 0.1 below its anchor
        wanted = plain[name] - mu * 0.1
        torch.testing.assert_close(proximal[name], wanted, rtol=1e-4, atol=1e-5)


def test_experts_are_on_as_the_phase_says(make):
    trainer = make()
    for role in ("shared", "personal"):
        trainer.set_phase(phase(role), ROLES)
        assert {layer.enabled for layer in trainer.network.expert_layers().values()} == {role == "personal"}


def test_shared_phase_does_not_depend_on_the_experts(make, built):
    network = copy.deepcopy(built)
    with torch.no_grad():
        for name, tensor in tensors(network).items():
            if group_of(name) == "experts":
                tensor.add_(1)
    assert trained(make(), phase("shared")) == trained(make(network=network), phase("shared"))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_kind_and_settings_of_the_optimiser_are_the_bundles(make, optimizer):
    trainer = make(optimizer=lambda parameters, lr: optimizer(parameters, lr=lr, weight_decay=0.25))
    trained(trainer, phase(learning_rate=3e-3, keep_moments=True))
    assert type(trainer.optimizer) is optimizer
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert trainer.optimizer.param_groups[0]["lr"] == 3e-3


def test_zero_epochs_do_nothing(make):
    trainer = make()
    before = values(trainer)
    trained(trainer, phase(epochs=0, distillation=ALWAYS, keep_moments=True))
    assert not changed(trainer, before)
    assert trainer.report.steps == 0 and trainer.report.mean_loss != trainer.report.mean_loss
    assert trainer.moments() == {}


def test_phase_with_nothing_to_train_is_refused(make):
    network = build_network("vit_test", SIDE, experts=0)
    with pytest.raises(PFedSAMError) as caught:
        trained(make(phase("shared"), network=network), phase("personal"))
    assert caught.value.code == "E32"


def test_wrong_phase_of_a_bundle_is_refused_with_its_key(make):
    with pytest.raises(PFedSAMError, match="learning_rat'") as caught:
        make(phase={"name": "alone", "trains": ["personal"], "experts": True, "learning_rat": 1})
    assert caught.value.code == "E16"


# draws and repetition -------------------------------------------------------------------------------------------------


def test_one_seed_gives_the_same_run_bit_for_bit(make):
    phases = phase(epochs=2, distillation=ALWAYS), phase("shared")
    one, two = make(), make()
    torch.manual_seed(1)
    first = trained(one, *phases)
    torch.manual_seed(2)
    assert trained(two, *phases) == first
    assert not changed(two, values(one))


@pytest.mark.parametrize("workers", [0, 1])
def test_items_of_an_epoch_are_the_draw_of_its_round_and_number(make, workers):
    trainer = make(workers=workers)
    epochs = seen_items(trainer)
    trained(trainer, phase(epochs=2), round_number=4)
    trained(trainer, phase("shared", epochs=1), round_number=5)
    sampler = EpochSampler(trainer.data_loader.dataset)
    expected = []
    for draw in ((4, 1), (4, 2), (5, 1)):
        sampler.set_draw(*draw)
        expected.append(list(sampler))
    assert epochs == expected


def test_phases_of_a_round_see_the_same_slices(make):
    trainer = make()
    epochs = seen_items(trainer)
    trained(trainer, phase(epochs=2), phase("shared", epochs=2))
    assert epochs[:2] == epochs[2:] and epochs[0] != epochs[1]


# feature cache --------------------------------------------------------------------------------------------------------


#: A round: both phases draw the same slices.
ROUND = phase(epochs=2, distillation=ALWAYS), phase("shared", epochs=2)


@pytest.fixture(scope="module")
def uncached(make) -> list[float]:
    return trained(make(), *ROUND)


@pytest.mark.parametrize("form", ["memory", "disk", "too small"])
def test_cached_training_has_the_losses_of_uncached_training(make, uncached, tmp_path, form):
    cache = FeatureCache(1e-5 if form == "too small" else 0.01, str(tmp_path) if form == "disk" else None)
    found = trained(make(feature_cache=cache), *ROUND)
    assert found == pytest.approx(uncached, abs=1e-6)
    assert len(uncached) == 4 * STEPS
    assert cache.hits > 0 and (cache.misses == len(cache)) == (form != "too small")
    assert cache.bytes <= cache.limit and ("full" in cache.summary()) == (form == "too small")


def test_training_on_half_precision_features_stays_close(make, uncached):
    found = trained(make(feature_cache=FeatureCache(0.01, dtype="float16")), *ROUND)
    assert found == pytest.approx(uncached, abs=0.02)


def test_second_phase_of_a_round_computes_no_feature(make):
    cache = FeatureCache(0.01)
    trainer = make(feature_cache=cache)
    trained(trainer, phase(epochs=2))
    before = cache.misses
    trained(trainer, phase("shared", epochs=2))
    assert cache.misses == before


# mixed precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "cached"), [("vit_test", False), ("vit_test", True), ("lite_medsam", True)])
def test_bfloat16_training_with_a_teacher_stays_within_a_tenth_of_the_float32_losses(make, backbone, cached):
    network = build_network(backbone, SIDE)
    phases = phase(learning_rate=1e-3, distillation=ALWAYS), phase("shared", learning_rate=1e-3)
    expected = trained(make(network=copy.deepcopy(network), per_case=(1, 0)), *phases)
    cache = FeatureCache(0.1) if cached else None
    found = trained(make(network=network, per_case=(1, 0), amp=True, feature_cache=cache), *phases)
    assert found == pytest.approx(expected, abs=0.1) and found != expected
    assert {tensor.dtype for tensor in shared_state(network, ROLES).values()} == {torch.float32}


# teacher --------------------------------------------------------------------------------------------------------------


def test_teacher_runs_once_for_each_item_of_a_phase(make):
    trainer = make()
    epochs = seen_items(trainer)
    trained(trainer, phase(epochs=3, distillation=ALWAYS))
    assert trainer.report.teacher_passes == len({item for epoch in epochs for item in epoch})
    assert trainer.report.teacher_passes < sum(map(len, epochs))
    assert trainer.report.distilled_steps == 3 * STEPS


@pytest.mark.parametrize(
    ("distillation", "round_number"),
    [(None, 2), (ALWAYS.model_copy(update={"weight": 0.0}), 2), (Distillation(warmup_rounds=2), 1)],
    ids=["none", "weight 0", "warm-up"],
)
def test_teacher_never_runs_without_distillation(make, distillation, round_number):
    trainer = make()
    losses = trained(trainer, phase(distillation=distillation), round_number=round_number)
    assert trainer.report.teacher_passes == trainer.report.distilled_steps == 0
    assert losses == trained(make(), phase(), round_number=round_number)


def test_teacher_runs_after_the_warm_up(make):
    trainer = make()
    trained(trainer, phase(distillation=Distillation(warmup_rounds=2, quality_gate=False)), round_number=2)
    assert trainer.report.teacher_passes == 12 and trainer.report.distilled_steps == STEPS


def test_teacher_is_the_network_as_received_with_its_experts_off(make, built):
    trainer = make()
    trained(trainer, phase(epochs=2), phase("shared", epochs=2))
    received = copy.deepcopy(trainer.network)
    trainer.set_phase(phase(distillation=ALWAYS, epochs=2), ROLES, 2)
    teacher = trainer._added.teacher.logits
    trainer.run()
    loader = trainer.data_loader
    assert teacher is not None
    for (item, _), logits in teacher._kept.items():
        with torch.no_grad(), received.experts(False):
            expected = received(loader.dataset[item]["image"][None])[0]
        assert torch.allclose(logits, expected, atol=1e-5)
    assert all(layer.enabled for layer in trainer.network.expert_layers().values())


def test_distillation_pulls_the_personal_model_to_the_global_one(make, good):
    def distance(weight: float) -> float:
        trainer = make(network=copy.deepcopy(good))
        settings = ALWAYS.model_copy(update={"weight": weight})
        trained(trainer, phase(epochs=4, distillation=settings))
        image = torch.stack([trainer.data_loader.dataset[i]["image"] for i in range(4)])
        with torch.no_grad():
            personal = trainer.network(image).sigmoid()
            with trainer.network.experts(False):
                return float((personal - trainer.network(image).sigmoid()).abs().mean())

    assert distance(5.0) < 0.6 * distance(0.0)


def test_teacher_that_is_worse_than_the_student_teaches_nothing(make, good):
    trainer = make(network=copy.deepcopy(good))
    trained(trainer, phase(epochs=4))  # the personal model is better than the global one now
    gated = phase(distillation=Distillation(warmup_rounds=0))
    plain = copy.deepcopy(trainer.network)
    losses = trained(trainer, gated)
    assert trainer.report.distilled_steps == 0 and trainer.report.teacher_passes == 12
    assert losses == trained(make(network=plain), phase())


# optimiser and learning rate ------------------------------------------------------------------------------------------


def test_kept_moments_make_two_phases_one_run(make):
    def run(keep: bool) -> tuple[list[float], PhaseTrainer]:
        trainer = make()
        losses = trained(trainer, phase(keep_moments=keep), round_number=0)
        # a shared phase between them does not disturb the moments; it trains nothing here
        trainer.set_phase(phase("shared", epochs=0), ROLES, 0)
        trainer.run()
        return losses + trained(trainer, phase(keep_moments=keep), round_number=0), trainer

    whole = make()
    sampler = whole.data_loader.sampler
    whole.set_phase(phase(epochs=2), ROLES, 0)
    # both epochs draw what the first epoch draws
    whole.add_event_handler(Events.EPOCH_STARTED, lambda: sampler.set_draw(0, 1))
    whole.run()
    kept, trainer = run(keep=True)
    anew, _ = run(keep=False)
    assert kept == pytest.approx(whole.report.losses, abs=1e-6)
    assert anew != pytest.approx(whole.report.losses, abs=1e-6)
    steps = {float(value) for name, value in trainer.moments().items() if name.endswith("#step")}
    assert steps == {2.0 * STEPS}


def test_moments_are_of_the_phases_tensors_and_can_be_taken_to_another_trainer(make):
    one = make()
    trained(one, phase(keep_moments=True))
    assert {name.split("#")[0] for name in one.moments()} == set(manifest(one.network, ROLES, "personal"))
    two = make(network=copy.deepcopy(one.network))
    two.load_moments(copy.deepcopy(one.moments()))
    assert trained(two, phase(keep_moments=True)) == trained(one, phase(keep_moments=True))
    assert all(torch.equal(value, one.moments()[name]) for name, value in two.moments().items())


def test_moments_are_those_of_the_last_complete_phase_when_a_phase_fails(make):
    trainer = make()
    trained(trainer, phase(keep_moments=True))
    before = {name: value.clone() for name, value in trainer.moments().items()}
    poison(trainer, step=2)
    with pytest.raises(PFedSAMError):
        trained(trainer, phase(keep_moments=True))
    assert all(torch.equal(value, before[name]) for name, value in trainer.moments().items())


def test_learning_rate_rises_in_the_warm_up_rounds_and_stays_afterwards(make):
    trainer = make()
    rates: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: rates.append(engine.optimizer.param_groups[0]["lr"])
    )
    for round_number in range(3):
        trained(trainer, phase(epochs=2, learning_rate=0.01, warmup_rounds=2), round_number=round_number)
    rising = rates[: 4 * STEPS]
    assert rising == sorted(set(rising)) and rising[0] >= 0.001 and rising[-1] == pytest.approx(0.01)
    assert rates[4 * STEPS :] == [0.01] * 2 * STEPS


def test_learning_rate_falls_with_the_rounds_as_the_inverse_of_time(make):
    trainer = make()
    rates: list[float] = []
    for round_number in range(4):
        trained(trainer, phase(learning_rate=0.01, inverse_time_decay=0.5), round_number=round_number)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.01 / 1.5, 0.01 / 2, 0.01 / 2.5])


def test_each_group_of_tensors_has_its_factor_of_the_rate_also_where_it_falls(make):
    trainer = make()
    seen: set[tuple[str, float]] = set()

    def note(engine: Any) -> None:
        named = {id(parameter): name for name, parameter in engine.network.named_parameters()}
        for group in engine.optimizer.param_groups:
            seen.update((group_of(named[id(one)]), group["lr"]) for one in group["params"])

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    factors = {"decoder_subset": 0.1, "lora_a": 2.0}
    trained(trainer, phase("shared", rates=factors, inverse_time_decay=0.5), round_number=2)
    assert sorted(seen) == [
        ("decoder_subset", pytest.approx(0.0005)),
        ("lora_a", pytest.approx(0.01)),
        ("lora_b", pytest.approx(0.005)),
    ]


def test_moments_stay_with_their_tensors_whatever_the_rates(make):
    """Tensors of one rate are together in the optimiser, so their order there is not the network's."""
    one = make()
    rates = {"lora_a": 0.5, "decoder_subset": 0.1}
    plain = phase("shared", keep_moments=True)
    trained(one, plain.model_copy(update={"rates": rates}))
    shapes = {name: tensor.shape for name, tensor in shared_state(one.network, ROLES).items()}
    moments = {name: value for name, value in one.moments().items() if name.endswith("#exp_avg")}
    assert {name.split("#")[0]: value.shape for name, value in moments.items()} == shapes
    two = make(network=copy.deepcopy(one.network))
    two.load_moments(copy.deepcopy(one.moments()))
    # as one group: the moments find their tensors again
    assert trained(two, plain) == trained(one, plain)


# how a run ends -------------------------------------------------------------------------------------------------------


def poison(trainer: PhaseTrainer, step: int) -> None:
    """Make the images of one step (counted from 1 over the next run) not finite."""
    count = 0

    def handler(engine: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            engine.state.batch["image"] = torch.full_like(engine.state.batch["image"], torch.nan)

    # before the step, after the batch is read
    trainer.add_event_handler(Events.ITERATION_STARTED, handler)


def test_loss_that_is_not_finite_ends_the_run_with_our_error_before_the_weights_move(make):
    trainer = make()
    poison(trainer, step=2)
    moved: list[dict[str, Tensor]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: moved.append(values(trainer)))
    with pytest.raises(PFedSAMError) as caught:
        trained(trainer, phase(epochs=2), round_number=3)
    assert caught.value.code == "E17" and "'personal'" in caught.value.message and "round 3" in caught.value.message
    assert len(moved) == 1 == trainer.report.steps
    assert not changed(trainer, moved[0])
    assert all(tensor.isfinite().all() for tensor in tensors(trainer.network).values())


def test_gradient_that_is_not_finite_ends_the_run_before_the_weights_move(make):
    def loss(prediction: Tensor, label: Tensor) -> Tensor:
        # the root has no slope at zero
        return prediction.square().mean() + (prediction - prediction.detach()).abs().sum().sqrt()

    trainer = make(loss_function=loss)
    before = values(trainer)
    with pytest.raises(PFedSAMError, match=r"E17: phase 'personal', round 3, step 1: the norm of the gradient is nan"):
        trained(trainer, phase(), round_number=3)
    assert trainer.report.steps == 0 and not changed(trainer, before)


def test_tensor_that_overflowed_in_the_last_step_ends_the_phase_with_our_error_and_its_moments_are_not_kept(make):
    trainer = make()
    trained(trainer, phase(keep_moments=True))
    kept = trainer.moments()
    name, spoilt = next((name, one) for name, one in trainer.network.named_parameters() if one.requires_grad)

    def overflow(engine: PhaseTrainer) -> None:
        if engine.report.steps == STEPS:
            spoilt.data.view(-1)[0] = torch.inf

    trainer.add_event_handler(Events.ITERATION_COMPLETED, overflow)
    with pytest.raises(PFedSAMError) as caught:
        trained(trainer, phase(keep_moments=True), round_number=3)
    assert caught.value.code == "E17" and name in caught.value.message
    assert all(torch.equal(value, kept[key]) for key, value in trainer.moments().items())


def test_error_of_a_handler_keeps_ours_as_its_cause(make):
    from monai.handlers import StatsHandler

    trainer = make(train_handlers=[StatsHandler(output_transform=lambda output: None)])
    poison(trainer, step=1)
    with pytest.raises(Exception) as caught:
        trained(trainer, phase())
    found = first_of_ours(caught.value)
    assert found is not None and found.code == "E17"


def test_trainer_can_be_used_again_after_an_error(make):
    trainer = make()
    poison(trainer, step=2)
    with pytest.raises(PFedSAMError):
        trained(trainer, phase("shared"))
    epochs = seen_items(trainer)
    losses = trained(trainer, phase(epochs=2))
    assert len(losses) == 2 * STEPS and [len(epoch) for epoch in epochs] == [12, 12]


def test_run_stops_in_the_middle_of_an_epoch_and_can_start_again(make):
    trainer = make()
    epochs = seen_items(trainer)
    trainer.should_stop = lambda: trainer.report.steps == 2
    trained(trainer, phase(epochs=3))
    assert trainer.report.steps == 2 and len(epochs) == 1
    trainer.should_stop = lambda: False
    assert len(trained(trainer, phase("shared", epochs=2))) == 2 * STEPS
    # whole epochs, from their beginning
    sampler = EpochSampler(trainer.data_loader.dataset)
    sampler.set_draw(2, 1)
    assert epochs[1] == list(sampler)


def test_run_that_is_to_stop_at_once_takes_no_step(make):
    trainer = make()
    before = values(trainer)
    trainer.should_stop = lambda: True
    trained(trainer, phase())
    assert trainer.report.steps == 0 and not changed(trainer, before)
