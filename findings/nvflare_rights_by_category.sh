#!/usr/bin/env bash
# NVFlare sorts the console's commands into categories, and a policy gives rights by category. Some commands are in none:
# who has rights by category never has them, whatever the policy says of its categories. NVFlare's own default gives
# `org_admin`, `lead` and `member` rights in that way, so they can neither ask for versions nor read the log of their job.
#
# Guess before: a lead with all three of "view", "operate" and "download_job" may ask for a site's version.
# Seen with NVFlare 2.9.0: the lead may list jobs, and may not `report_version`; a role with "any" may do both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "nvflare==2.9.0"
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import version

from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.security.security import COMMAND_CATEGORIES, FLAuthorizer

rights = {"lead": {"view": "any", "operate": "any", "download_job": "any"}, "project_admin": "any"}
policy = FLAuthorizer("hospital", {"format_version": "1.0", "permissions": rights})
may = {
    (role, command): policy.authorize(AuthzContext(command, Person("somebody", "hospital", role)))[0]
    for role in rights
    for command in ("list_jobs", "report_version", "get_job_log")
}
outside = [name for name in ("report_version", "get_job_log") if name not in COMMAND_CATEGORIES]
print(f"NVFlare {version('nvflare')}: in no category: {outside}; " + ", ".join(f"{r} {c}: {m}" for (r, c), m in may.items()))
wanted = {(r, c): bool(r == "project_admin" or c == "list_jobs") for r, c in may}
sys.exit({key: bool(value) for key, value in may.items()} != wanted)
PY
