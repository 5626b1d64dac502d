"""Records and results that were changed by hand are named and left out; a file's strategy is told by its name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pfedsam.bundles import folder
from pfedsam.comparison.compare import read_records
from pfedsam.comparison.planned import require_own_names
from pfedsam.comparison.records import problem_of_record, problem_of_results
from pfedsam.comparison.run import Run
from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.files import append_line, read_lines
from pfedsam.report.page import write_report

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def good() -> dict[str, Any]:
    return read_lines(RESULTS / "phantom.jsonl")[0]


def test_records_that_are_kept_with_the_code_are_sound() -> None:
    for name in ("phantom", "lgg", "lgg-two-blocks"):
        assert {problem_of_record(one) for one in read_lines(RESULTS / f"{name}.jsonl")} == {""}


def changed(*keys: Any, value: Any) -> dict[str, Any]:
    record = good()
    found: Any = record
    for key in keys[:-1]:
        found = found[key]
    found[keys[-1]] = value
    return record


@pytest.mark.parametrize(
    ("record", "where"),
    [
        (changed("cases", 0, "dice", value="0.7"), "cases.0.dice"),
        (changed("cases", 0, "dice", value=["high"]), "cases.0.dice.0"),
        (changed("cases", value={"a": 1}), "cases"),
        (changed("history", 0, "val_dice_global", value="high"), "history.0.val_dice_global"),
        (changed("card", value=[1]), "card"),
        (changed("seed", value="0"), "seed"),
        (changed("strategy", value=["a"]), "strategy"),
        (changed("key", value=["a"]), "key"),
        (changed("seconds", value={"training": "long"}), "seconds.training"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_record_with_a_wrong_value_is_left_out_and_named(
    record: dict[str, Any], where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "runs.jsonl"
    for one in (record, {**good(), "key": "other"}):
        append_line(path, one)
    with caplog.at_level(logging.WARNING):
        assert [one["key"] for one in read_records(path)] == ["other"]
        read_records(path)
    (told,) = [line for line in caplog.messages if str(path) in line]
    assert f"{where} is" in told


@pytest.mark.parametrize("missing", ["card", "cases", "rounds", "kind"])
def test_what_a_table_needs_and_a_record_lacks_is_told(missing: str) -> None:
    record = good()
    del record[missing]
    assert problem_of_record(record) == f"{missing} is missing" and problem_of_record(record, whole=False) == ""


SITE = {"cases": 1, "dice_global": 0.5, "dice_personal": 0.6, "failures_global": 0, "failures_personal": 0}
SUMMARY = {f"{kind}_{model}": 0.5 for kind in ("mean", "worst") for model in ("global", "personal")}
FOUND: dict[str, Any] = {"sites": {"site-1": {**SITE, "bytes_per_round": 1}}, "cases": [], **SUMMARY}


@pytest.mark.parametrize(
    ("results", "where"),
    [
        ({**FOUND, "mean_global": "high"}, "mean_global is 'high'"),
        ({**FOUND, "sites": {"site-1": {**SITE, "bytes_per_round": 1, "dice_global": "0.5"}}}, "dice_global is '0.5'"),
        ({**FOUND, "sites": [1]}, "sites is"),
        ({**FOUND, "cases": [{"site": "a"}]}, "cases.0.case is missing"),
        ([1], "the whole is"),
        ("text", "the whole is"),
    ],
    ids=str,
)
def test_a_report_of_results_of_another_shape_is_an_error_that_names_the_value(
    results: Any, where: str, tmp_path: Path
) -> None:
    assert problem_of_results(FOUND) == ""
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(PFedSAMError, match=r"E02.*results\.json") as caught:
        write_report(tmp_path)
    assert where in caught.value.message


# a strategy in a file of its own -------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_phantom(tmp_path / "data", sites=2, cases=4, shape=(16, 16, 4))
    return tmp_path / "data"


def write_strategy(path: Path, name: str | None = "mine", **changes: Any) -> str:
    content = json.loads((folder("jobs") / "strategies" / "fedavg_lora.json").read_text())
    content["strategy"] |= changes
    content["strategy"].pop("name")
    if name is not None:
        content["strategy"]["name"] = name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def run_of(data: Path, strategy: str) -> Run:
    return Run(str(data), ("site-1", "site-2"), "brain_lesion_mri", strategy, 0, 1, {"backbone": "vit_test"})


def test_a_strategy_in_a_file_is_called_by_its_name_and_keyed_by_its_content(data: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "x.json", tmp_path / "b" / "y.json"
    one, moved = run_of(data, write_strategy(here)), run_of(data, write_strategy(there))
    assert one.label == "mine" and one.name.startswith("mine, ") and str(tmp_path) not in one.name
    assert one.key() == moved.key()
    write_strategy(there, weights="uniform")
    assert one.key() != moved.key()
    assert run_of(data, write_strategy(tmp_path / "third.json", None)).label == "third"


def test_two_strategies_of_one_name_are_not_compared(tmp_path: Path) -> None:
    one, other = write_strategy(tmp_path / "a.json"), write_strategy(tmp_path / "b.json", weights="uniform")
    same = write_strategy(tmp_path / "c.json")
    require_own_names([one, same, "pfedsam", "one_adapter"])
    for names in ([one, other], [write_strategy(tmp_path / "d.json", "pfedsam")]):
        with pytest.raises(PFedSAMError, match=r"E32.*two strategies named"):
            require_own_names(names)
