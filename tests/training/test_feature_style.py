"""Style in training: what is swapped and mixed, when nothing is, and that cached features stay exact."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss
from monai.transforms import Compose, RandFlipd
from torch import Tensor
from torch.utils.data import DataLoader

from pfedsam.bundles import BUNDLES_VARIABLE, folder, installed_bundles
from pfedsam.data.labels import OPEN
from pfedsam.data.phantom import write_phantom
from pfedsam.data.restyle import RandAmplitudeMixd, RandGINd
from pfedsam.data.slices import EpochSampler, SliceDataset
from pfedsam.errors import PFedSAMError
from pfedsam.networks.model import SegmentAnything
from pfedsam.networks.sam import build_network
from pfedsam.parameters import Roles, shared_state, tensors
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.feature_cache import FeatureCache
from pfedsam.training.feature_store import FeatureStore
from pfedsam.training.phase import Phase
from pfedsam.training.site import SiteTrainer
from pfedsam.training.strategy import Strategy
from pfedsam.training.style import Style, channels_first, mixed, mixed_labels, patches_along, swapped_styles
from pfedsam.training.style_settings import GIN, Amplitude, Augment, Mixup, PatchSwap
from pfedsam.training.trainer import PhaseTrainer
from pfedsam.training.workflow import RANDOM, augmentations

torch.set_num_threads(1)
SIDE, ROLES = 64, Roles()
SWAP, MIX = {"patch_swap": {"probability": 1}}, {"mixup": {}}
TINY = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "positives_per_case": 2, "negatives_per_case": 1}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def phase(**settings: Any) -> Phase:
    return Phase.of({"name": "train", "trains": ["shared"], "experts": False, "learning_rate": 1e-2, **settings})


@pytest.fixture(scope="module")
def built() -> SegmentAnything:
    return build_network("vit_test", SIDE)


def case(number: int) -> dict[str, Tensor]:
    label = torch.zeros(1, SIDE, SIDE, 4)
    label[:, 8 + 6 * number : 36 + 6 * number, 16:40, 1:3] = 1
    image = torch.rand(1, SIDE, SIDE, 4, generator=torch.Generator().manual_seed(number)) * 0.4
    return {"image": image + 0.6 * label, "label": label}


@pytest.fixture(scope="module")
def make(built: SegmentAnything) -> Callable[..., PhaseTrainer]:
    """Builds a trainer as a bundle does, on slices that are flipped and, if asked for, restyled."""

    def trainer(*restyling: Any, **settings: Any) -> PhaseTrainer:
        network = copy.deepcopy(built)
        augment = Compose([RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=0), *restyling])
        data = SliceDataset([case(number) for number in range(2)], lambda item: dict(item), augment, variants=2)
        return PhaseTrainer(
            max_epochs=1,
            device=torch.device("cpu"),
            train_data_loader=DataLoader(data, batch_size=3, sampler=EpochSampler(data)),
            network=network,
            loss_function=DiceCELoss(sigmoid=True, batch=True),
            optimizer=torch.optim.AdamW(network.parameters(), lr=1e-3),
            phase=phase().model_dump(),
            shared=list(ROLES.shared),
            personal=list(ROLES.personal),
            **settings,
        )

    return trainer


def trained(trainer: PhaseTrainer, *phases: Phase, round_number: int = 2) -> list[float]:
    losses: list[float] = []
    for number, current in enumerate(phases):
        trainer.set_phase(current, ROLES, round_number, number)
        trainer.run()
        losses += trainer.report.losses
    return losses


# patches --------------------------------------------------------------------------------------------------------------


def patch(maps: Tensor, number: int, index: int) -> Tensor:
    """A patch of maps `(B, C, H, W)` by its number: image by image, row by row."""
    image, place = divmod(index, number**2)
    row, column = divmod(place, number)
    high, wide = maps.shape[2] // number, maps.shape[3] // number
    return maps[image, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide]


@pytest.mark.parametrize(("number", "shape"), [(1, (3, 4, 6, 6)), (2, (3, 4, 6, 8)), (3, (2, 5, 6, 6))])
def test_a_patch_takes_mean_and_spread_of_its_partner_and_keeps_its_form(number: int, shape: tuple[int, ...]) -> None:
    maps = noise(*shape) * 3 + noise(shape[0], shape[1], 1, 1, seed=1) * 5
    partners = np.random.default_rng(0).permutation(shape[0] * number**2)
    found = swapped_styles(maps, number, partners)
    assert found.shape == maps.shape
    over = (1, 2)
    for index, partner in enumerate(partners):
        own, other = patch(maps, number, index), patch(maps, number, int(partner))
        form = (own - own.mean(over, True)) / own.std(over, correction=0, keepdim=True)
        wanted = form * other.std(over, correction=0, keepdim=True) + other.mean(over, True)
        torch.testing.assert_close(patch(found, number, index), wanted, atol=1e-3, rtol=1e-3)


def test_a_patch_that_is_its_own_partner_stays_and_a_flat_one_is_no_trouble() -> None:
    maps = noise(2, 4, 8, 8)
    maps[0, 1, :4, :4] = 3
    torch.testing.assert_close(swapped_styles(maps, 2, np.arange(8)), maps, atol=1e-5, rtol=1e-4)
    assert swapped_styles(maps, 2, np.arange(8)[::-1].copy()).isfinite().all()


def test_reduced_features_keep_their_kind_and_sides_that_do_not_divide_get_fewer_patches() -> None:
    assert swapped_styles(noise(2, 4, 8, 8).bfloat16(), 2, np.arange(8)).dtype == torch.bfloat16
    assert [patches_along((side, 6), 4) for side in (5, 6, 7, 12)] == [1, 3, 1, 3]


@pytest.mark.parametrize("backbone", ["vit_test", "lite_medsam"])
@pytest.mark.parametrize("settings", [{}, {"adapted_blocks": 0}, {"adapted_blocks": 0, "expert_places": ["neck"]}])
@pytest.mark.parametrize("frozen", [True, False])
def test_where_the_channels_of_the_features_are(backbone: str, settings: dict[str, Any], frozen: bool) -> None:
    network = build_network(backbone, SIDE, **{"adapted_blocks": 2, **settings})
    network.frozen_trunk = frozen
    with torch.no_grad():
        features = network.trunk(torch.rand(1, 3, SIDE, SIDE))
    sides = features.shape[2:] if channels_first(network) else features.shape[1:3]
    channels = features.shape[1] if channels_first(network) else features.shape[3]
    assert sides[0] == sides[1] != channels


@pytest.mark.parametrize("frozen", [True, False])
def test_styles_are_swapped_over_places_and_within_a_channel(built: SegmentAnything, frozen: bool) -> None:
    network = copy.copy(built)
    network.frozen_trunk = frozen
    maps = noise(2, 6, 4, 4) + 10 * torch.arange(6).view(1, 6, 1, 1)
    features = maps if not frozen else maps.movedim(1, -1)
    found, _ = Style(phase(**SWAP), network, (0, 0))(features, torch.zeros(2, 1, 8, 8), 0)
    assert found.shape == features.shape and not torch.allclose(found, features)
    found = found if not frozen else found.movedim(-1, 1)
    for channel in range(6):
        before, after = ([float(patch(one, 2, index)[channel].mean()) for index in range(8)] for one in (maps, found))
        assert sorted(after) == pytest.approx(sorted(before), abs=1e-4)


# mixed images ---------------------------------------------------------------------------------------------------------


def test_a_share_of_1_is_the_image_itself_with_its_label() -> None:
    features, label = noise(3, 4, 4, 8), (noise(3, 1, 8, 8, seed=1) > 0).float()
    partners = np.array([2, 0, 1])
    assert torch.equal(mixed(features, partners, 1.0), features)
    assert torch.equal(mixed_labels(label, partners, 1.0), label)
    torch.testing.assert_close(mixed(features, partners, 0.0), features[[2, 0, 1]])


def test_a_mixed_label_is_open_where_one_of_the_two_is() -> None:
    label = torch.tensor([[0.0, 1, OPEN, 1], [1, 1, 0, OPEN]]).view(2, 1, 1, 4)
    found = mixed_labels(label, np.array([1, 0]), 0.75)
    assert found.flatten(1).tolist() == [[0.25, 1, OPEN, OPEN], [0.75, 1, OPEN, OPEN]]


def test_images_and_masks_are_mixed_by_the_same_pairs_and_shares(built: SegmentAnything) -> None:
    label = torch.eye(4).view(4, 4, 1, 1)
    shares = []
    for step in range(40):
        features, target = Style(phase(**MIX), built, (0, 0))(label.clone(), label, step)
        torch.testing.assert_close(features, target)
        assert torch.allclose(target.sum(1), torch.ones(()))
        shares.append(float(target[0].max()))
    # Beta(0.2, 0.2): mostly one of the two
    assert np.mean([share > 0.9 for share in shares]) > 0.4 and min(shares) < 0.9


# when -----------------------------------------------------------------------------------------------------------------


def test_a_phase_that_asks_for_nothing_gets_what_it_gave(built: SegmentAnything) -> None:
    features, label = noise(2, 4, 4, 8), torch.zeros(2, 1, 8, 8)
    found = Style(phase(), built, (0, 0))(features, label, 0)
    assert found[0] is features and found[1] is label
    found = Style(phase(patch_swap={"probability": 0}), built, (0, 0))(features, label, 0)
    assert found[0] is features and found[1] is label


@pytest.mark.parametrize("settings", [SWAP, MIX, {**SWAP, **MIX}])
def test_what_is_drawn_follows_from_round_phase_and_step_alone(built: SegmentAnything, settings: Any) -> None:
    features, label = noise(3, 4, 4, 8), (noise(3, 1, 8, 8, seed=1) > 0).float()
    kept = features.clone()

    def draw(*place: int) -> Tensor:
        return Style(phase(**settings), built, (place[0], place[1]))(features, label, place[2])[0]

    first = draw(2, 0, 5)
    torch.manual_seed(3)
    np.random.seed(3)
    assert torch.equal(draw(2, 0, 5), first) and torch.equal(features, kept)
    assert not any(torch.equal(draw(*place), first) for place in ((3, 0, 5), (2, 1, 5), (2, 0, 6)))


def test_half_of_the_steps_swap_by_default(built: SegmentAnything) -> None:
    features, label = noise(2, 4, 4, 8), torch.zeros(2, 1, 8, 8)
    style = Style(phase(patch_swap={}), built, (0, 0))
    swapped = [style(features, label, step)[0] is not features for step in range(200)]
    assert 0.4 < np.mean(swapped) < 0.6


def test_training_without_style_has_the_same_digits_as_with_a_probability_of_0(make) -> None:
    off = Augment(gin=GIN(probability=0), amplitude=Amplitude(probability=0))
    transforms = [RandAmplitudeMixd(keys="image", prob=0.0), RandGINd(keys="image", prob=0.0)]
    assert [one["prob"] for one in off.transforms()] == [0, 0]
    plain, found = make(), make(*transforms)
    losses = trained(plain, phase(epochs=2))
    assert trained(found, phase(epochs=2, patch_swap={"probability": 0})) == losses
    ours, theirs = tensors(plain.network), tensors(found.network)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("settings", [SWAP, MIX], ids=["swap", "mixup"])
def test_style_changes_what_a_phase_learns_and_can_be_repeated(make, settings: Any) -> None:
    plain, first = trained(make(), phase(epochs=2)), trained(make(), phase(epochs=2, **settings))
    torch.manual_seed(7)
    assert trained(make(), phase(epochs=2, **settings)) == first
    assert first != plain and all(np.isfinite(first))


def test_style_is_of_training_alone(make) -> None:
    trainer = make()
    trainer.set_phase(phase(**SWAP, **MIX), ROLES)
    items = [0, 1, 2]
    images = torch.stack([trainer.data_loader.dataset[item]["image"] for item in items])
    trainer.network.eval()
    with torch.no_grad():
        torch.testing.assert_close(trainer.logits(images, items), trainer.network(images))


def test_a_teacher_sees_the_image_as_it_is(make) -> None:
    distillation = {"warmup_rounds": 0, "quality_gate": False}
    kept = []
    for settings in ({}, SWAP):
        trainer = make()
        trained(trainer, phase(distillation=distillation, **settings))
        assert trainer._added.teacher is not None and trainer.report.distilled_steps == trainer.report.steps
        kept.append(trainer._added.teacher.logits._kept)
    assert kept[0].keys() == kept[1].keys()
    for item, logits in kept[0].items():
        torch.testing.assert_close(kept[1][item], logits, atol=1e-5, rtol=1e-4)


# features that are computed once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("restyling", [(), (RandAmplitudeMixd(keys="image"), RandGINd(keys="image"))])
@pytest.mark.parametrize("settings", [{}, SWAP, MIX], ids=["plain", "swap", "mixup"])
def test_cached_training_has_the_losses_of_uncached_training(make, restyling: Any, settings: Any) -> None:
    phases = (phase(epochs=2, **settings), phase(epochs=2, **settings))
    expected = trained(make(*restyling), *phases)
    cache = FeatureCache(0.05)
    trainer = make(*restyling, feature_cache=cache)
    assert trained(trainer, *phases) == pytest.approx(expected, abs=1e-5)
    assert cache.hits > 0 and cache.misses == len(cache), "no pass of the trunk beside one for each item"
    for (_, item), _ in cache.rows.items():
        image = trainer.data_loader.dataset[item]["image"][None]
        kept = cache.features(trainer.network.trunk, image, [("train", item)])
        torch.testing.assert_close(kept, trainer.network.trunk(image), atol=1e-5, rtol=1e-4)


def test_a_store_that_restyled_and_plain_runs_share_never_mixes_them_up(make, tmp_path: Path) -> None:
    for restyling in ((), (RandGINd(keys="image"),), (RandAmplitudeMixd(keys="image"),), ()):
        expected = trained(make(*restyling), phase(epochs=2))
        store = FeatureStore(str(tmp_path))
        assert trained(make(*restyling, feature_cache=store), phase(epochs=2)) == pytest.approx(expected, abs=1e-5)
    assert not store.misses, "the last run is the first once more"


def test_rounds_of_other_augmentations_are_other_rounds() -> None:
    plain, other = (find_strategy(name).checked().rounds_alone() for name in ("fedavg_lora", "fedgin"))
    assert plain is not None and other is not None and plain != other
    assert other.augment == Augment(gin=GIN())


# settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {**MIX, "distillation": {}},
        {**MIX, "pseudo": {}},
        {**MIX, "smooth": {}},
        {"mixup": {"alpha": 0}},
        {"patch_swap": {"probability": 1.5}},
        {"patch_swap": {"patches": 0}},
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError) as caught:
        phase(**settings)
    assert caught.value.code == "E16"


@pytest.mark.parametrize("augment", [{"gin": {"layers": 0}}, {"amplitude": {"window": 0.6}}, {"other": {}}], ids=str)
def test_an_augmentation_that_is_none_is_refused(augment: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError) as caught:
        Strategy.of({"augment": augment})
    assert caught.value.code == "E16"


def test_images_with_boxes_as_prompts_are_not_mixed(make) -> None:
    with pytest.raises(PFedSAMError, match="box_probability") as caught:
        make(box_probability=0.5).set_phase(phase(**MIX), ROLES)
    assert caught.value.code == "E32"


def test_defaults_are_those_of_the_publications() -> None:
    assert (GIN().layers, GIN().channels, Amplitude().window) == (4, 2, 0.01)
    assert (PatchSwap().probability, Mixup().alpha) == (0.5, 0.2)


@pytest.mark.parametrize(
    "bundle", sorted(path.parents[1].name for path in folder("bundles").glob("*/configs/train.json"))
)
def test_the_transforms_of_a_strategy_come_behind_those_of_a_bundle(bundle: str) -> None:
    own = json.loads((folder("bundles") / bundle / "configs/train.json").read_text())["train"]["random_transforms"]
    found = augmentations(bundle, None, Augment(gin=GIN(), amplitude=Amplitude()))[RANDOM]
    assert found[: len(own)] == own
    behind = [one["_target_"].rsplit(".", 1)[1] for one in found[len(own) :]]
    assert behind == ["RandAmplitudeMixd", "RandGINd"]
    assert augmentations(bundle, None, None) == augmentations(bundle, None, Augment()) == {}


# at a site ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom"), sites=1, cases=6, shape=(32, 32, 6))[0]


def opened(site: Path, out: Path, name: str, bundle: str = "brain_lesion_mri", **overrides: Any) -> SiteTrainer:
    settings = {**TINY, "augmentations": 2, **overrides}
    local = SiteTrainer(bundle, site, find_strategy(name).checked(), settings, out / name)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    return local


@pytest.mark.parametrize("name", ["fedgin", "amplitude_mix", "cpss", "mixup", "warm_up", "style_adversary", "episodic"])
def test_a_variant_of_the_catalogue_trains_and_sends_what_its_base_sends(site: Path, tmp_path: Path, name: str) -> None:
    base, local = (opened(site, tmp_path, one) for one in ("fedavg_lora", name))
    plain, result = base.train(1), local.train(1)
    assert result.delta.keys() == plain.delta.keys() and not result.personal
    assert any(not torch.equal(tensor, plain.delta[key]) for key, tensor in result.delta.items())
    assert all(tensor.isfinite().all() for tensor in result.delta.values())
    cache = local.trainer.feature_cache
    assert cache is not None and cache.trained[1] == base.trainer.feature_cache.trained[1]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "kind"), [("fedgin", RandGINd), ("amplitude_mix", RandAmplitudeMixd)])
def test_a_site_restyles_with_what_the_strategy_says(site: Path, tmp_path: Path, name: str, kind: type) -> None:
    base, local = (opened(site, tmp_path, one).trainer.data_loader.dataset for one in ("fedavg_lora", name))
    *own, last = local.augment.transforms
    assert isinstance(last, kind) and [type(one) for one in own] == [type(one) for one in base.augment.transforms]
    assert not any(torch.equal(local[item]["image"], base[item]["image"]) for item in range(len(base)))
    assert all(torch.equal(local[item]["label"], base[item]["label"]) for item in range(len(base)))


def test_with_one_variant_there_is_nothing_to_restyle_and_that_is_said(site: Path, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match="'augmentations' is 1") as caught:
        opened(site, tmp_path, "fedgin", augmentations=1)
    assert caught.value.code == "E32"
    opened(site, tmp_path, "cpss", augmentations=1).train(1)  # it needs no variant


def test_a_bundle_without_augmentations_is_named(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "bundles" / "mine"
    shutil.copytree(installed_bundles()["brain_lesion_mri"], mine)
    file = mine / "configs" / "train.json"
    content = json.loads(file.read_text())
    del content["train"]["random_transforms"]
    file.write_text(json.dumps(content))
    monkeypatch.setenv(BUNDLES_VARIABLE, str(mine.parent))
    with pytest.raises(PFedSAMError, match="bundle 'mine' draws none: it has no list") as caught:
        opened(site, tmp_path, "fedgin", "mine")
    assert caught.value.code == "E32"
