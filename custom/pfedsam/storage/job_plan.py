"""Where a job's configuration lies, and its plan: one file that server and sites read.

<job>/app/config/config_fed_server.json, config_fed_client.json   components, filters and workflows of each side
<job>/app/config/plan.json                                        federation, bundle, strategy, settings: the plan

A job of before has the plan as arguments of the component `plan`, once on each side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.files import read_object

#: The configurations of a job, in its app folder's `config`.
SERVER, CLIENT, PLAN_FILE = "config_fed_server.json", "config_fed_client.json", "plan.json"
#: The component's id.
PLAN_ID = "plan"
MAKE_JOB = "Start from a job of this project (`pfedsam job make`)."


def plan_arguments(app: str | Path, side: str = SERVER) -> dict[str, Any]:
    """What the plan of a job says: the file's content, or in a job of before the component's arguments.

    Args:
        app: the job's app folder.
        side: the configuration whose component is read where there is no file, `SERVER` or `CLIENT`.

    Raises:
        PFedSAMError: E29 if a file is missing, not readable or no job's, or if the job says its plan twice.
    """
    config = Path(app) / "config"
    component = component_of(read_object(config / side, MAKE_JOB), PLAN_ID)
    arguments, path = component.get("args", {}), config / PLAN_FILE
    if not isinstance(arguments, dict) or (arguments and path.is_file()):
        message = f"{config / side}: the plan's arguments are {shown(arguments)}, expected none beside {PLAN_FILE}."
        raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, message, MAKE_JOB)
    return arguments or read_object(path, MAKE_JOB)


def component_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A component of a job by its id (E29 if there is none); it can be changed in place."""
    components = config.get("components")
    for component in components if isinstance(components, list) else ():
        if isinstance(component, dict) and component.get("id") == name:
            return component
    raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"the job has no component '{name}'.", MAKE_JOB)
