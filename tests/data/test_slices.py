"""Slices of volumes: their channels, their pre-drawn augmentations, and what is drawn in an epoch."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import Tensor

from pfedsam.data.slices import EpochSampler, Grey, SliceChannelsd, SliceDataset, slice_channels
from pfedsam.errors import PFedSAMError


def volume(
    number: int, depth: int = 6, labelled: tuple[int, ...] = (1, 2, 3, 4), classes: int = 1
) -> dict[str, Tensor]:
    label = torch.zeros(classes, 8, 8, depth)
    for z in labelled:
        label[z % classes, 2:5, 2:5, z] = 1
    return {"image": torch.rand(1, 8, 8, depth, generator=torch.Generator().manual_seed(number)), "label": label}


def augmentation() -> Compose:
    return Compose(
        [RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=0), RandGaussianNoised(keys="image", prob=1.0)]
    )


def dataset(volumes: list[dict[str, Tensor]] | None = None, **settings) -> SliceDataset:
    return SliceDataset(volumes or [volume(0), volume(1, 9, (4,))], lambda item: dict(item), **settings)


def same(one: dict, two: dict) -> bool:
    return all(torch.equal(one[key], two[key]) for key in ("image", "label"))


# channels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "expected"), [(0, [0, 0, 1]), (2, [1, 2, 3]), (4, [3, 4, 4])])
def test_neighbours_are_the_channels_and_the_outermost_slices_are_repeated(index, expected):
    ramp = torch.arange(5.0).expand(1, 2, 2, 5)
    assert slice_channels(ramp, index)[:, 0, 0].tolist() == expected
    assert slice_channels(ramp)[:, 0, 0, index].tolist() == expected
    assert slice_channels(ramp, index, "same")[:, 1, 1].tolist() == [index] * 3


def test_volume_of_one_slice_is_repeated():
    assert slice_channels(torch.ones(1, 4, 4, 1)).shape == (3, 4, 4, 1)


def test_transform_of_a_volume_has_the_slices_of_the_dataset():
    item = volume(0)
    whole = SliceChannelsd(keys="image")(item)
    slices = dataset([item])
    assert torch.equal(whole["label"], item["label"])
    for z in range(6):
        assert torch.equal(slices[z]["image"], whole["image"][..., z])


# variants -------------------------------------------------------------------------------------------------------------


def test_items_without_augmentation_are_the_exact_slices():
    volumes = [volume(0), volume(1, 9, (4,), classes=1)]
    slices = dataset(volumes, variants=4)
    assert slices.variants == 1 and len(slices) == 15
    for index, (number, z) in enumerate(slices.slices):
        item = slices[index]
        assert torch.equal(item["image"], slice_channels(volumes[number]["image"], z))
        assert torch.equal(item["label"], volumes[number]["label"][..., z])
        assert item["index"] == index and item["image"].dtype == item["label"].dtype == torch.float32


def test_variant_is_a_function_of_seed_and_item_in_any_order():
    one, two = (dataset(augment=augmentation(), variants=3, seed=1) for _ in range(2))
    items = [one[i] for i in range(len(one))]
    np.random.seed(5)
    torch.manual_seed(5)
    for i in reversed(range(len(two))):
        assert same(two[i], items[i])
    assert same(one[7], items[7])
    # three variants of one slice differ, and so do those of another seed
    assert not any(same(items[0], items[i]) for i in (1, 2))
    other = dataset(augment=augmentation(), variants=3, seed=2)
    assert not any(same(other[i], items[i]) for i in range(len(other)))


def test_reading_an_item_does_not_move_the_global_random_state():
    slices = dataset(augment=augmentation())
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    _ = slices[3]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numbers).all()  # type: ignore[index]


def test_augmentation_that_writes_in_place_does_not_change_the_volume():
    def blank(item):
        item["image"].zero_()
        item["label"].zero_()
        return item

    volumes = [volume(0)]
    kept = {key: value.clone() for key, value in volumes[0].items()}
    slices = dataset(volumes, augment=blank, variants=2)
    for i in range(len(slices)):
        assert not slices[i]["label"].any()
    assert same(slices.volumes[0], kept)


def test_slices_with_and_without_a_label_are_told_apart_over_all_classes():
    slices = dataset([volume(0, 6, (1, 2), classes=2), volume(1, 3, ())])
    assert slices.positive == [[1, 2], []]
    assert slices.negative == [[0, 3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("volumes", [[volume(0, 6, ())], []], ids=["no label", "no case"])
def test_data_without_a_labelled_slice_is_refused(volumes):
    with pytest.raises(PFedSAMError) as caught:
        SliceDataset(volumes, lambda item: dict(item))
    assert caught.value.code == "E06"


# draws ----------------------------------------------------------------------------------------------------------------


CASES = {
    "many": [volume(0, 30, tuple(range(5, 25))), volume(1, 30, tuple(range(8, 20)))],
    "few labels": [volume(0, 30, (3,)), volume(1, 30, (4, 5))],
    "one label": [volume(0, 30, (3,))],
    "case without a label": [volume(0, 12, (3, 4, 5)), volume(1, 12, ())],
    "labels everywhere": [volume(0, 6, tuple(range(6)))],
}


@pytest.fixture(params=CASES)
def slices(request) -> SliceDataset:
    return dataset(CASES[request.param], augment=augmentation(), variants=4)


def test_draw_is_a_function_of_seed_and_number():
    slices = dataset(CASES["many"], augment=augmentation(), variants=4)
    one, two, other = (EpochSampler(slices, seed=seed) for seed in (3, 3, 4))
    draws = []
    for draw in ((0, 1), (0, 2), (1, 1), (1, 2)):
        for sampler in (one, two, other):
            sampler.set_draw(*draw)
        assert list(one) == list(one) == list(two)
        assert list(one) != list(other)
        draws.append(tuple(one))
    assert len(set(draws)) == 4


def test_epoch_has_always_the_same_length_and_at_least_two_labelled_slices_for_one_without(slices):
    sampler = EpochSampler(slices, positives_per_case=8, negatives_per_case=4)
    positive = set().union(*map(set, slices.positive))
    for draw in range(20):
        sampler.set_draw(draw)
        items = list(sampler)
        drawn = [item // slices.variants for item in items]
        assert len(items) == len(sampler) and len(set(drawn)) == len(drawn)
        assert all(0 <= item < len(slices) and isinstance(item, int) for item in items)
        labelled = [z for z in drawn if z in positive]
        assert len(labelled) >= 2 * (len(drawn) - len(labelled))
        for p, n in zip(slices.positive, slices.negative, strict=True):
            assert len(set(p) & set(drawn)) == min(8, len(p))
            assert len(set(n) & set(drawn)) <= 4


def test_every_slice_and_variant_is_drawn_at_last():
    slices = dataset(CASES["many"], augment=augmentation(), variants=2)
    sampler = EpochSampler(slices)
    seen: set[int] = set()
    for draw in range(200):
        sampler.set_draw(draw)
        seen |= set(sampler)
    assert seen == set(range(len(slices)))


def test_cases_of_many_slices_do_not_outweigh_the_others():
    slices = dataset([volume(0, 40, tuple(range(40))), volume(1, 10, (3, 4, 5))])
    sampler = EpochSampler(slices, positives_per_case=3, negatives_per_case=0)
    drawn = [slices.slices[item][0] for item in sampler]
    assert drawn.count(0) == drawn.count(1) == 3 and sampler.negatives == 0


def test_all_slices_take_no_more_memory_than_the_volume_and_are_those_of_each_slice() -> None:
    grey = torch.rand(1, 5, 4, 9)
    for way in get_args(Grey):
        together = slice_channels(grey, grey=way)
        assert together.shape == (3, 5, 4, 9)
        assert all(torch.equal(together[..., z], slice_channels(grey, z, way)) for z in range(9))
        assert together.untyped_storage().nbytes() <= 4 * 5 * 4 * (9 + 2)


def test_labels_are_kept_in_a_byte_and_soft_ones_as_they_are() -> None:
    hard = dataset()
    assert hard.volumes.window(0, 0, 2)["label"].dtype == torch.uint8 and hard[0]["label"].dtype == torch.float32
    soft = volume(0)
    soft["label"] = soft["label"] * 0.5
    kept = dataset([soft, volume(1, 9, (4,))])
    first = kept.positive[0][0]
    assert float(kept[first * kept.variants]["label"].max()) == 0.5
