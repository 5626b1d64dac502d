"""The time left of a long command."""

from __future__ import annotations

import pytest

from pfedsam.storage.progress import Pace


def test_what_comes_before_the_first_step_is_no_step() -> None:
    pace = Pace()
    assert pace.left(10, 500.0) is None
    pace.step(1, 1000.0)  # after minutes of loading
    assert pace.left(10, 1000.0) is None
    pace.step(3, 1020.0)
    assert pace.left(10, 1020.0) == pytest.approx(70)
    assert pace.left(10, 1025.0) == pytest.approx(65)


def test_steps_of_an_hour_have_a_time_left() -> None:
    pace = Pace()
    for number in range(1, 4):
        pace.step(number, 3600.0 * number)
    assert pace.left(5, 3 * 3600.0) == pytest.approx(2 * 3600)


def test_a_step_that_lasts_longer_than_those_before_it_raises_the_time_left() -> None:
    pace = Pace()
    pace.step(1, 0.0)
    pace.step(2, 1.0)
    soon, late = (pace.left(10, at) for at in (2.0, 101.0))
    assert soon == pytest.approx(7)
    assert late is not None and late > 300
    before, after = (pace.left(10, at) for at in (1.999, 2.001))
    assert before == pytest.approx(after, abs=0.1), "it does not jump"


def test_a_line_without_a_new_step_is_no_step() -> None:
    pace = Pace()
    pace.step(1, 0.0)
    pace.step(2, 10.0)
    pace.step(2, 19.0)
    assert pace.left(3, 19.0) == pytest.approx(1)
