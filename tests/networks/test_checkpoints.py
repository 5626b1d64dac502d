"""Base weights as training scripts write them: taken, or refused by the name of what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedsam.errors import PFedSAMError
from pfedsam.networks.loading import load_base, read_checkpoint
from pfedsam.networks.sam import build_network
from pfedsam.parameters import ADDED, group_of

STATE: dict[str, Tensor] = {"image_encoder.a": torch.ones(2), "mask_decoder.b": torch.zeros(3)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def prefixed(*prefixes: str) -> dict[str, Tensor]:
    return {"".join(prefixes) + name: value for name, value in STATE.items()}


WRITTEN = {
    "plain": STATE,
    "model": {"model": STATE, "epoch": 3},
    "state_dict": {"state_dict": STATE, "lr": 0.1},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": {"state": {}}},
    "wrapped twice": {"model": {"state_dict": STATE}},
    "several GPUs": prefixed("module."),
    "inside a network": prefixed("sam."),
    "lightning": {"state_dict": prefixed("model.")},
    "several GPUs, inside a network": {"model": prefixed("module.", "sam.")},
    "prefix twice": prefixed("module.", "module."),
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_wrappers_and_prefixes_are_taken_away(tmp_path: Path, content: Any) -> None:
    found = read_checkpoint(save(tmp_path / "a.pth", content))
    assert sorted(found) == sorted(STATE) and all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_a_prefix_of_some_names_only_stays_and_is_named(tmp_path: Path) -> None:
    mixed = {**prefixed("sam."), "head.weight": torch.ones(1)}
    assert sorted(read_checkpoint(save(tmp_path / "a.pth", mixed))) == sorted(mixed)
    network = build_network("vit_test", 64, 1, None)
    with pytest.raises(PFedSAMError, match=r"E10.*is missing.*the file has 'head\.weight', 'sam\."):
        load_base(network, mixed, "a.pth")


WRONG = {
    "two models": ({"model": STATE, "state_dict": STATE}, r"several models: \['model', 'state_dict'\]"),
    "an unknown key": ({"teacher": STATE}, "'teacher' is none.*'model', 'state_dict'"),
    "a list": ([torch.ones(1)], "list"),
}


@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: Any, words: str) -> None:
    path = save(tmp_path / "a.pth", content)
    with pytest.raises(PFedSAMError, match=f"E10.*a\\.pth.*{words}"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    network = build_network("vit_test", 64, 1, None)
    state = {n: tensor.clone() for n, tensor in network.state_dict().items() if group_of(n) not in ADDED}
    load_base(network, state, "a.pth")
    name = next(name for name in sorted(state) if name.startswith("image_encoder") and state[name].is_floating_point())
    state[name].view(-1)[0] = value
    with pytest.raises(PFedSAMError, match=rf"E10.*a\.pth: tensor '{name}' holds values that are not finite"):
        load_base(network, state, "a.pth")
