"""Federations in one process: rounds that several strategies share, and runs that were stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor

import pfedsam.training.federation as module
from pfedsam.data.phantom import write_phantom
from pfedsam.data.splitting import write_datalist
from pfedsam.parameters import COPY, shared_state
from pfedsam.storage.site_model import read
from pfedsam.training.catalogue import find_strategy, strategy_names
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
SITES, ROUNDS = ("site-1", "site-2"), 2
TINY = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("federation") / "data"
    write_phantom(folder, sites=len(SITES), cases=6, shape=(32, 32, 6))
    return folder


def federation(data: Path, out: Path, name: str = "pfedsam", **overrides: Any) -> Federation:
    file = find_strategy(name)
    sites = {site: data / site for site in SITES}
    return Federation("brain_lesion_mri", sites, file.checked(), out, ROUNDS, {**TINY, **file.overrides, **overrides})


def test_rounds_apart_give_what_the_whole_gives(data: Path, tmp_path: Path) -> None:
    whole, parted = federation(data, tmp_path / "whole"), federation(data, tmp_path / "parted")
    run_federation(whole)
    parted.shared_rounds = parted.rounds_alone(tmp_path / "rounds")
    assert parted.shared_rounds is not None
    run_federation(parted)
    first, _ = whole.global_model()
    second, rounds = parted.global_model()
    assert rounds == ROUNDS and first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)
    for site in SITES:
        mine, theirs = read(whole.model_of(site)), read(parted.model_of(site))
        assert mine.personal and mine.personal.keys() == theirs.personal.keys()
        for name, tensor in mine.personal.items():
            torch.testing.assert_close(theirs.personal[name], tensor, rtol=0, atol=1e-5)
        assert theirs.info["final"] and theirs.info["round"] == ROUNDS
    notes = [(note["round"], note["site"], len(note["phases"])) for note in parted.history()]
    assert notes == [(note["round"], note["site"], len(note["phases"])) for note in whole.history()]


def test_another_strategy_goes_on_from_the_same_rounds(data: Path, tmp_path: Path) -> None:
    ours, theirs = federation(data, tmp_path / "a"), federation(data, tmp_path / "b", "fedavg_lora_ft")
    ours.shared_rounds, theirs.shared_rounds = (one.rounds_alone(tmp_path / "rounds") for one in (ours, theirs))
    assert (
        ours.shared_rounds is not None
        and theirs.shared_rounds is not None
        and ours.shared_rounds.out == theirs.shared_rounds.out
    )
    run_federation(ours)
    before = (ours.shared_rounds.out / "history.jsonl").read_bytes()
    run_federation(theirs)
    assert (ours.shared_rounds.out / "history.jsonl").read_bytes() == before, "done once"
    model = read(theirs.model_of(SITES[0]))
    assert model.copy and any(not tensor.equal(model.shared[name]) for name, tensor in model.copy.items())


def test_sites_weigh_as_the_strategy_says(data: Path, tmp_path: Path) -> None:
    """The reference: each site trained alone for a round, then the mean by hand."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for kind in ("images", "labels"):  # another number of cases than its neighbour
        for path in sorted((folder / "site-2" / kind).iterdir())[:2]:
            path.unlink()
    assert len(write_datalist(folder / "site-2").absent) == 2
    means = {}
    for weights in ("cases", "uniform"):
        strategy = find_strategy("fedavg_lora").checked().model_copy(update={"weights": weights, "aggregation": "mean"})
        one = Federation(
            "brain_lesion_mri", {site: folder / site for site in SITES}, strategy, tmp_path / weights, 1, TINY
        )
        locals_ = [module._open(one, site) for site in SITES]
        start, _ = module._start(one, dict(zip(SITES, locals_, strict=True)))
        counts = [len(local.cases) for local in locals_]
        assert counts[0] != counts[1]
        assert [local.weight for local in locals_] == (counts if weights == "cases" else [1, 1])
        ends = []
        for local in locals_:
            local.receive(start, local.fingerprint)
            ends.append({name: start[name] + change for name, change in local.train(0).delta.items()})
        run_federation(one)
        means[weights], _ = one.global_model()
        share = counts[0] / sum(counts) if weights == "cases" else 0.5
        for name, tensor in means[weights].items():
            wanted = share * ends[0][name] + (1 - share) * ends[1][name]
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-5)
    assert any(not torch.equal(tensor, means["uniform"][name]) for name, tensor in means["cases"].items())


