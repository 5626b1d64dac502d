"""Restyled slices: where nothing changes, what is kept, and that a variant is a function of the seed and the item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import Tensor

from pfedsam.data.restyle import (
    RandAmplitudeMixd,
    RandGINd,
    mixed_amplitudes,
    random_net,
    restyled,
    through,
    within_range,
)
from pfedsam.data.slices import OTHERS, OtherSlices, SliceDataset
from pfedsam.errors import PFedSAMError

SIDE = 24


def picture(seed: int, side: int = SIDE) -> Tensor:
    """Three smooth channels in [0, 1] that differ."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[0]


def net(seed: int, layers: int = 4, channels: int = 2):
    return random_net(np.random.RandomState(seed), layers, channels)


def volume(number: int, labelled: tuple[int, ...] = (1, 2, 3)) -> dict[str, Tensor]:
    label = torch.zeros(1, SIDE, SIDE, 5)
    for z in labelled:
        label[:, 4:12, 6:14, z] = 1
    image = torch.rand(1, SIDE, SIDE, 5, generator=torch.Generator().manual_seed(number))
    return {"image": image, "label": label}


def bundles_own() -> list[Any]:
    return [RandFlipd(keys=["image", "label"], prob=0.5, spatial_axis=0), RandGaussianNoised(keys="image", prob=1.0)]


def dataset(*restyling: Any, volumes: int = 3, **settings: Any) -> SliceDataset:
    steps = Compose([*bundles_own(), *restyling])
    data = [volume(number) for number in range(volumes)]
    return SliceDataset(data, lambda item: dict(item), steps, **{"variants": 2, **settings})


#: Each transform with probability p.
KINDS = {"gin": RandGINd, "amplitude": RandAmplitudeMixd}


# random nets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_a_blend_of_no_strength_is_the_image_itself(seed: int) -> None:
    image = picture(seed)
    assert torch.equal(restyled(image, [net(seed)], 0.0), image)


def test_a_blend_is_the_published_one_mapped_back_to_the_range_of_the_image() -> None:
    left = 0
    for seed in range(20):
        image, one, a = picture(seed), net(seed), seed / 19
        blend = (1 - a) * image + a * torch.cat([through(one, channel[None, None])[0] for channel in image])
        published = blend * (image.norm() / blend.norm())
        left += float(published.min()) < 0 or float(published.max()) > 1
        found = restyled(image, [one], a)
        part = (blend - blend.min()) / (blend.max() - blend.min())
        torch.testing.assert_close(found, torch.lerp(image.min(), image.max(), part), atol=1e-5, rtol=1e-4)
        assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert left > 5, "the published form leaves the range"


