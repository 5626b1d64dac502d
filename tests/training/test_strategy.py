"""A strategy from plain settings: what is wrong is named, and nothing wrong is taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedsam.errors import PFedSAMError
from pfedsam.parameters import Roles
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.phase import Phase
from pfedsam.training.strategy import Strategy

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


#: key, the least and the most that is taken, what lies beyond them; None where the end itself is not taken
BOUNDS = [
    ("epochs", 0, 1000, -1, 1001),
    ("learning_rate", 1e-9, 10, 0, 10.001),
    ("warmup_rounds", 0, 10_000, -1, 10_001),
    ("decay", 1e-9, 1, 0, 1.001),
    ("inverse_time_decay", 0, 1000, -0.001, 1000.1),
    ("balance", 0, 1000, -0.001, 1000.1),
    ("proximal", 0, 1000, -0.001, 1000.1),
    ("rates.lora_a", 1e-9, 1000, 0, 1000.1),
    ("distillation.weight", 0, 1000, -0.001, 1000.1),
    ("distillation.temperature", 1e-9, 100, 0, 100.1),
    ("distillation.band", 1e-9, 0.999, 0, 1),
    ("distillation.warmup_rounds", 0, 10_000, -1, 10_001),
]


@pytest.mark.parametrize(("key", "least", "most", "below", "above"), BOUNDS, ids=[one[0] for one in BOUNDS])
def test_every_number_of_a_phase_has_two_ends(key, least, most, below, above):
    def phase(value):
        name, _, inner = key.partition(".")
        return {**PERSONAL, name: {inner: value} if inner else value}

    for value in (least, most):
        Strategy.of({"phases": [phase(value)]})
    for value in (below, above, float("nan"), float("inf"), True, str(least), [least], None):
        assert f"'phases.0.{key}'" in error_of({"phases": [phase(value)]}).message, value


@pytest.mark.parametrize(
    ("key", "least", "most", "below", "above"),
    [("validate_every", 1, 10_000, 0, 10_001), ("interpolation", 0.001, 1, 0, 1.001)],
)
def test_every_number_of_a_strategy_has_two_ends(key, least, most, below, above):
    for value in (least, most):
        Strategy.of({"final": [PERSONAL], key: value})
    for value in (below, above, float("nan"), True, str(least)):
        assert f"'{key}'" in error_of({"final": [PERSONAL], key: value}).message, value


def test_a_strategy_has_few_phases():
    Strategy.of({"phases": [PERSONAL] * 20, "final": [PERSONAL] * 20})
    for part in ("phases", "final"):
        assert f"'{part}'" in error_of({part: [PERSONAL] * 21}).message


@pytest.mark.parametrize("wrong", [[1], "pfedsam", 3, None, {"phases": 3}, {"phases": [3]}, {"shared": "lora_a"}])
def test_what_is_no_strategy_is_an_error_that_shows_it(wrong):
    assert len(error_of(wrong).message) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*Strategy.model_fields, *Phase.model_fields])


@given(JSON | st.dictionaries(KEYS, JSON | st.lists(st.dictionaries(KEYS, JSON), max_size=2), max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_strategy_or_an_error_of_ours(value):
    try:
        Strategy.of(value)
    except PFedSAMError as error:
        assert error.code == "E16"


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


@pytest.mark.parametrize("name", ["fedavg_lora", "pfedsam", "soft_load", "site_groups", "warm_up", "style_adversary"])
def test_a_key_that_came_later_is_told_where_it_is_used_and_nowhere_else(name: str) -> None:
    strategy = find_strategy(name).checked()
    told = strategy.model_dump(mode="json")
    assert Strategy.of(told) == strategy
    for one, keys in ((strategy, told), *zip(strategy.phases, told["phases"], strict=True)):
        assert {key for key in one.LATER if getattr(one, key) is not None} == one.LATER & set(keys)