@pytest.mark.parametrize("name", ["local_phase_each_round", "ditto"])
def test_rounds_that_train_a_personal_model_tell_its_dice_and_looking_changes_nothing(
    data: Path, tmp_path: Path, name: str
) -> None:
    ends = {}
    for every in (1, 9):
        one = federation(data, tmp_path / str(every), name)
        one.strategy = one.strategy.model_copy(update={"validate_every": every})
        run_federation(one)
        told = [(note["round"], "val_dice_personal" in note) for note in one.history() if note["site"] == SITES[0]]
        assert told == [(number, every == 1 or number == ROUNDS) for number in range(ROUNDS + 1)]
        ends[every] = read(one.model_of(SITES[0]))
    for part in ("shared", "personal"):
        for key, tensor in getattr(ends[1], part).items():
            assert torch.equal(tensor, getattr(ends[9], part)[key]), key


def test_the_dice_of_a_round_is_of_the_pair_that_is_kept(data: Path, tmp_path: Path) -> None:
    """After the shared phase the network has a theta of this site alone; the personal part is not beside that one."""
    strategy = find_strategy("local_phase_each_round").checked().model_copy(update={"validate_every": 1})
    one = Federation("brain_lesion_mri", {"site-1": data / "site-1"}, strategy, tmp_path, 1, TINY)
    local = module._open(one, "site-1")
    start, _ = module._start(one, {"site-1": local})
    local.receive(start, local.fingerprint)
    result = local.train(0)
    assert any(change.any() for change in result.delta.values())
    looked = []

    def look() -> None:
        looked.append(shared_state(local.network, strategy.roles))

    local.evaluator.add_event_handler(Events.STARTED, look)
    assert local.personal_dice(0) is not None
    (used,) = looked
    assert used.keys() == start.keys()
    for key, tensor in used.items():
        assert torch.equal(tensor, start[key]), key


def test_strategies_without_a_personal_model_in_the_rounds_tell_no_dice_of_one() -> None:
    for name in strategy_names():
        strategy = find_strategy(name).checked()
        in_rounds = name in ("ditto", "feddpa", "fedrep", "fedsa", "fedln")
        assert strategy.rounds_are_personal == in_rounds, name


@pytest.mark.parametrize(
    ("name", "whole"), [("pfedsam", "without_interpolation"), ("fedavg_lora_ft_interpolated", "fedavg_lora_ft")]
)
def test_a_site_keeps_the_model_halfway_to_the_global_one(name: str, whole: str, data: Path, tmp_path: Path) -> None:
    ours, theirs = federation(data, tmp_path / "a", name), federation(data, tmp_path / "b", whole)
    for one in (ours, theirs):
        one.shared_rounds = one.rounds_alone(tmp_path / "rounds")
        run_federation(one)
    for site in SITES:
        mine, trained = read(ours.model_of(site)), read(theirs.model_of(site))
        halved = {
            key for key in trained.personal if key.startswith(COPY) or key.rpartition(".")[2] in ("up", "up_bias")
        }
        assert halved and any(not trained.personal[key].equal(mine.personal[key]) for key in halved)
        for key, tensor in trained.personal.items():
            start = trained.shared.get(key.removeprefix(COPY), torch.zeros_like(tensor))
            expected = (start + tensor) / 2 if key in halved else tensor
            torch.testing.assert_close(mine.personal[key], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["feddpa", "ditto", "fedrep", "fedsa", "local_phase_each_round", "distil_mutual"])
