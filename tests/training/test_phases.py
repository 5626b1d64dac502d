"""A strategy from plain settings: what is wrong is named, and nothing wrong is taken."""

from __future__ import annotations

import pytest

from pfedsam.errors import PFedSAMError
from pfedsam.parameters import Roles
from pfedsam.training.phases import Phase, Strategy

PERSONAL = {"name": "personal", "trains": ["personal"], "experts": True}
SHARED = {"name": "shared", "trains": ["shared"], "experts": False}


def error_of(settings: dict) -> PFedSAMError:
    with pytest.raises(PFedSAMError) as caught:
        Strategy.of(settings)
    assert caught.value.code == "E16" and caught.value.remedy
    return caught.value


def test_plain_settings_make_phases_in_their_order():
    strategy = Strategy.of(
        {"name": "a", "phases": [{**PERSONAL, "distillation": {"weight": 0.1}}, SHARED], "final": [PERSONAL]}
    )
    assert [phase.name for phase in strategy.phases] == ["personal", "shared"]
    assert strategy.phases[0].distillation is not None and strategy.phases[0].distillation.weight == 0.1
    assert strategy.phases[1].distillation is None
    assert strategy.roles == Roles() and strategy.final[0].trains == ("personal",)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"learning_rat": 0.1}, "learning_rat"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"epochs": -1}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"trains": []}, "trains"),
        ({"trains": ["frozen"]}, "trains.0"),
        ({"trains": "shared"}, "trains"),
        ({"experts": "perhaps"}, "experts"),
        ({"distillation": {"temperature": 0}}, "distillation.temperature"),
        ({"distillation": {"weight": -1}}, "distillation.weight"),
        ({"distillation": {"band": 1}}, "distillation.band"),
        ({"distillation": {"lambda": 1}}, "distillation.lambda"),
        ({"warmup_rounds": -1}, "warmup_rounds"),
        ({"rates": {"decoder": 0.1}}, "rates"),
        ({"rates": {"layer_norm": 0.1}}, "rates"),
        ({"rates": {"lora_a": 0}}, "rates.lora_a"),
        ({"name": None}, "name"),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["phases", "final"])
def test_wrong_key_or_value_of_a_phase_is_named(wrong, key, where):
    assert f"'{where}.0.{key}'" in error_of({where: [{**PERSONAL, **wrong}]}).message


@pytest.mark.parametrize("key", ["name", "trains", "experts"])
def test_missing_key_of_a_phase_is_named(key):
    settings = {name: value for name, value in PERSONAL.items() if name != key}
    assert f"'phases.1.{key}'" in error_of({"phases": [PERSONAL, settings]}).message


def test_unknown_key_of_a_strategy_is_named():
    assert "'sharde'" in error_of({"sharde": ["lora_a"]}).message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["learning_rate", "distillation"])
def test_numbers_that_are_not_finite_are_refused(key, value):
    error_of({"phases": [{**PERSONAL, key: {"weight": value} if key == "distillation" else value}]})


@pytest.mark.parametrize("trains", [["shared"], ["personal", "shared"], ["shared", "personal"]])
def test_final_phase_that_trains_shared_tensors_is_refused(trains):
    assert "late" in error_of({"final": [{**PERSONAL, "name": "late", "trains": trains}]}).message


@pytest.mark.parametrize("alpha", [0, -0.5, 1.5, "half"])
def test_interpolation_is_between_the_two_models(alpha):
    assert "'interpolation'" in error_of({"final": [PERSONAL], "interpolation": alpha}).message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"final": []}, "no final phase"),
        ({"final": [PERSONAL], "shared": ["lora_a"], "personal": ["experts", "decoder_subset"]}, "decoder_subset"),
    ],
)
def test_interpolation_needs_a_model_at_each_end(settings, words):
    assert words in error_of({**settings, "interpolation": 0.5}).message
    Strategy.of({**settings, "interpolation": 1})


@pytest.mark.parametrize(
    "groups",
    [
        {"shared": ["experts"]},
        {"shared": ["statistics"]},
        {"shared": ["no"]},
        {"shared": ["lora_a"], "personal": ["lora_a"]},
    ],
)
def test_impossible_roles_are_refused(groups):
    error_of({"personal": [], **groups})


def test_settings_cannot_be_changed_afterwards():
    phase = Phase(**PERSONAL)
    with pytest.raises(ValueError):
        phase.epochs = 3  # type: ignore[misc]
