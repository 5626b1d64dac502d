"""Who teaches whom, exclusive classes, and the balance of sparse mixtures: the switches of a phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from pfedsam.data.phantom import write_phantom
from pfedsam.networks.prompts import training_boxes
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, group_of, shared_state, swapped_parameters, tensors
from pfedsam.training.distillation import QualityGate, categorical_kl, distillation_loss, foreground
from pfedsam.training.extra_losses import Distillation
from pfedsam.training.phase import Phase
from pfedsam.training.site import SiteTrainer
from pfedsam.training.strategy import Strategy
from pfedsam.training.trainer import PhaseTrainer

torch.set_num_threads(1)
SIDE, ROLES = 32, Roles()
LOCAL = {"name": "local", "trains": ["personal"], "experts": True, "learning_rate": 1e-2}
GLOBAL = {"name": "global", "trains": ["shared"], "experts": False, "learning_rate": 1e-2}


def distils(teacher: str) -> dict[str, Any]:
    return {"teacher": teacher, "warmup_rounds": 0, "quality_gate": False}


def trainer(exclusive: bool = False, **settings: Any) -> PhaseTrainer:
    """Two batches of two images; experts and LoRA are away from zero."""
    classes = 3 if exclusive else 1
    network = build_network("vit_test", SIDE, classes=classes, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in tensors(network).items():
            if group_of(name) in ("lora_b", "experts"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    batches = []
    for number in range(2):
        label = torch.randint(classes if exclusive else 2, (2, 1, SIDE, SIDE), generator=generator)
        hot = torch.cat([(label == c).float() for c in range(classes)], 1) if exclusive else label.float()
        image = torch.rand(2, 3, SIDE, SIDE, generator=generator)
        batches.append({"image": image, "label": hot, "index": torch.tensor([2 * number, 2 * number + 1])})
    loss = DiceCELoss(softmax=True, include_background=False) if exclusive else DiceCELoss(sigmoid=True, batch=True)
    return PhaseTrainer(
        max_epochs=1,
        device=torch.device("cpu"),
        train_data_loader=batches,
        network=network,
        loss_function=loss,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
        phase=LOCAL,
        shared=list(ROLES.shared),
        personal=list(ROLES.personal),
        exclusive=exclusive,
    )


def taught(one: PhaseTrainer, phase: Phase) -> list[Tensor]:
    """Train a phase, and give all logits of its teacher in the order of the items."""
    one.set_phase(phase, ROLES, round_number=5)
    one.run()
    assert one._added.teacher is not None and one.report.distilled_steps == one.report.steps > 0
    return [one._added.teacher.logits._kept[key] for key in sorted(one._added.teacher.logits._kept)]


@pytest.mark.parametrize("teacher", ["global", "personal"])
@pytest.mark.parametrize("phase", [LOCAL, GLOBAL], ids=["local", "global"])
def test_teacher_is_the_network_as_it_was_when_the_phase_started(teacher, phase):
    one = trainer()
    before = {name: tensor.detach().clone() for name, tensor in tensors(one.network).items()}
    found = taught(one, Phase.of({**phase, "epochs": 2, "distillation": distils(teacher)}))
    reference = trainer().network.eval()
    reference.load_state_dict(before)
    images = torch.cat([batch["image"] for batch in one.data_loader])
    with torch.no_grad(), reference.experts(teacher == "personal"):
        expected = torch.cat([reference(image) for image in images.split(1)])
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4)


def test_teacher_sees_each_image_with_its_own_box_when_a_part_of_the_batch_is_new():
    one = trainer()
    one.box_probability = 1.0
    first, second = one.data_loader
    for key in ("image", "label", "index"):  # an image of the first batch is in the second too
        second[key][0] = first[key][1]
    for batch in (first, second):
        batch["label"][..., : SIDE // 2] = 0  # boxes that are not the whole image
    before = {name: tensor.detach().clone() for name, tensor in tensors(one.network).items()}
    taught(one, Phase.of({**LOCAL, "distillation": distils("global")}))
    assert one.report.teacher_passes == 3 and one.report.steps == 2
    assert one._added.teacher is not None
    reference = trainer().network.eval()
    reference.load_state_dict(before)
    for batch in (first, second):
        items = batch["index"].tolist()
        boxes = training_boxes(batch["label"], items, 1.0)
        assert boxes is not None and not boxes.isnan().any()
        with torch.no_grad(), reference.experts(False):
            with reference.prompted(boxes):
                expected = reference(batch["image"])
            assert not torch.allclose(reference(batch["image"]), expected, atol=1e-3), "the box matters"
        found = one._added.teacher.logits(torch.zeros(2, 0), items, boxes)  # kept: no features are asked for
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("teacher", ["global", "personal"])
def test_teacher_changes_what_a_phase_learns(teacher):
    results = []
    for distillation in (None, distils(teacher)):
        one = trainer()
        one.set_phase(Phase.of({**GLOBAL, "distillation": distillation}), ROLES, round_number=5)
        one.run()
        results.append(shared_state(one.network, ROLES))
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


@torch.no_grad()
def test_network_is_held_at_other_values_and_comes_back_also_after_an_error():
    network = trainer().network
    state = {name: torch.zeros_like(t) for name, t in shared_state(network, ROLES).items() if "lora_b" in name}
    before = {name: t.clone() for name, t in tensors(network).items()}
    with pytest.raises(KeyError), swapped_parameters(network, state):
        assert not any(tensors(network)[name].any() for name in state)
        raise KeyError
    assert state and all(torch.equal(t, before[name]) for name, t in tensors(network).items())


@torch.no_grad()
def test_network_is_held_on_its_own_device_wherever_the_values_are():
    with torch.device("meta"):
        network = build_network("vit_test", SIDE)
    state = shared_state(trainer().network, ROLES)
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    with swapped_parameters(network, state):
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
        network(torch.zeros(1, 3, SIDE, SIDE, device="meta"))
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


# exclusive classes ----------------------------------------------------------------------------------------------------


def test_categorical_divergence_is_that_of_two_categorical_distributions():
    from torch.distributions import Categorical, kl_divergence

    teacher, student = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.randn(2, 3, 4, 4, dtype=torch.double)
    first, second = (Categorical(logits=(z / 2).movedim(1, -1)) for z in (teacher, student))
    torch.testing.assert_close(categorical_kl(teacher, student, 2.0)[:, 0], kl_divergence(first, second))


def test_exclusive_distillation_is_zero_at_equality_and_counts_band_and_rest_alike():
    settings = Distillation(weight=1, temperature=1)
    background = torch.tensor([9.0, -9.0, -9.0]).view(1, 3, 1, 1).expand(1, 3, 10, 10)
    teacher, student = background.clone(), background.clone()
    label = torch.zeros(1, 3, 10, 10)
    label[:, 0] = 1
    assert float(distillation_loss(teacher, student, label, settings, exclusive=True)) == 0
    teacher[0, :, 0, 0] = torch.tensor([-9.0, 9.0, -9.0])  # one pixel of 100 is the band
    one = float(categorical_kl(teacher, student, 1.0)[0, 0, 0, 0])
    assert float(distillation_loss(teacher, student, label, settings, exclusive=True)) == pytest.approx(one / 2)


def test_background_is_no_foreground():
    logits = torch.randn(1, 3, 4, 4)
    assert foreground(logits, exclusive=True).shape == (1, 2, 4, 4)
    label = torch.zeros(1, 3, 4, 4)
    label[:, 0] = 1
    gate = QualityGate(exclusive=True)
    gate.open(logits, logits, label)
    assert gate.dice("student") == 0  # only background was there to be found


def test_exclusive_classes_train_with_distillation():
    one = trainer(exclusive=True)
    taught(one, Phase.of({**LOCAL, "distillation": distils("global")}))
    assert all(loss == loss for loss in one.report.losses)


# sparse mixtures ------------------------------------------------------------------------------------------------------


def test_balance_is_part_of_the_loss_of_sparse_mixtures_only():
    losses = {}
    for top_k in (0, 1):
        for balance in (0.0, 10.0):
            one = trainer(top_k=top_k)
            one.set_phase(Phase.of({**LOCAL, "balance": balance}), ROLES)
            one.run()
            losses[top_k, balance] = one.report.losses[0]
    assert losses[0, 0.0] == losses[0, 10.0]
    assert losses[1, 10.0] >= losses[1, 0.0] + 9  # the loss itself is about 1 when experts are used alike


# order of the phases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom"), sites=2, cases=4, shape=(48, 48, 6))[0]


def round_of(site: Path, *phases: dict[str, Any]) -> tuple[SiteTrainer, Any]:
    overrides = {"backbone": "vit_test", "image_size": 64, "batch_size": 4, "augmentations": 1}
    local = SiteTrainer("brain_lesion_mri", site, Strategy.of({"phases": phases}), overrides, site.parent / "out")
    local.open()
    theta = shared_state(local.network, ROLES)
    local.receive(theta, local.fingerprint)
    return local, local.train(0)


def test_either_order_trains_the_experts_beside_theta_as_received(site):
    (first, one), (second, other) = round_of(site, LOCAL, GLOBAL), round_of(site, GLOBAL, LOCAL)
    for mine, theirs in ((one.personal, other.personal), (one.delta, other.delta)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any(tensor.any() for tensor in one.delta.values())
    # what is kept is the pair that was trained together
    for local in (first, second):
        assert all(torch.equal(local.model().shared[name], t) for name, t in local.tensors.received.items())


def test_the_order_matters_where_each_phase_teaches_the_other(site):
    def taught(phase: dict[str, Any], teacher: str) -> dict[str, Any]:
        return {**phase, "distillation": {"teacher": teacher, "warmup_rounds": 0, "quality_gate": False, "weight": 0.5}}

    local, shared = taught(LOCAL, "global"), taught(GLOBAL, "personal")
    (_, one), (_, other) = round_of(site, local, shared), round_of(site, shared, local)
    assert max(float((tensor - other.delta[name]).abs().max()) for name, tensor in one.delta.items()) > 1e-3
