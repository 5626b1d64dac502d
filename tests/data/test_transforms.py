"""Labels as class channels, a site's own values, pictures as volumes of one slice."""

from __future__ import annotations

import pytest
import torch

from pfedsam.data.labels import class_numbers
from pfedsam.data.slices import slice_channels
from pfedsam.data.transforms import (
    ClassChannelsd,
    ClassNumbersd,
    PictureAsVolumed,
    VolumeAsPictured,
    class_map,
)
from pfedsam.errors import PFedSAMError

NESTED = [[1, 2], [2]]
LABEL = torch.tensor([[[0.0, 1.0], [2.0, 1.0]]])


def test_nested_and_separate_classes_become_channels() -> None:
    nested = ClassChannelsd("label", NESTED, ["disc", "cup"])({"label": LABEL})["label"]
    assert nested.tolist() == [[[0, 1], [1, 1]], [[0, 0], [1, 0]]]
    apart = ClassChannelsd("label", [[1], [2]], ["liver", "tumour"])({"label": LABEL})["label"]
    assert apart.tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 0]]]


def test_a_sites_own_values_are_mapped_by_name() -> None:
    own = torch.tensor([[[0.0, 7.0], [9.0, 5.0]]])
    told = {"7": "disc", "9": "cup", "5": "background"}
    mapped = ClassChannelsd("label", NESTED, ["disc", "cup"], told)({"label": own})["label"]
    assert mapped.tolist() == [[[0, 1], [1, 0]], [[0, 0], [1, 0]]]
    assert class_numbers(["disc", "cup"], told) == {0: 0, 7: 1, 9: 2, 5: 0}


def test_a_map_may_name_values_that_a_label_does_not_hold() -> None:
    told = {"1": "disc", "300": "cup"}
    transform = ClassChannelsd("label", NESTED, ["disc", "cup"], told)
    assert transform({"label": torch.tensor([[[0.0, 1.0]]])})["label"].tolist() == [[[0, 1]], [[0, 0]]]
    assert transform({"label": torch.tensor([[[300.0, 1.0]]])})["label"].tolist() == [[[1, 1]], [[1, 0]]]


@pytest.mark.parametrize("wrong", [{"7": "retina"}, {"seven": "disc"}])
def test_a_wrong_map_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(PFedSAMError, match="E01"):
        class_numbers(["disc", "cup"], wrong)


def test_an_unknown_value_is_refused_and_black_and_white_is_mapped() -> None:
    transform = ClassChannelsd("label", [[1]], ["lesion"])
    with pytest.raises(PFedSAMError, match="E07"):
        transform({"label": LABEL})
    assert transform({"label": torch.tensor([[[0.0, 255.0]]])})["label"].tolist() == [[[0, 1]]]


def test_class_numbers_of_probabilities_take_the_inner_class() -> None:
    probabilities = torch.tensor([[0.9, 0.9, 0.2, 0.1], [0.1, 0.8, 0.7, 0.2]])
    assert class_map(probabilities).tolist() == [1, 2, 2, 0]
    assert ClassNumbersd("pred")({"pred": probabilities})["pred"].tolist() == [[1, 2, 2, 0]]


def test_of_classes_beside_each_other_the_most_probable_is_taken() -> None:
    """Left and right: where both are likely, the second must not win because it is the second."""
    probabilities = torch.tensor([[0.9, 0.6, 0.2, 0.1], [0.6, 0.9, 0.7, 0.2]])
    beside = [[1], [2]]
    assert class_map(probabilities, values=beside).tolist() == [1, 2, 2, 0]
    assert class_map(probabilities).tolist() == [2, 2, 2, 0]
    assert ClassNumbersd("pred", beside)({"pred": probabilities})["pred"].tolist() == [[1, 2, 2, 0]]
    # an organ with a tumour inside, and another organ
    mixed = torch.tensor([[0.9, 0.6, 0.3], [0.8, 0.6, 0.3], [0.7, 0.8, 0.6]])
    assert class_map(mixed, values=[[1, 2], [2], [3]]).tolist() == [2, 3, 3]
    # channels in another order: nested are those that share a number, wherever they stand
    assert class_map(mixed[[2, 0, 1]], values=[[3], [1, 2], [2]]).tolist() == [3, 1, 1]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_is_a_volume_of_one_slice_in_three_channels(channels: int) -> None:
    picture = torch.rand(channels, 5, 4)
    volume = PictureAsVolumed("image", colour=True)({"image": picture})["image"]
    assert volume.shape == (3, 5, 4, 1)
    assert torch.equal(volume[0, ..., 0], picture[0])
    assert torch.equal(slice_channels(volume, 0), volume[..., 0])
    assert torch.equal(VolumeAsPictured("image")({"image": volume})["image"], volume[..., 0])
