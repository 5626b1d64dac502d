"""What happens in the runs of `conftest`."""

from __future__ import annotations

import numpy as np

#: Personal values that nothing but a leak can bring to the server.
CANARY = np.float32(1.5) + np.arange(256, dtype=np.float32) * np.float32(1.2345e-3)

#: Value of an environment variable of the sites, which a job asks for.
SECRET = "correct_horse_battery"

#: What is wrong at each site of `troubled_run`, and the code that reaches the server.
TROUBLES = {
    "site-1": ("label out of range", "E07"),
    "site-2": ("corrupt image", "E05"),
    "site-3": ("state in use by another job", "E14"),
    "site-4": ("a variable of the machine in the job", "E18"),
    "site-5": ("unknown strategy key", "E16"),
    "site-6": ("other base weights", "E11"),
    "site-7": ("loss is not finite", "E17"),
}

#: How each leaky site leaks, round by round. site-1 has no filter, site-2 one for a task that does not exist, site-3
#: the filter of the checked-in job.
LEAKS = {
    "site-1": ["metadata", "headers", "raw", "listed"],
    "site-2": ["plain", "name", "code", "initial_metrics"],
    "site-3": ["metadata", "headers", "raw", "name"],
}

#: What a site or a server must list beside NVFlare's defaults to run the job without `app/custom`.
LOCKED_CLASSES = (
    "nvflare.app_common.workflows.broadcast_and_process.BroadcastAndProcess",
    "pfedsam.federated.aggregators.RobustAggregator",
    "pfedsam.federated.aggregators.RobustModelSelector",
    "pfedsam.federated.filters.IncomingGuard",
    "pfedsam.federated.filters.PersonalisedFilter",
    "pfedsam.federated.final_phase.FinalPersonalPhase",
    "pfedsam.federated.learner.PFedSAMLearner",
    "pfedsam.federated.least_sites.LeastSites",
    "pfedsam.federated.persistor.SharedStatePersistor",
    "pfedsam.federated.plan.Plan",
    "pfedsam.federated.scalars.ListedScalars",
)


def canary_of(number: int) -> np.ndarray:
    """The canary of one site."""
    return CANARY * np.float32(1 - 2 * number)
