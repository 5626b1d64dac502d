"""The plan stands in one file of the job that both sides read; a job of before has it as arguments on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pfedsam.errors import PFedSAMError
from pfedsam.federated.plan import Plan
from pfedsam.storage.job_plan import CLIENT, PLAN_FILE, PLAN_ID, SERVER, plan_arguments
from pfedsam.training.catalogue import find_strategy

TOLD: dict[str, Any] = {
    "federation": "lesions",
    "bundle": "brain_lesion_mri",
    "strategy": find_strategy("ditto").strategy,
    "overrides": {"experts": 0},
    "least_sites": 3,
}


def app(folder: Path, file: Any = None, arguments: dict[str, Any] | None = None) -> Path:
    """An app folder with the plan in its file, or as arguments of the component on both sides."""
    config = folder / "config"
    config.mkdir(parents=True, exist_ok=True)
    component = {"id": PLAN_ID} if arguments is None else {"id": PLAN_ID, "args": arguments}
    for side in (SERVER, CLIENT):
        (config / side).write_text(json.dumps({"components": [{"id": "other"}, component]}))
    if file is not None:
        (config / PLAN_FILE).write_text(json.dumps(file))
    return folder


@pytest.mark.parametrize("form", [{"file": TOLD}, {"arguments": TOLD}], ids=["file", "arguments"])
@pytest.mark.parametrize("side", [SERVER, CLIENT])
def test_both_forms_say_the_same(tmp_path: Path, form: dict[str, Any], side: str) -> None:
    assert plan_arguments(app(tmp_path, **form), side) == TOLD


def test_a_plan_that_is_said_twice_or_not_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=rf"E29.*{PLAN_FILE}"):
        plan_arguments(app(tmp_path / "twice", file=TOLD, arguments=TOLD))
    with pytest.raises(PFedSAMError, match=rf"E29.*{PLAN_FILE}"):
        plan_arguments(app(tmp_path / "never"))


def test_a_component_without_arguments_reads_the_file(tmp_path: Path) -> None:
    plan = Plan()
    plan.read(app(tmp_path, file=TOLD))
    assert {key: getattr(plan, key) for key in TOLD} == TOLD and plan.most_cases is None
    assert plan.checked().name == "ditto"
    app(tmp_path, file={**TOLD, "federation": "other"})
    plan.read(tmp_path)
    assert plan.federation == "lesions", "it is read once"


def test_a_component_with_arguments_reads_no_file(tmp_path: Path) -> None:
    plan = Plan(**TOLD)
    plan.read(tmp_path / "nowhere")
    assert plan.federation == "lesions"


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({**TOLD, "rounds": 3}, "E29.*rounds"),
        ({**TOLD, "_manifests": {}}, "E29.*_manifests"),
        ({**TOLD, "checked": 1}, "E29.*checked"),
        ({**TOLD, "federation": "{$HOME}"}, "E18.*federation"),
        ({**TOLD, "strategy": {"name": "a/b"}}, r"E18.*strategy\.name"),
        ([1], "E29"),
        ({key: value for key, value in TOLD.items() if key != "federation"}, "E16.*federation"),
        ({key: value for key, value in TOLD.items() if key != "strategy"}, "E16.*strategy"),
        ({key: value for key, value in TOLD.items() if key != "bundle"}, "E28"),
    ],
    ids=str,
)
def test_a_wrong_file_is_answered_with_a_code(tmp_path: Path, told: Any, code: str) -> None:
    plan = Plan()
    with pytest.raises(PFedSAMError, match=code):
        plan.read(app(tmp_path, file=told))
        plan.checked()
