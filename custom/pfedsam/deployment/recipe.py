"""The job as an NVFlare recipe: one object for the simulator, POC and production.

    from nvflare.recipe import ProdEnv, SimEnv
    from pfedsam.deployment.recipe import PFedSAMRecipe

    recipe = PFedSAMRecipe("pfedsam", rounds=20, min_clients=3, federation="lesions")
    recipe.export("jobs")                                 # jobs/pfedsam, to look at
    recipe.run(SimEnv(num_clients=3))                     # data root in PFEDSAM_DATA
    recipe.run(ProdEnv("admin@hospital.org"))             # the same job

Importing NVFlare's recipes takes `--export` and `--export-dir` out of the command line: see `nvflare.recipe.Recipe`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from nvflare.apis.job_def import ALL_SITES
from nvflare.job_config.api import FedJob
from nvflare.job_config.fed_job_config import FedJobConfig
from nvflare.recipe.spec import Recipe

from pfedsam import defaults
from pfedsam.deployment.job_files import plan_settings, server_settings
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.jobs import export_job, make_job
from pfedsam.errors import ErrorCode, PFedSAMError


class PFedSAMRecipe(Recipe):
    """A strategy's job with these settings; with none of them it is the checked-in job of the strategy.

    Args:
        strategy: name of a strategy, of an ablation, or path of a strategy file.
        name: of the job; by default the strategy's.
        rounds: of the federation.
        min_clients: sites without which the job does not start, no round counts and it stops.
        missing_sites: what the server does when a site is missing in a round: warn, by default, or fail.
        federation: name that the sites' personal states are kept under.
        bundle: name of an installed bundle.
        overrides: listed ids of the bundle's configuration with literal values.
        privacy: noise and precision of what leaves.
        locked: without code, for sites that allow our classes only.
        byoc: with our code, for sites that have not installed it.

    Raises:
        PFedSAMError: E28 if there is no such strategy, E32 if it needs no server, or locked and byoc are both asked
            for.
    """

    def __init__(
        self,
        strategy: str = defaults.STRATEGY,
        *,
        name: str | None = None,
        rounds: int | None = None,
        min_clients: int | None = None,
        missing_sites: str | None = None,
        federation: str | None = None,
        bundle: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        privacy: Privacy | None = None,
        locked: bool = False,
        byoc: bool = False,
    ) -> None:
        self.strategy, self.overrides = strategy, dict(overrides or {})
        self.plan = _given(federation=federation, bundle=bundle, missing_sites=missing_sites)
        self.server = _given(num_rounds=rounds, min_clients=min_clients)
        self.how: dict[str, Any] = {"privacy": privacy, "locked": locked, "byoc": byoc}
        with tempfile.TemporaryDirectory() as folder:
            job = self.write(Path(folder) / "job")
            strategy_name, wanted = plan_settings(job)["strategy"]["name"], server_settings(job)["min_clients"]
        super().__init__(_FolderJob(self, name or strategy_name, wanted))

    def write(self, out: Path) -> Path:
        """Write the job folder.

        Raises:
            PFedSAMError: E32, see the class, or if `out` is something else than a job folder.
        """
        with tempfile.TemporaryDirectory() as folder:
            made = make_job(self.strategy, Path(folder) / "job")
            overrides = {**plan_settings(made)["overrides"], **self.overrides}
            return export_job(made, out, plan={**self.plan, "overrides": overrides}, server=self.server, **self.how)


class _FolderJob(FedJob):
    """A job whose folder a recipe writes; nothing can be added to it."""

    def __init__(self, recipe: PFedSAMRecipe, name: str, min_clients: int) -> None:
        super().__init__(name, min_clients)
        self.job = _FolderConfig(recipe, name, min_clients)
        self.clients = [ALL_SITES]

    def to(self, obj: Any, target: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: what a site receives and sends is the strategy's and `Privacy`'s to say."""
        raise PFedSAMError(
            ErrorCode.CONTRADICTION,
            f"{type(obj).__name__} cannot be added to this job.",
            "Use the recipe's own arguments, or change the exported folder.",
        )

    def to_server(self, obj: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, see `to`."""
        self.to(obj, "server")

    def to_clients(self, obj: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse, see `to`."""
        self.to(obj, ALL_SITES)


class _FolderConfig(FedJobConfig):
    def __init__(self, recipe: PFedSAMRecipe, name: str, min_clients: int) -> None:
        super().__init__(name, min_clients)
        self.recipe = recipe

    def generate_job_config(self, job_root: str) -> None:
        """Where NVFlare writes the folder that it exports, simulates and submits."""
        self.recipe.write(Path(job_root) / self.job_name)


def _given(**settings: Any) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}
