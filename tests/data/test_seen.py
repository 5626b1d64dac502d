"""What a model has seen is kept as salted hashes, and only grows."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pfedsam.data.seen import Seen, patient_of
from pfedsam.errors import PFedSAMError

NAMES = some.sets(some.text(max_size=12), max_size=10)


@settings(max_examples=60, deadline=None)
@given(NAMES, NAMES, NAMES)
def test_what_was_added_is_found_again_after_a_file_and_nothing_else_is(trained, validated, others):
    seen = Seen.nothing().add("training", trained).add("validation", validated)
    again = Seen.of({"seen": json.loads(json.dumps(seen.to_dict()))})
    assert again == seen
    for name in trained | validated | others:
        expected = "training" if name in trained else "validation" if name in validated else None
        assert again.section_of(name) == expected
    grown = again.add("training", others)
    assert grown.salt == seen.salt and grown.training >= seen.training and grown.validation == seen.validation


def test_no_name_is_in_the_file_and_two_models_hash_differently():
    one, other = (Seen.nothing().add("training", ["Meier"]) for _ in range(2))
    assert "Meier" not in json.dumps(one.to_dict())
    assert len(one.salt) == 32 and all(len(name) == 16 for name in one.training)
    assert one.training.isdisjoint(other.training)


def test_a_patient_of_a_pool_is_known_at_its_own_site_only():
    seen = Seen.nothing().add("training", ["site-1__7"])
    assert seen.section_of("7", "site-1") == "training" and seen.section_of("site-1__7") == "training"
    assert seen.section_of("7", "site-2") is None and seen.section_of("7") is None


def test_a_model_that_tells_nothing_is_none_and_a_part_of_the_way_stays_said():
    assert Seen.of({}) is None
    told = Seen.nothing(whole=False).add("training", ["a"]).to_dict()
    assert Seen.of({"seen": told}).add("training", ["b"]).whole is False
    assert "whole" not in Seen.nothing().to_dict()


@pytest.mark.parametrize(
    "told", [7, {}, {"salt": "a", "training": []}, {"salt": 1, "training": [], "validation": []}, ["salt"]]
)
def test_what_is_no_list_of_hashes_is_refused(told):
    with pytest.raises(PFedSAMError, match="E13"):
        Seen.of({"seen": told})


def test_the_patient_of_an_item_is_its_case_where_nothing_else_is_known():
    item = {"image": "i.png", "case": "c", "patient": "p"}
    assert [patient_of(item), patient_of({**item, "patient": 7}), patient_of({"image": "i", "case": "c"})] == [
        "p",
        "7",
        "c",
    ]
