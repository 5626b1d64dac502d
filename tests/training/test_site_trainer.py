"""A site's rounds: an error or a stop leaves the model of before, and which global models get an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from torch import Tensor

from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.parameters import shared_state
from pfedsam.training import validation
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.site import SiteTrainer
from pfedsam.training.validation import MOST_SLICES, RoundSample, is_answer

torch.set_num_threads(1)
TINY = {
    "backbone": "vit_test",
    "image_size": 32,
    "batch_size": 4,
    "augmentations": 1,
    "positives_per_case": 2,
    "negatives_per_case": 1,
}
UP = "mask_decoder.output_upscaling.3"
MASK = "mask_decoder.output_hypernetworks_mlps.0.layers.2"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "data"
    write_phantom(folder, sites=1, cases=6, shape=(32, 32, 6))
    return folder / "site-1"


@pytest.fixture
def opened(site: Path, tmp_path: Path) -> Callable[[str], SiteTrainer]:
    def make(name: str) -> SiteTrainer:
        file = find_strategy(name)
        local = SiteTrainer("brain_lesion_mri", site, file.checked(), {**TINY, **file.overrides}, tmp_path / "out")
        local.open()
        local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
        return local

    return make


def everything(local: SiteTrainer) -> dict[str, Tensor]:
    """All that a later round starts from, and that the state on disk holds."""
    model = local.model(round=0)
    tensors = {f"theta/{name}": one for name, one in shared_state(local.network, local.strategy.roles).items()}
    tensors |= {f"own/{name}": one for name, one in model.personal.items()}
    return tensors | {f"moment/{name}": one.clone() for name, one in model.moments.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(one, second[name]) for name, one in first.items())


def spoil(local: SiteTrainer, after: int) -> Callable[[], None]:
    """Every image holds no number from the given step of the next round on; returns what ends that."""
    count = 0

    def handler(engine) -> None:
        nonlocal count
        count += 1
        if count > after:
            engine.state.batch["image"] = torch.full_like(engine.state.batch["image"], torch.nan)

    return local.trainer.add_event_handler(Events.ITERATION_STARTED, handler).remove


def blow_up(local: SiteTrainer, after: int) -> Callable[[], None]:
    """Every tensor that is trained holds no number from the given step of the next round on."""
    count = 0

    def handler(engine) -> None:
        nonlocal count
        count += 1
        if count > after:
            for parameter in engine.network.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)

    return local.trainer.add_event_handler(Events.ITERATION_COMPLETED, handler).remove


@pytest.mark.parametrize("name", ["local_phase_each_round", "ditto", "fedrep"])
@pytest.mark.parametrize("damage", [spoil, blow_up])
def test_after_a_round_that_was_lost_the_model_in_memory_is_that_of_the_round_before(opened, name, damage) -> None:
    local = opened(name)
    steps = sum(report.steps for report in local.train(0).phases.values())
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    before = everything(local)
    # in the first phase of the round, and in its last step
    for after in (1, steps - 1):
        end = damage(local, after)
        with pytest.raises(PFedSAMError, match="E17"):
            local.train(1)
        end()
        assert same(everything(local), before)
        # an image that holds no number would hold none again: its features are kept
        local.trainer.feature_cache = None
    result = local.train(1)
    assert all(one.isfinite().all() for one in (*result.delta.values(), *result.personal.values()))


def test_after_a_final_phase_that_was_lost_the_personal_part_is_that_of_before(opened) -> None:
    local = opened("pfedsam")
    before = everything(local)
    blow_up(local, 2)
    with pytest.raises(PFedSAMError, match="E17"):
        local.finish(2)
    assert same(everything(local), before)


def test_a_round_that_was_stopped_in_the_middle_changes_nothing(opened) -> None:
    local = opened("ditto")
    local.train(0)
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    before = everything(local)
    local.trainer.should_stop = lambda: local.trainer.report.steps == 2
    local.train(1)
    assert same(everything(local), before)


# which global models get an answer ------------------------------------------------------------------------------------


def constant(local: SiteTrainer, value: float) -> dict[str, Tensor]:
    """A global model whose logits are 27 times the value everywhere."""
    theta = shared_state(local.network, local.strategy.roles)
    for name, fill in ((f"{UP}.weight", 0.0), (f"{UP}.bias", 1.0), (f"{MASK}.weight", 0.0), (f"{MASK}.bias", value)):
        theta[name].fill_(fill)
    return theta


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_global_model_that_predicts_nothing_or_everything_is_known_as_one(opened, value: float) -> None:
    local = opened("pfedsam")
    local.receive(constant(local, value), local.fingerprint)
    local.validate(experts=False)
    assert len(local.validation_cases) == len(local._answered) > 0
    assert not local.answers


def test_a_global_model_that_has_learned_gets_an_answer_and_another_one_is_looked_at_anew(opened) -> None:
    local = opened("pfedsam")
    assert not local.answers, "nothing was validated"
    for number in range(3):
        local.train(number)
        local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    local.validate(experts=False)
    assert local.answers
    local.receive(constant(local, 1.0), local.fingerprint)
    local.validate(experts=False)
    assert not local.answers


def test_a_case_counts_if_one_class_is_of_ordinary_size() -> None:
    logits = torch.full((2, 10, 10, 10), -1.0)
    assert not is_answer(logits, exclusive=False)
    logits[0] = 1
    assert not is_answer(logits, exclusive=False)
    logits[1, :5] = 1
    assert is_answer(logits, exclusive=False)
    logits[1, 5] = 1
    assert not is_answer(logits, exclusive=False), "more than half"
    # exclusive classes: the first is the background
    logits = torch.zeros(3, 10, 10, 10)
    logits[0] = 1
    assert not is_answer(logits, exclusive=True)
    logits[2, 0] = 2
    assert is_answer(logits, exclusive=True)


# validation of large sites --------------------------------------------------------------------------------------------


def validated_cases(local: SiteTrainer, in_round: bool) -> list[str]:
    """The cases that a validation of the global model runs on."""
    cases: list[str] = []
    with local.evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: cases.extend(item["case"] for item in engine.state.batch)
    ):
        local._global_dice.clear()
        local.validate(experts=False, in_round=in_round)
    return cases


def test_rounds_of_a_large_site_are_validated_on_a_draw_and_the_final_models_on_all(tmp_path, monkeypatch):
    write_phantom(tmp_path, sites=1, cases=6, shape=(32, 32, 6))
    site, names = tmp_path / "site-1", [f"s1-case-{number:02d}" for number in range(1, 7)]
    split = {"training": names[:2], "validation": names[2:5], "test": names[5:]}
    (site / "datalist.json").write_text(json.dumps(split))
    strategy = find_strategy("pfedsam").checked()
    local = SiteTrainer("brain_lesion_mri", site, strategy, TINY, tmp_path / "out", least_validated=1)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    everything = [item["case"] for item in local.validation_cases]
    assert everything == split["validation"] and validated_cases(local, in_round=True) == everything
    monkeypatch.setattr(validation, "MOST_SLICES", 1)
    drawn = validated_cases(local, in_round=True)
    assert len(drawn) == 1 and validated_cases(local, in_round=True) == drawn
    assert validated_cases(local, in_round=False) == everything


def test_the_draw_holds_to_both_limits_and_is_one_of_the_seed():
    sample = RoundSample(seed=3, least_cases=4)
    assert sample.choose([1] * 20) == list(range(20))
    deep = [MOST_SLICES // 6] * 20
    assert len(sample.choose(deep)) == 6 and sample.choose(deep) == RoundSample(3, 4).choose(deep)
    assert RoundSample(4, 4).choose(deep) != sample.choose(deep)
    assert len(sample.choose([MOST_SLICES] * 20)) == 4 and sample.choose([MOST_SLICES]) == [0]
