"""What is learnt where no label says what is there: pseudo-labels, smoothness, and nothing where all is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from pfedsam.data.known import known_loss, on_known, settled
from pfedsam.data.labels import OPEN
from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.networks.sam import build_network
from pfedsam.parameters import shared_state
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.extra_losses import PseudoLabels, Smoothness
from pfedsam.training.open_voxels import OpenVoxels
from pfedsam.training.phase import Phase
from pfedsam.training.site import SiteTrainer
from pfedsam.training.smoothness import carried_along, gated_crf, smoothness_loss
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
TINY = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}
LOSS = DiceCELoss(sigmoid=True, batch=True)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# losses on what is known ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"sigmoid": True}, {"softmax": True}])
def test_a_loss_is_that_of_the_known_voxels_alone(how: dict[str, bool]) -> None:
    loss = DiceCELoss(batch=True, **how)
    label = torch.nn.functional.one_hot(torch.arange(32).reshape(2, 4, 4) % 3, 3).movedim(-1, 1).float()
    logits = noise(2, 3, 4, 4).requires_grad_()
    assert torch.equal(known_loss(loss, logits, label), loss(logits, label).mean())
    half = label.clone()
    half[..., 2:] = OPEN
    torch.testing.assert_close(known_loss(loss, logits, half), loss(logits[..., :2], label[..., :2]).mean())
    (gradient,) = torch.autograd.grad(known_loss(loss, logits, half), logits)
    assert bool((gradient[..., 2:] == 0).all()) and bool((gradient[..., :2] != 0).any())
    nothing = known_loss(loss, logits, torch.full_like(label, OPEN))
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert float(nothing.detach()) == 0 and bool((gradient == 0).all())


def test_open_voxels_count_for_nothing() -> None:
    label, other = torch.tensor([0.0, 1, OPEN]), torch.tensor([1.0, 1, 1])
    assert [one.tolist() for one in on_known(label, other)] == [[0, 1, 0], [1, 1, 0]]
    assert settled(label).tolist() == [0, 1, 0]
    whole = torch.tensor([0.0, 1])
    assert settled(whole) is whole and on_known(whole, other)[1] is other


# smoothness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_field_of_one_class_has_no_crf(value: float) -> None:
    images = noise(1, 3, 12, 12).sigmoid()
    assert float(gated_crf(torch.full((1, 2, 12, 12), value), images, Smoothness())) == 0
    steady = torch.full((1, 2, 12, 12), 0.3)
    torch.testing.assert_close(carried_along(steady, images, Smoothness()), steady)


def test_a_prediction_may_change_where_the_image_does() -> None:
    images = torch.zeros(1, 3, 12, 12)
    images[..., 6:] = 1
    here, there = torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 12)
    here[..., 6:], there[..., 3:] = 1, 1
    settings = Smoothness(affinity=0.1)
    assert float(gated_crf(here, images, settings)) < 1e-6 < float(gated_crf(there, images, settings))
    logits = (20 * (there - 0.5)).requires_grad_()
    loss = smoothness_loss(logits, images, settings)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss) > 0.001 and bool(gradient.isfinite().all())
    assert float(smoothness_loss(20 * (here - 0.5), images, settings)) < 0.001 * float(loss) + 1e-6


# pseudo-labels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def teach() -> Any:
    """Builds what a phase learns from open voxels on a small network, and gives features of three images."""
    network = build_network("vit_test", 32)
    features = network.trunk(noise(3, 3, 32, 32).sigmoid())

    def make(*, exclusive: bool = False, draw: tuple[int, int] = (1, 0), **settings: Any) -> tuple[OpenVoxels, Tensor]:
        trained = {name: one for name, one in network.named_parameters() if "output_hypernetworks_mlps" in name}
        base = {name: one.detach().clone() for name, one in trained.items()}
        told = PseudoLabels(**settings)
        how = {"exclusive": exclusive, "draw": draw, "base": base, "autocast": torch.no_grad}
        return OpenVoxels(network, told, trained, LOSS, **{**how, "autocast": _plain}), features

    return make


def _plain() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def test_pseudo_labels_are_given_where_nobody_knows_and_the_teachers_are_surest(teach) -> None:
    learner, features = teach(quantile=(0.25, 0.25), threshold_decay=0.0)
    label = torch.full((3, 1, 32, 32), float(OPEN))
    label[0, :, :16] = 1
    pseudo, weights = learner._pseudo_labels(features, label, [0, 1, 2])
    assert weights == [1.0] * 3
    assert bool((pseudo[0, :, :16] == OPEN).all())
    given = pseudo != OPEN
    share = float(given.sum() / (label == OPEN).sum())
    assert 0.2 < share < 0.3 and learner.labelled == [pytest.approx(share)]
    probability = learner._teach(features, [0, 1, 2])
    assert torch.equal(pseudo[given], (probability > 0.5).float()[given])
    sureness = (probability - 0.5).abs()
    for found in (True, False):  # each kind is judged apart
        kind = ((probability > 0.5) == found) & (label == OPEN)
        if bool((kind & given).any()):
            assert float(sureness[kind & given].min()) >= float(sureness[kind & ~given].max()) - 1e-6


def test_a_batch_in_which_all_is_known_costs_and_teaches_nothing(teach) -> None:
    learner, features = teach()
    prediction = learner.network.head(features)
    loss = learner(features, prediction, torch.zeros(3, 1, 32, 32), [0, 1, 2])
    assert float(loss) == 0 and learner.labelled == []


def test_the_average_teacher_follows_the_student_and_the_rounds_stays(teach) -> None:
    learner, features = teach(decay=0.75)
    before = {name: one.detach().clone() for name, one in learner._trained.items()}
    of_round = learner._of_round(features, [0, 1, 2])
    with torch.no_grad():
        for one in learner._trained.values():
            one += 1
    learner.follow()
    for name, tensor in learner._average.items():
        torch.testing.assert_close(tensor, before[name] + 0.25)
    assert torch.equal(learner._of_round(features, [0, 1, 2]), of_round)
    assert not torch.equal(learner._logits(features, learner._average), of_round)


def test_the_loss_reaches_the_student_alone_and_can_be_repeated(teach) -> None:
    losses, gradients = [], []
    for _ in range(2):
        learner, features = teach(quantile=(0.5, 0.5))
        label = torch.full((3, 1, 32, 32), float(OPEN))
        prediction = learner.network.head(features)
        loss = learner(features, prediction, label, [0, 1, 2])
        losses.append(float(loss))
        gradients.append(torch.autograd.grad(loss, list(learner._trained.values())))
        assert all(not one.requires_grad for one in learner._average.values())
    assert losses[0] == losses[1] > 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_only_what_the_base_sam_says_too_is_taught_and_images_where_nothing_is_found_are_left_out(teach) -> None:
    learner, features = teach(refine="box", quantile=(1.0, 1.0), agreement=0.0)
    probability = learner._teach(features, [0, 1, 2])
    found = (probability > 0.5).float()
    found[2] = 0
    same, weights = learner._agreed(features, found, [0, 1, 2])
    assert weights[2] == 0 and bool(same[2].all())
    from pfedsam.networks.prompts import boxes_of

    refined = learner._in_boxes(features, boxes_of(found))[:, :1] > 0
    for image in (0, 1):
        assert torch.equal(same[image], refined[image] == found[image].bool())
        overlap = 2 * float((refined[image] & found[image].bool()).sum())
        dice = overlap / float(refined[image].sum() + found[image].sum())
        assert weights[image] == pytest.approx(dice, abs=1e-5)
    strict, _ = teach(refine="box", agreement=0.999)
    assert strict._agreed(features, found, [0, 1, 2])[1] == [0.0, 0.0, 0.0]


def test_exclusive_classes_get_one_class_a_voxel(teach) -> None:
    network = build_network("vit_test", 32, classes=3)
    trained = {name: one for name, one in network.named_parameters() if "output_hypernetworks_mlps" in name}
    loss = DiceCELoss(softmax=True, batch=True)
    learner = OpenVoxels(
        network,
        PseudoLabels(quantile=(0.5, 0.5)),
        trained,
        loss,
        exclusive=True,
        draw=(0, 0),
        base={},
        autocast=_plain,
    )
    features, label = network.trunk(noise(2, 3, 32, 32).sigmoid()), torch.full((2, 3, 32, 32), float(OPEN))
    pseudo, _ = learner._pseudo_labels(features, label, [0, 1])
    given = (pseudo != OPEN).all(1)
    assert bool(given.any()) and torch.equal((pseudo == OPEN).any(1), ~given)
    assert bool((pseudo.sum(1)[given] == 1).all())
    assert float(learner(features, network.head(features), label, [0, 1])) > 0


def test_more_voxels_are_labelled_from_round_to_round() -> None:
    settings = PseudoLabels(quantile=(0.1, 0.5), warmup_rounds=2, ramp_rounds=4)
    found = [settings.quantile_in(number) for number in range(9)]
    assert found == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])


@pytest.mark.parametrize(
    "wrong",
    [{"teachers": []}, {"teachers": ["round", "round"]}, {"quantile": [0, 1]}, {"dropout": 1.0}, {"refine": "sam"}],
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    phase = {"name": "train", "trains": ["shared"], "experts": False, "pseudo": wrong}
    with pytest.raises(PFedSAMError, match=r"E16.*pseudo"):
        Strategy.of({"personal": [], "phases": [phase]})


# a site ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    write_phantom(folder, sites=1, cases=9, shape=(32, 32, 6))
    return folder / "site-1"


def opened(site: Path, out: Path, name: str, **pseudo: Any) -> SiteTrainer:
    file = find_strategy(name)
    strategy = file.checked()
    if pseudo:
        phases = [phase.model_copy(update={"pseudo": PseudoLabels(**pseudo)}) for phase in strategy.phases]
        strategy = strategy.model_copy(update={"phases": tuple(phases)})
    local = SiteTrainer("brain_lesion_mri", site, strategy, {**TINY, **file.overrides}, out)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    return local


def without_labels(site: Path, out: Path, count: int) -> Path:
    """The site, of whose training cases so many have lost their labels."""
    import shutil

    from pfedsam.data.sites import read_split
    from pfedsam.data.splitting import write_datalist

    shutil.copytree(site, out)
    write_datalist(out)
    for case in read_split(out)["training"][:count]:
        assert case.label is not None
        case.label.unlink()
    return out


@pytest.mark.parametrize("name", ["pseudo_labels", "pseudo_labels_refined", "weak_crf", "weak_pseudo_labels"])
def test_without_an_unlabelled_or_weak_case_nothing_changes(data: Path, tmp_path: Path, name: str) -> None:
    plain, other = opened(data, tmp_path / "a", "fedavg_lora"), opened(data, tmp_path / "b", name)
    for number in range(2):  # beyond the warm-up
        deltas = [local.train(number).delta for local in (plain, other)]
        assert all(torch.equal(deltas[0][key], deltas[1][key]) for key in deltas[0])
    assert plain.weight == other.weight


def test_unlabelled_cases_are_drawn_when_the_warm_up_is_over_and_counted_nowhere(data: Path, tmp_path: Path) -> None:
    site = without_labels(data, tmp_path / "site", 2)
    plain, other = (opened(site, tmp_path / name, name) for name in ("fedavg_lora", "pseudo_labels"))
    assert len(other.unlabelled_cases) == 2 and not plain.unlabelled_cases
    assert other.weight == plain.weight == len(plain.cases) == len(other.cases)
    results = [[local.train(number) for number in range(2)] for local in (plain, other)]
    steps = [[one.phases["train"].steps for one in found] for found in results]
    slices = len(other.trainer.data_loader.sampler)  # type: ignore[attr-defined]
    epochs, batch = 3, TINY["batch_size"]
    assert steps[1][0] == steps[0][0] == steps[0][1] == epochs * -(-slices // batch)
    assert steps[1][1] == epochs * -(-2 * slices // batch)
    same = [torch.equal(results[0][number].delta[key], results[1][number].delta[key]) for number in range(2)
            for key in results[0][0].delta]  # fmt: skip
    assert all(same[: len(same) // 2]) and not all(same[len(same) // 2 :])
    assert results[0][1].delta.keys() == results[1][1].delta.keys()
    seen = other.model(round=1).info["seen"]
    assert len(seen["training"]) == len(other.cases) + 2
    assert other.trainer.data_loader.sampler.unlabelled_share == 0  # type: ignore[attr-defined]


def test_a_phase_that_asks_the_base_sam_keeps_it(data: Path, tmp_path: Path) -> None:
    site = without_labels(data, tmp_path / "site", 2)
    local = opened(site, tmp_path / "out", "pseudo_labels_refined", refine="box", agreement=0.0, warmup_rounds=0)
    start = {name: tensor.clone() for name, tensor in local.tensors.unshared.items()}
    for number in range(2):
        result = local.train(number)
        local.receive({name: local.tensors.received[name] + delta for name, delta in result.delta.items()},
                      local.fingerprint)  # fmt: skip
    assert start and all(torch.equal(start[name], one) for name, one in local.trainer.base.items())
    assert any(not torch.equal(start[name], one) for name, one in local.tensors.received.items())


def test_a_weak_label_teaches_what_it_knows_and_is_measured_where_it_knows(data: Path, tmp_path: Path) -> None:
    import json
    import shutil

    import nibabel

    from pfedsam.data.sites import read_split
    from pfedsam.data.splitting import write_datalist

    shutil.copytree(data, tmp_path / "site")
    write_datalist(tmp_path / "site")
    path = tmp_path / "site" / "datalist.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unknown": 7}))
    local = opened(tmp_path / "site", tmp_path / "before", "fedavg_lora")
    whole = local.validate(experts=False)["val_dice"]
    split = read_split(tmp_path / "site")
    for case in (*split["training"], *split["validation"]):
        assert case.label is not None
        label = nibabel.load(case.label)
        assert isinstance(label, nibabel.Nifti1Image)
        values = np.asarray(label.dataobj).astype(np.uint8)
        values[:20] = 7
        nibabel.save(nibabel.Nifti1Image(values, label.affine), case.label)
    weak = opened(tmp_path / "site", tmp_path / "after", "weak_pseudo_labels")
    delta = weak.train(1).delta
    assert any(bool(one.any()) for one in delta.values())
    assert all(bool(one.isfinite().all()) for one in delta.values())
    assert weak.validate(experts=False)["val_dice"] != whole


def test_a_phase_without_pseudo_labels_is_as_it_was() -> None:
    settings = Phase(name="train", trains=("shared",), experts=False)
    assert settings.pseudo is None and settings.smooth is None
    assert not find_strategy("pfedsam_chosen").checked().learns_from_unlabelled
    assert find_strategy("pseudo_labels").checked().learns_from_unlabelled
