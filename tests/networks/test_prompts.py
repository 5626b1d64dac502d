"""Boxes: the same tokens as segment-anything's, the same masks one by one as in a batch, deterministic in training."""

from __future__ import annotations

import torch

from pfedsam.networks.prompts import box_tokens, boxes_of, training_boxes
from pfedsam.networks.sam import build_network

BOXES = torch.tensor([[4.0, 8.0, 40.0, 50.0], [0.0, 0.0, 63.0, 63.0], [10.0, 20.0, 11.0, 21.0]])


def network():
    return build_network("vit_test", 64, 2)


def test_tokens_equal_segment_anythings() -> None:
    prompt = network().prompt_encoder
    expected, _ = prompt(points=None, boxes=BOXES, masks=None)
    assert torch.equal(box_tokens(prompt, BOXES), expected)


def test_an_image_without_a_box_gets_padding() -> None:
    prompt = network().prompt_encoder
    boxes = BOXES.clone()
    boxes[1] = float("nan")
    tokens = box_tokens(prompt, boxes)
    assert torch.equal(tokens[0], box_tokens(prompt, BOXES)[0])
    assert torch.equal(tokens[1], prompt.not_a_point_embed.weight.expand(2, -1))


def test_a_batch_equals_single_images_and_no_prompt_is_restored() -> None:
    one, images = network(), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        plain = one(images)
        with one.prompted(BOXES):
            batch = one(images)
        for number in range(3):
            with one.prompted(BOXES[number : number + 1]):
                assert torch.allclose(batch[number], one(images[number : number + 1])[0], atol=1e-5)
        assert torch.equal(plain, one(images)) and not torch.allclose(plain, batch, atol=1e-4)


def test_boxes_around_masks() -> None:
    masks = torch.zeros(2, 2, 8, 9)
    masks[0, 0, 2:5, 3:7] = 1
    masks[0, 1, 6, 1] = 1
    boxes = boxes_of(masks)
    assert boxes[0].tolist() == [1, 2, 6, 6] and boxes[1].isnan().all()


def test_training_boxes_are_a_function_of_the_item() -> None:
    label = torch.zeros(40, 1, 32, 32)
    label[:30, :, 8:20, 10:24] = 1
    items = list(range(40))
    boxes = training_boxes(label, items, 0.5)
    assert boxes is not None and boxes[30:].isnan().all()
    given = ~boxes[:30].isnan().any(dim=1)
    assert 5 < int(given.sum()) < 25
    assert (boxes[:30][given] >= 0).all() and (boxes[:30][given] <= 31).all()
    again = training_boxes(label[7:9], [7, 8], 0.5)
    expected = boxes[7:9]
    assert (again is None and expected.isnan().all()) or torch.equal(again.nan_to_num(-1), expected.nan_to_num(-1))
    assert training_boxes(label, items, 0.0) is None
