"""What a job decides beside its plan: all of its configuration but what says how long and for whom to wait."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pfedsam.deployment.job_files import read_json
from pfedsam.storage.job_plan import CLIENT, PLAN_ID, SERVER, component_of, plan_arguments

_WAITS = re.compile(r"timeout|period|interval|wait_time|^min_clients$|^min_responses_required$")
#: What `run_terms` takes from the plan, and what is promised of the sites.
_OF_PLAN = ("federation", "bundle", "strategy", "overrides", "least_sites", "missing_sites")
#: The rounds and where they start; `run_terms` leaves them open.
_OPEN = ("num_rounds", "start_round", "source_ckpt_file_full_name")


def job_terms(job: Path) -> dict[str, Any]:
    """The terms of a job folder: components, filters, workflows and their arguments, by side."""
    rest = {key: value for key, value in plan_arguments(job / "app").items() if key not in _OF_PLAN}
    terms = {}
    for side, name in (("server", SERVER), ("client", CLIENT)):
        config = read_json(job / "app" / "config" / name)
        component_of(config, PLAN_ID)["args"] = rest
        terms[side] = _without_waits(config)
    return terms


def _without_waits(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_waits(item) for key, item in value.items() if key not in _OPEN and not _WAITS.search(str(key))
        }
    if isinstance(value, list):
        return [_without_waits(item) for item in value]
    return value