def test_rounds_with_something_personal_stand_for_themselves(name: str, data: Path, tmp_path: Path) -> None:
    assert federation(data, tmp_path, name).rounds_alone(tmp_path / "rounds") is None


# runs that were stopped -----------------------------------------------------------------------------------------------


#: Features that are kept in memory were computed in other batches after a stop, and differ in the last bit.
UNCACHED = {"cache_limit_gb": 0}


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def unstopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    whole = federation(data, tmp_path_factory.mktemp("unstopped"), "feddpa", **UNCACHED)
    run_federation(whole)
    return whole


def stop_at(number: int, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end when a function that writes a file is called for the n-th time, before it writes."""
    original, calls = getattr(module, function), 0

    def stops(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Stopped
        original(*arguments)

    monkeypatch.setattr(module, function, stops)


def everything(one: Federation) -> dict[str, Tensor]:
    """Every tensor on disk: the global model, and what each site keeps."""
    found = {f"global {name}": tensor for name, tensor in one.global_model()[0].items()}
    for site in SITES:
        model = read(one.model_of(site))
        for part in ("shared", "personal", "moments"):
            found |= {f"{site} {part} {name}": tensor for name, tensor in getattr(model, part).items()}
    return found


def notes(one: Federation) -> list[dict[str, Any]]:
    return [{key: value for key, value in note.items() if key != "seconds"} for note in one.history()]


#: where it stops: function, its call (two sites: two models a round), rounds done by then, sites with a final model
STOPS = {
    "first round, second site": ("write", 2, 0, 0),
    "second round, second site": ("write", 4, 1, 0),
    "second round, global model": ("write_atomically", 2, 1, 0),
    "final phase, first site": ("write", 5, 2, 0),
    "final phase, second site": ("write", 6, 2, 1),
}


@pytest.mark.parametrize(("function", "call", "rounds", "finals"), STOPS.values(), ids=STOPS)
def test_a_run_that_was_stopped_gives_what_a_run_that_was_not_gives(
    function: str,
    call: int,
    rounds: int,
    finals: int,
    unstopped: Federation,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = federation(data, tmp_path, "feddpa", **UNCACHED)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(call, function, patch)
        run_federation(one)
    assert one.global_model()[1] == rounds and not one.finished()
    if rounds:  # the newest complete models, though newer ones of some sites are on disk
        found = [read(one.model_of(site)).info["round"] for site in SITES]
        assert found == [ROUNDS] * finals + [rounds - 1] * (len(SITES) - finals)
    run_federation(one)
    assert one.finished()
    expected, found = everything(unstopped), everything(one)
    assert any("moments" in name for name in expected) and any("personal" in name for name in expected)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    assert notes(one) == notes(unstopped)


def test_models_of_older_rounds_are_not_kept(unstopped: Federation) -> None:
    assert {path.name for path in (unstopped.out / "models").iterdir()} == {str(ROUNDS - 1), str(ROUNDS)}


def test_a_run_whose_sites_remember_nothing_goes_on_from_the_global_model_alone(data: Path, tmp_path: Path) -> None:
    one = federation(data, tmp_path, "fedavg_lora", **UNCACHED)
    assert not one.strategy.remembers
    run_federation(one)
    expected, before = everything(one), notes(one)
    shutil.rmtree(one.out / "models")
    run_federation(one)
    found = everything(one)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )
    assert notes(one) == before, "no round is done again"


def test_what_a_site_remembers_between_rounds() -> None:
    nothing = {"fedsam", "fedmsa", "fedavg_lora", "fedprox", "ffa_lora"}
    assert {name for name in strategy_names() if not find_strategy(name).checked().remembers} == nothing
    # nothing personal, but the optimiser's moments go on
    phase = {"name": "train", "trains": ["shared"], "experts": False, "keep_moments": True}
    assert Strategy.of({"personal": [], "phases": [phase]}).remembers