def test_a_net_is_convolutions_with_a_leaky_relu_behind_each_but_the_last() -> None:
    made = net(3, layers=3, channels=2)
    assert [tuple(weights.shape[:2]) for weights, _ in made] == [(2, 1), (2, 2), (1, 2)]
    assert {weights.shape[-1] for seed in range(5) for weights, _ in net(seed)} == {1, 3}
    image = picture(0)[:1, None]
    expected = image
    for number, (weights, shifts) in enumerate(made):
        side = weights.shape[-1]
        layer = torch.nn.Conv2d(*weights.shape[1::-1], side, padding=side // 2, padding_mode="replicate")
        layer.weight.data, layer.bias.data = weights, shifts  # type: ignore[union-attr]
        expected = layer(torch.nn.functional.leaky_relu(expected, 0.01) if number else expected)
    torch.testing.assert_close(through(made, image), expected.detach())
    assert float(through(made, image).min()) < 0, "nothing cuts the last layer off"


def test_no_channel_reaches_into_another() -> None:
    image, other = picture(0), picture(1)
    mixed = torch.stack([image[0], other[1], other[2]])
    for nets in ([net(2)], [net(2), net(3), net(4)]):
        first, second = (restyled(one, nets, 0.7)[0].flatten() for one in (image, mixed))
        # the range is that of the whole image, so the channel is the same up to scale and shift
        correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
        assert correlation == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("alike", [True, False])
def test_channels_that_are_alike_stay_so_unless_each_has_its_own_net(alike: bool) -> None:
    image = picture(0)[:1].repeat(3, 1, 1)
    transform = RandGINd(keys="image", alike=alike).set_random_state(seed=1)
    found = transform({"image": image})["image"]
    assert torch.allclose(found[0], found[1], atol=1e-6) == alike
    assert not torch.allclose(found[0], image[0], atol=1e-4)


def test_an_image_of_one_value_stays_as_it_is_and_one_outside_0_to_1_keeps_its_range() -> None:
    for image in (torch.zeros(3, 8, 8), torch.full((3, 8, 8), 0.4), picture(0) * 1.2 - 0.1):
        found = restyled(image, [net(0)], 0.5)
        assert found.isfinite().all()
        torch.testing.assert_close([*found.aminmax()], [*image.aminmax()], atol=1e-5, rtol=0)
        assert float(found.min()) >= float(image.min()) and float(found.max()) <= float(image.max())


def test_what_is_in_the_range_is_not_touched() -> None:
    image = picture(0)
    assert torch.equal(within_range(image), image)
    assert within_range(torch.tensor([-1.0, 0.0, 3.0])).tolist() == [0, 0.25, 1]


# amplitudes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [24, 25])
def test_with_its_own_amplitudes_alone_an_image_stays_as_it_is(side: int) -> None:
    image, other = picture(0, side), picture(1, side)
    for window in (0.0, 0.1, 0.5):
        torch.testing.assert_close(mixed_amplitudes(image, other, 1.0, window), image, atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed_amplitudes(image, image, 0.3, window), image, atol=1e-5, rtol=0)


def test_amplitudes_are_mixed_in_the_window_alone_and_the_phase_stays() -> None:
    image, other = picture(0, 128), picture(1, 128)
    found = torch.fft.fft2(mixed_amplitudes(image, other, 0.25, 0.01))
    own, others = torch.fft.fft2(image), torch.fft.fft2(other)
    window = torch.zeros(3, 128, 128, dtype=torch.bool)
    for row in (-1, 0, 1):
        window[:, row, [-1, 0, 1]] = True
    assert int(window.sum()) == 27
    wanted = torch.where(window, 0.25 * own.abs() + 0.75 * others.abs(), own.abs())
    torch.testing.assert_close(found.abs(), wanted, atol=2e-3, rtol=1e-4)
    strong = own.abs() > 1
    torch.testing.assert_close((found / own).angle()[strong], torch.zeros(int(strong.sum())), atol=1e-3, rtol=0)


def test_a_window_of_one_frequency_shifts_the_mean_of_each_channel() -> None:
    image, other = picture(0), picture(1)
    shift = mixed_amplitudes(image, other, 0.5, 0.0) - image
    wanted = (other.mean((1, 2)) - image.mean((1, 2))) / 2
    torch.testing.assert_close(shift, wanted[:, None, None].expand_as(shift), atol=1e-5, rtol=0)


def test_the_other_slice_is_one_with_a_label_of_another_case() -> None:
    data = [volume(0), volume(1, (2,)), volume(2, ()), volume(3, (0, 4))]
    slices = SliceDataset(data, lambda item: dict(item))
    random = np.random.RandomState(0)
    allowed = [slices.plain(index)["image"] for case in (1, 3) for index in slices.positive[case]]
    drawn = [OtherSlices(slices, 0).draw(random) for _ in range(40)]
    seen = [[number for number, one in enumerate(allowed) if torch.equal(one, image)] for image in drawn]
    assert {number for (number,) in seen} == {0, 1, 2}
    alone = SliceDataset(data[:1], lambda item: dict(item))
    own = [alone.plain(index)["image"] for index in alone.positive[0]]
    assert any(torch.equal(OtherSlices(alone, 0).draw(random), image) for image in own)


def test_a_data_set_without_other_slices_is_refused() -> None:
    with pytest.raises(PFedSAMError, match="SliceDataset") as caught:
        RandAmplitudeMixd(keys="image")({"image": picture(0)})
    assert caught.value.code == "E32"


# variants -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_at_probability_0_the_variants_are_those_of_the_bundle_alone(kind: str) -> None:
    plain, found, on = dataset(), dataset(KINDS[kind](keys="image", prob=0.0)), dataset(KINDS[kind](keys="image"))
    for index in range(len(plain)):
        assert all(torch.equal(plain[index][key], found[index][key]) for key in ("image", "label"))
        # what the bundle draws before is the same, so the label is
        assert torch.equal(plain[index]["label"], on[index]["label"])
        assert not torch.equal(plain[index]["image"], on[index]["image"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_restyled_variant_is_a_function_of_seed_and_item_in_any_order(kind: str) -> None:
    one, two, other = (dataset(KINDS[kind](keys="image"), seed=seed) for seed in (1, 1, 2))
    images = [one[index]["image"] for index in range(len(one))]
    np.random.seed(5)
    torch.manual_seed(5)
    state, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for index in reversed(range(len(two))):
        assert torch.equal(two[index]["image"], images[index])
        assert not torch.equal(other[index]["image"], images[index])
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numbers).all()  # type: ignore[index]
    assert not torch.equal(images[0], images[1]), "two variants of one slice"


@pytest.mark.parametrize("kind", KINDS)
def test_a_restyled_variant_is_in_the_range(kind: str) -> None:
    data = [volume(number) for number in range(3)]
    slices = SliceDataset(data, lambda item: dict(item), Compose([KINDS[kind](keys="image")]), variants=6)
    images = torch.stack([slices[index]["image"] for index in range(len(slices))])
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert float(images.std((2, 3)).min()) > 0.01, "something is left to be seen"


def test_an_item_holds_what_it_held() -> None:
    assert set(dataset(RandGINd(keys="image"))[0]) == {"image", "label", "index"}
    assert OTHERS not in dataset(RandAmplitudeMixd(keys="image"))[3]
