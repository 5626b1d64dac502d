"""Distillation: the divergence, its mean over band and rest, the teacher's logits, and the gate on its quality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

from pfedsam.training.distillation import QualityGate, TeacherLogits, bernoulli_kl, distillation_loss, worth
from pfedsam.training.extra_losses import Distillation

torch.set_num_threads(1)


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# divergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_divergence_is_that_of_two_bernoulli_distributions(temperature):
    teacher, student = noise(2, 1, 8, 8).double(), noise(2, 1, 8, 8, seed=1).double()
    expected = kl_divergence(Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature))
    assert torch.allclose(bernoulli_kl(teacher, student, temperature), expected)


def test_divergence_is_zero_at_equality_and_positive_elsewhere():
    teacher = noise(1000)
    assert not bernoulli_kl(teacher, teacher.clone(), 2.0).any()
    divergence = bernoulli_kl(teacher, noise(1000, seed=1), 2.0)
    assert (divergence > -1e-6).all() and divergence.mean() > 0.1


@pytest.mark.parametrize("extreme", [80.0, 1e4])
def test_divergence_and_its_gradient_are_finite_for_extreme_logits(extreme):
    values = torch.tensor([-extreme, 0.0, extreme])
    teacher, student = (side.flatten() for side in torch.meshgrid(values, values, indexing="ij"))
    student = student.clone().requires_grad_()
    divergence = bernoulli_kl(teacher, student, 2.0)
    divergence.sum().backward()
    assert divergence.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_gradient_pulls_the_student_to_the_teacher():
    teacher, student = noise(100), noise(100, seed=1).requires_grad_()
    bernoulli_kl(teacher, student, 2.0).sum().backward()
    assert (student.grad.sign() == (student.detach() - teacher).sign()).all()


# band and rest --------------------------------------------------------------------------------------------------------


def test_band_and_rest_count_the_same_however_large_they_are():
    # sure background everywhere but in two pixels: one is labelled, one is likely for the teacher only
    teacher, student = torch.full((1, 1, 10, 10), -8.0), torch.full((1, 1, 10, 10), -7.0)
    label = torch.zeros(1, 1, 10, 10)
    label[..., 0, 0] = 1
    teacher[..., 0, 1] = 4.0
    settings = Distillation(weight=0.3, temperature=2.0)
    kl = bernoulli_kl(teacher, student, 2.0).flatten()
    expected = 0.3 * 4 * (kl[:2].mean() + kl[2:].mean()) / 2
    assert torch.allclose(distillation_loss(teacher, student, label, settings), expected)


@pytest.mark.parametrize("who", ["label", "teacher", "student"])
def test_pixel_is_in_the_band_for_each_of_three_reasons(who):
    tensors = {"teacher": torch.full((1, 1, 4, 4), -8.0), "student": torch.full((1, 1, 4, 4), -7.0)}
    tensors["label"] = torch.zeros(1, 1, 4, 4)
    tensors[who][..., 1, 1] = 1.0 if who == "label" else -2.0  # sigmoid(-2) is above 0.05
    kl = bernoulli_kl(tensors["teacher"], tensors["student"], 2.0)
    inside = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    inside[..., 1, 1] = True
    expected = 4 * (kl[inside].mean() + kl[~inside].mean()) / 2
    assert torch.allclose(distillation_loss(**tensors, settings=Distillation(weight=1.0)), expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_loss_is_finite_when_all_or_no_pixels_are_in_the_band(value):
    teacher, student = torch.full((2, 1, 4, 4), -8.0), torch.full((2, 1, 4, 4), -7.0).requires_grad_()
    loss = distillation_loss(teacher, student, torch.full((2, 1, 4, 4), value), Distillation(weight=1.0))
    assert torch.allclose(loss, 4 * bernoulli_kl(teacher, student, 2.0).mean())
    loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_teacher_that_contradicts_the_labels_of_an_image_says_nothing_about_it(exclusive):
    label = torch.zeros(3, 2, 8, 8)
    label[0, 1, :4] = label[1, 1, :4] = 1
    label[:, 0] = 1 - label[:, 1]
    right = (label - 0.5) * 40
    teacher = torch.stack([right[0], -right[1], right[2]])
    told = worth(teacher, label, exclusive)
    assert told[0] == pytest.approx(1, abs=1e-3) and told[1] < 0.02 and told[2] == pytest.approx(1, abs=1e-3)
    settings = Distillation(by_image=True)

    def loss(image: int, settings: Distillation) -> float:
        student = torch.zeros_like(teacher[image : image + 1])
        return float(
            distillation_loss(teacher[image : image + 1], student, label[image : image + 1], settings, exclusive)
        )

    everywhere = settings.model_copy(update={"by_image": False})
    assert loss(0, settings) == pytest.approx(loss(0, everywhere), rel=1e-3)
    assert loss(1, settings) == pytest.approx(float(told[1]) * loss(1, everywhere), rel=1e-3)


def test_loss_is_zero_when_the_student_is_the_teacher_and_reaches_the_student_only():
    teacher, student = noise(2, 1, 4, 4).requires_grad_(), noise(2, 1, 4, 4).requires_grad_()
    label = torch.ones(2, 1, 4, 4)
    assert distillation_loss(teacher.detach(), student, label, Distillation()) == 0
    distillation_loss(teacher.detach(), student + 1, label, Distillation()).backward()
    assert student.grad.any() and teacher.grad is None


# teacher --------------------------------------------------------------------------------------------------------------


class Counting:
    def __init__(self) -> None:
        self.batches: list[list[float]] = []

    def __call__(self, features: Tensor, boxes: Tensor | None) -> Tensor:
        self.batches.append(features.flatten().tolist())
        return 10 * features if boxes is None else 10 * features + boxes[:, :1].nan_to_num()


def test_logits_are_computed_once_for_each_item_and_come_in_the_order_asked():
    network = Counting()
    teacher = TeacherLogits(network)

    def ask(*items: int) -> list[float]:
        return teacher(torch.tensor(items).view(-1, 1).float(), items).flatten().tolist()

    assert ask(3, 1) == [30, 10]
    assert ask(1, 2, 3) == [10, 20, 30]
    assert ask(2, 1) == [20, 10]
    assert network.batches == [[3, 1], [2]]
    assert teacher.passes == 3


def test_logits_of_one_prompt_are_not_those_of_another():
    network = Counting()
    teacher = TeacherLogits(network)

    def ask(boxes: list[float] | None, *items: int) -> list[float]:
        rows = None if boxes is None else torch.tensor(boxes).float().view(-1, 1).expand(-1, 4)
        return teacher(torch.tensor(items).view(-1, 1).float(), items, rows).flatten().tolist()

    assert ask([5, 6], 1, 2) == [15, 26]
    assert ask([7, 6, 8], 1, 2, 3) == [17, 26, 38]  # another box; the same; a new item
    assert ask([torch.nan, 6], 1, 2) == [10, 26]  # an image without a box among others that have one
    assert ask(None, 1, 2) == [10, 20]
    assert ask([torch.nan, 8], 1, 3) == [10, 38] and ask([5], 1) == [15]
    assert network.batches == [[1, 2], [1, 3], [1], [1, 2]]
    assert teacher.passes == 7


def test_logits_of_the_teacher_have_no_gradient():
    features = torch.ones(1, 1, requires_grad=True)
    teacher = TeacherLogits(lambda x, boxes: 2 * x)
    assert not teacher(features, [0]).requires_grad
    assert not teacher(features, [0]).requires_grad


# quality gate ---------------------------------------------------------------------------------------------------------


def test_gate_opens_and_closes_with_the_dice_seen_so_far():
    label = torch.zeros(1, 1, 8, 8)
    label[..., :4, :] = 1
    good, bad = 20 * (label - 0.5), -20 * (label - 0.5)
    gate = QualityGate()
    assert gate.open(good, bad, label)
    assert gate.dice("teacher") == pytest.approx(1, abs=1e-3) and gate.dice("student") == pytest.approx(0, abs=1e-3)
    assert gate.open(bad, good, label)  # equal now
    assert not gate.open(bad, good, label)
    assert gate.dice("student") == pytest.approx(2 / 3, abs=1e-3)


def test_gate_is_open_when_both_are_equal():
    gate, logits = QualityGate(), noise(2, 1, 4, 4)
    assert gate.open(logits, logits, torch.zeros(2, 1, 4, 4))
    assert gate.dice("teacher") == gate.dice("student")
    assert QualityGate().dice("teacher") == 0
