"""The plan of a job: which bundle, with which overrides, by which strategy. Server and sites read it from one file.

NVFlare builds one `Plan` on each side as the component `plan`; the learner, the outgoing filter, the server's guard and
the persistor read it. The tensors that may travel are computed here from the *installed* bundle, never taken from a
message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from pfedsam.bundles import network_of, require_settings
from pfedsam.errors import ErrorCode, PFedSAMError, shown
from pfedsam.federated.boundary import METADATA_BY_WEIGHTS
from pfedsam.federated.literals import require_literal
from pfedsam.files import read_object
from pfedsam.parameters import COPY, Manifest, manifest
from pfedsam.storage.job_plan import MAKE_JOB, PLAN_FILE, PLAN_ID
from pfedsam.training.strategy import Strategy

#: What the server does when a site is missing in a round: go on and name it, or stop the job. The first is the default.
MISSING_SITES = ("warn", "fail")


class Plan:
    """What a job trains and how.

    A component without arguments has them in the job's `config/plan.json`, see `read`; in a job of before they are
    arguments of the component on both sides.

    Args:
        federation: name of the federation: the personal state at a site is keyed by it.
        bundle: name of an installed bundle.
        strategy: settings of `pfedsam.training.strategy.Strategy`.
        overrides: listed ids of the bundle's configuration with literal values.
        most_cases: the most training cases that a site counts as, as the sites agreed on it: a number for all, or
            numbers by site. Where none was agreed on, a site is held to what the others have, see
            `pfedsam.training.aggregation`.
        least_sites: the server aggregates a round only if so many sites have contributed; None promises nothing. See
            `pfedsam.federated.least_sites`.
        missing_sites: what the server does when a site that the job was handed to is missing in a round: one of
            `MISSING_SITES`.

    Raises:
        PFedSAMError: E16 or E18, from `checked`, not from the constructor: a job with a wrong plan must be answered
            with a code, not with a component that could not be built.
    """

    def __init__(
        self,
        federation: str = "",
        bundle: str = "",
        strategy: dict[str, Any] | None = None,
        overrides: dict[str, Any] | None = None,
        most_cases: int | dict[str, int] | None = None,
        least_sites: int | None = None,
        missing_sites: str = MISSING_SITES[0],
    ) -> None:
        self.federation = federation
        self.bundle = bundle
        self.strategy = strategy
        self.overrides = overrides
        self.most_cases = most_cases
        self.least_sites = least_sites
        self.missing_sites = missing_sites
        self._manifests: dict[str, Manifest] = {}

    def read(self, app: str | Path) -> None:
        """Take the arguments from the job's file, where the component has none.

        Args:
            app: the job's app folder on this machine.

        Raises:
            PFedSAMError: E18 if the file holds a variable, a path or an expression; E29 if it is missing, not readable,
                or has a key that a plan does not have.
        """
        if self.federation or self.bundle or self.strategy is not None:
            return
        require_literal(app, PLAN_FILE)
        arguments = read_object(Path(app) / "config" / PLAN_FILE, MAKE_JOB)
        unknown = sorted(set(arguments) - {key for key in vars(self) if not key.startswith("_")})
        if unknown:
            raise PFedSAMError(ErrorCode.CONFIGURATION_FILE, f"{PLAN_FILE} has the key(s) {unknown}.", MAKE_JOB)
        vars(self).update(arguments)

    def checked(self) -> Strategy:
        """The strategy, after a check of all settings.

        Raises:
            PFedSAMError: E16 for a wrong federation name, strategy, number of sites or `missing_sites`, E28 for an
                unknown bundle, E18 for an override.
        """
        if not isinstance(self.federation, str) or not self.federation.replace("-", "_").isidentifier():
            message = f"federation name {shown(self.federation)}"
            raise PFedSAMError(ErrorCode.WRONG_SETTING, f"{message}.", "Use letters, digits, '-' and '_'.")
        agreed = self.most_cases.values() if isinstance(self.most_cases, dict) else (self.most_cases,)
        if any(most is not None and (type(most) is not int or most < 1) for most in agreed):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING,
                f"most_cases is {shown(self.most_cases)}.",
                "Give whole numbers from 1, for all or by site.",
            )
        if self.least_sites is not None and (type(self.least_sites) is not int or self.least_sites < 1):
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING, f"least_sites is {shown(self.least_sites)}.", "Give a whole number from 1 on."
            )
        if self.missing_sites not in MISSING_SITES:
            raise PFedSAMError(
                ErrorCode.WRONG_SETTING,
                f"missing_sites is {shown(self.missing_sites)}.",
                f"One of {', '.join(MISSING_SITES)}.",
            )
        require_settings(self.bundle, self.overrides)
        return Strategy.of(self.strategy)

    def most_of(self, site: str) -> int | None:
        """The agreed most training cases of a site, None if there is no agreement."""
        return self.most_cases.get(site) if isinstance(self.most_cases, dict) else self.most_cases

    def further(self) -> tuple[str, ...]:
        """Metadata that the strategy lets a site send beside what all strategies do."""
        return METADATA_BY_WEIGHTS.get(Strategy.of(self.strategy).weights, ())

    def shared(self) -> Manifest:
        """Names, shapes and dtypes of the tensors that this job shares."""
        return self._manifest("shared")

    def personal(self) -> Manifest:
        """Names, shapes and dtypes of the tensors that stay at the site."""
        return self._manifest("personal")

    def _manifest(self, role: Any) -> Manifest:
        if not self._manifests:
            strategy = self.checked()
            network = network_of(self.bundle, self.overrides, weights=False)
            shared, personal = (manifest(network, strategy.roles, role) for role in ("shared", "personal"))
            copies = {COPY + name: spec for name, spec in shared.items()} if strategy.has_copy else {}
            self._manifests = {"shared": shared, "personal": {**personal, **copies}}
        return self._manifests[role]


def plan_of(fl_ctx: FLContext) -> Plan:
    """The plan of the running job.

    Raises:
        PFedSAMError: E29 if the job has none, and as `Plan.read`.
    """
    engine = fl_ctx.get_engine()
    plan = engine.get_component(PLAN_ID) if engine else None
    if not isinstance(plan, Plan):
        raise PFedSAMError(
            ErrorCode.CONFIGURATION_FILE, f"the job has no component '{PLAN_ID}' of class {Plan.__module__}.Plan."
        )
    plan.read(fl_ctx.get_prop(FLContextKey.APP_ROOT) or "")
    return plan
