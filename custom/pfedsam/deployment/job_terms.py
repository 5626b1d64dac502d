"""What a job decides beside its plan: all of its configuration but what says how long and for whom to wait."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pfedsam.federated.literals import CLIENT, SERVER
from pfedsam.federated.plan import PLAN_ID

_WAITS = re.compile(r"timeout|period|interval|wait_time|^min_clients$|^min_responses_required$")
#: What `run_terms` takes from the plan, and what is promised of the sites.
_OF_PLAN = ("federation", "bundle", "strategy", "overrides", "least_sites")
#: The rounds and where they start; `run_terms` leaves them open.
_OPEN = ("num_rounds", "start_round", "source_ckpt_file_full_name")


def job_terms(job: Path) -> dict[str, Any]:
    """The terms of a job folder: components, filters, workflows and their arguments, by side."""
    config = job / "app" / "config"
    return {
        side: _without_waits(json.loads((config / name).read_text()))
        for side, name in (("server", SERVER), ("client", CLIENT))
    }


def _rest_of_plan(one: Any) -> Any:
    """What `run_terms` does not take from the plan; anything else as it is."""
    if not (isinstance(one, dict) and one.get("id") == PLAN_ID):
        return one
    return {**one, "args": {key: value for key, value in one.get("args", {}).items() if key not in _OF_PLAN}}


def _without_waits(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_waits(one) for key, one in value.items() if key not in _OPEN and not _WAITS.search(str(key))
        }
    if isinstance(value, list):
        return [_without_waits(_rest_of_plan(one)) for one in value]
    return value
