"""The two filters at the boundary: `PersonalisedFilter` at a site, `IncomingGuard` at the server.

Both apply the rules of `boundary` to every result and record what passed. Neither writes to NVFlare's own log methods
(`log_error` and others): those also fire events, which a job may forward; sentences stay in the local log.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.client import Client
from nvflare.apis.dxo import MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter, FilterContextKey, FilterSource
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReturnCode, ServerCommandKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.utils.task_utils import get_filters
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants

from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.boundary import (
    FINGERPRINT_KEY,
    ROUND_KEY,
    SanitizedResult,
    check_headers,
    check_result,
    told_names,
    with_cases,
)
from pfedsam.federated.disabled import require_enabled, tell_withheld, withhold
from pfedsam.federated.plan import plan_of
from pfedsam.federated.records import CHECKED, LEFT, RECEIVED_FILE, SENT_FILE, append_record
from pfedsam.federated.settings import SITE_SETTINGS, site_settings
from pfedsam.parameters import Manifest, group_of

#: The number of training cases of a site may change by this factor between rounds.
LARGEST_CHANGE = 10

_RESULT_FILTERS = "task_result_filters"
#: Personal tensors that filters of ours have taken out of the result on its way.
_EXCLUDED = "pfedsam_excluded"


class PersonalisedFilter(Filter):
    """Outgoing filter of a site: shared tensors pass, experts stay, anything unknown is refused.

    The learner hands over its whole trainable state; this filter builds the payload. It fails closed: whatever goes
    wrong in it, a return code is all that leaves, and the sentence stays in the site's log.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Write down what leaves in the end, after noise, packing or encryption by the filters behind this one."""
        if event_type == EventType.BEFORE_TASK_EXECUTION:
            if self._is_last_of_ours(fl_ctx, str(fl_ctx.get_prop(FLContextKey.TASK_NAME))):
                tell_withheld(fl_ctx)
            return
        if event_type != EventType.AFTER_TASK_RESULT_FILTER:
            return
        task, result = (fl_ctx.get_prop(key) for key in (FLContextKey.TASK_NAME, FLContextKey.TASK_RESULT))
        if self._is_last_of_ours(fl_ctx, task):
            _append(fl_ctx, SENT_FILE, {"stage": LEFT, "task": task, **_contents(result)})

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Rebuild a result from checked parts.

        Args:
            shareable: the learner's result.
            fl_ctx: context of the task.

        Returns:
            The rebuilt result, or a reply with nothing but `SITE_REFUSED:Exx`.
        """
        try:
            return self._rebuilt(shareable, fl_ctx)
        except PFedSAMError as error:
            return self._refused(error, fl_ctx)
        except Exception as error:
            self.logger.exception("the outgoing filter failed")
            return self._refused(
                PFedSAMError(ErrorCode.REFUSED_BY_FILTER, f"the outgoing filter failed: {type(error).__name__}."),
                fl_ctx,
            )

    def _rebuilt(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        plan = plan_of(fl_ctx)
        shared = plan.shared()
        site = site_settings(fl_ctx)
        check_site_ceiling(shared, site.may_share)
        passed = check_result(
            shareable,
            task,
            shared=shared,
            personal=plan.personal(),
            further=site.allowed(plan.further()),
            code=ErrorCode.REFUSED_BY_FILTER,
        )
        # a site may apply this filter by its privacy.json and the job once more: the first takes the experts out, the
        # last writes down what leaves
        excluded = passed.excluded + int(fl_ctx.get_prop(_EXCLUDED, 0))
        last = self._is_last_of_ours(fl_ctx, task)
        fl_ctx.set_prop(_EXCLUDED, 0 if last else excluded, private=True, sticky=False)
        if last:
            self._record(passed, excluded, task, fl_ctx)
        return passed.shareable

    def _record(self, passed: SanitizedResult, excluded: int, task: str, fl_ctx: FLContext) -> None:
        by_group = passed.bytes_by_group
        record = {
            "stage": CHECKED,
            "task": task,
            "reply": passed.shareable.get_return_code(),
            "round": passed.metadata.get(ROUND_KEY),
            "tensors": len(passed.tensors),
            "bytes": sum(by_group.values()),
            "by_group": by_group,
            "excluded": excluded,
            "metadata": told_names(passed.metadata),
            "sha256": passed.sha256(),
            "filters": [_described(filter_) for filter_ in outgoing_filters(fl_ctx, task)],
        }
        _append(fl_ctx, SENT_FILE, record)
        self.logger.info(
            f"task {task}: {record['tensors']} tensors with {record['bytes']} bytes may leave the site {by_group}, "
            f"{excluded} personal tensors stay"
        )

    def _refused(self, error: PFedSAMError, fl_ctx: FLContext) -> Shareable:
        self.logger.error(f"result refused, only its code leaves the site: {error}")
        with suppress(Exception):
            task = str(fl_ctx.get_prop(FLContextKey.TASK_NAME))
            # the last filter of ours writes down a refusal by one before it as what it gets
            if self._is_last_of_ours(fl_ctx, task):
                _append(fl_ctx, SENT_FILE, {"stage": CHECKED, "task": task, "reply": error.as_reply(), "bytes": 0})
        return make_reply(error.as_reply())

    def _is_last_of_ours(self, fl_ctx: FLContext, task: str) -> bool:
        own_filters = [filter_ for filter_ in outgoing_filters(fl_ctx, task) if type(filter_) is PersonalisedFilter]
        return not own_filters or own_filters[-1] is self


class IncomingGuard(Filter):
    """Guard of the server: the same rules once more, for a site whose filter is missing or was changed.

    A personal tensor is refused here, not left out. The result must be of the round that runs. The number of training
    cases, which weighs a site's contribution, must stay near the first that the site sent; what was agreed on in the
    plan (`most_cases`) is the most that it counts as. NVFlare's widgets read a result as it came: here
    they get the checked one. A site that was disabled gets no model any more (`pfedsam.federated.disabled`).
    """

    #: Whether the values can be read. If not, a number of cases above the agreed one is refused, not lowered.
    sees_values = True

    def __init__(self) -> None:
        super().__init__()
        self._first_steps: dict[str, int] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Forget the sites of an earlier run; keep models back from disabled sites."""
        if event_type == EventType.START_RUN:
            self._first_steps = {}
        elif event_type == EventType.AFTER_TASK_DATA_FILTER:
            withhold(fl_ctx)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Rebuild a result from checked parts and the headers that NVFlare's aggregation needs.

        Args:
            shareable: the result as received.
            fl_ctx: context of the submission.

        Returns:
            The rebuilt result.

        Raises:
            PFedSAMError: E20 or E16. NVFlare then replaces the result by TASK_RESULT_FILTER_ERROR, and the site counts
                as failed in this round.
        """
        client = _peer_name(fl_ctx)
        try:
            rebuilt = self._rebuilt(shareable, client, fl_ctx)
            _show_widgets(rebuilt, fl_ctx)
            return rebuilt
        except PFedSAMError as error:
            refusal = error
        except Exception as error:
            refusal = PFedSAMError(ErrorCode.REFUSED_BY_GUARD, f"the guard failed: {type(error).__name__}.")
            refusal.__cause__ = error
        self.logger.error(f"result of site {client} refused: {refusal}")
        with suppress(Exception):
            _show_widgets(make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR), fl_ctx)
            task = str(fl_ctx.get_prop(FLContextKey.TASK_NAME))
            refused = {"client": client, "task": task, "accepted": False, "code": refusal.code}
            _append(fl_ctx, RECEIVED_FILE, refused)
        raise refusal

    def _rebuilt(self, shareable: Shareable, client: str, fl_ctx: FLContext) -> Shareable:
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        _check_identity(shareable, client)
        require_enabled(client, fl_ctx.get_engine().get_workspace().get_root_dir())
        plan = plan_of(fl_ctx)
        passed = check_result(
            shareable, task, shared=plan.shared(), further=plan.further(), code=ErrorCode.REFUSED_BY_GUARD
        )
        headers = check_headers(shareable, code=ErrorCode.REFUSED_BY_GUARD)
        contribution: dict[str, Any] = {}
        if passed.tensors:
            self._check_metadata(passed.metadata, client, fl_ctx)
            _check_round(passed.metadata[ROUND_KEY], headers, task, fl_ctx)
            cases = passed.metadata[MetaKey.NUM_STEPS_CURRENT_ROUND]
            counted = self._counted(cases, client, fl_ctx)
            contribution = {"cases": cases, "counted": counted, "norm": passed.norm() if self.sees_values else None}
            if counted != cases:
                passed = with_cases(passed, counted)
        for key, value in headers.items():
            passed.shareable.set_header(key, value)
        record = {
            "client": client,
            "task": task,
            "round": passed.metadata.get(ROUND_KEY),
            "bytes": sum(passed.bytes_by_group.values()),
            "accepted": True,
            "reply": passed.shareable.get_return_code(),
            "sha256": passed.sha256(),
            **contribution,
        }
        _append(fl_ctx, RECEIVED_FILE, record)
        return passed.shareable

    def _counted(self, cases: int, client: str, fl_ctx: FLContext) -> int:
        """What a site's number of cases counts as: at most what was agreed on."""
        most = plan_of(fl_ctx).most_of(client)
        if most is None or cases <= most:
            return cases
        if not self.sees_values:
            raise PFedSAMError(
                ErrorCode.REFUSED_BY_GUARD, f"the site reports {cases} training cases, {most} were agreed on."
            )
        self.logger.warning(f"site {client} reports {cases} training cases, {most} were agreed on: it counts as {most}")
        return most

    def _check_metadata(self, metadata: dict[str, Any], client: str, fl_ctx: FLContext) -> None:
        model = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)
        expected = ((model or {}).get(ModelLearnableKey.META) or {}).get(FINGERPRINT_KEY)
        if expected is not None and metadata[FINGERPRINT_KEY] != expected:
            raise PFedSAMError(ErrorCode.REFUSED_BY_GUARD, "the site trains other base weights than the federation.")
        steps = metadata[MetaKey.NUM_STEPS_CURRENT_ROUND]
        first = self._first_steps.get(client, steps)
        if not first <= steps * LARGEST_CHANGE or not steps <= first * LARGEST_CHANGE:
            raise PFedSAMError(
                ErrorCode.REFUSED_BY_GUARD, f"the site reports {steps} training cases, and {first} in its first round."
            )
        self._first_steps[client] = first


def outgoing_filters(fl_ctx: FLContext, task: str) -> list[Filter]:
    """The filters of a task's result at this site, in the order in which NVFlare applies them (site scope first)."""
    table = getattr(fl_ctx.get_prop(FLContextKey.RUNNER), _RESULT_FILTERS, None)
    if not isinstance(table, dict):
        return []
    return get_filters(_RESULT_FILTERS, fl_ctx, table, task, FilterKey.OUT)


def require_outgoing_filter(fl_ctx: FLContext, tasks: Iterable[str]) -> None:
    """Make sure that `PersonalisedFilter` is the first outgoing filter of every task.

    Later filters in the chain (noise, quantisation, encryption) then see shared tensors only.

    Args:
        fl_ctx: context of a task at the site.
        tasks: names of the tasks whose results must be filtered.

    Raises:
        PFedSAMError: E15 naming the first task without it. A subclass is not accepted: it could let anything pass.
    """
    for task in tasks:
        chain = outgoing_filters(fl_ctx, task)
        # a site's own filter does not excuse a job that left it out
        of_job = [filter_ for filter_ in chain if filter_.get_prop(FilterContextKey.SOURCE) != FilterSource.SITE]
        if not of_job or type(of_job[0]) is not PersonalisedFilter or type(chain[0]) is not PersonalisedFilter:
            name = f"{PersonalisedFilter.__module__}.{PersonalisedFilter.__name__}"
            classes = [type(filter_).__name__ for filter_ in chain]
            raise PFedSAMError(
                ErrorCode.NO_OUTGOING_FILTER,
                f"the first outgoing filter of task '{task}' is not {name}: {classes}.",
                "Name it first, with this task, in the task_result_filters of the job's config_fed_client.json.",
            )


def check_site_ceiling(shared: Manifest, ceiling: Collection[str] | None) -> None:
    """Refuse a plan that shares more than the site allows.

    Raises:
        PFedSAMError: E19 naming the groups above the site's ceiling.
    """
    above = [] if ceiling is None else sorted({group_of(name) for name in shared} - set(ceiling))
    if above:
        raise PFedSAMError(
            ErrorCode.REFUSED_BY_FILTER,
            f"the job shares group(s) {above}, the site allows {sorted(ceiling or ())}.",
            f"Ask for another strategy, or change 'may_share' in local/{SITE_SETTINGS}.",
        )


def _described(filter_: Filter) -> str:
    """Class, where it comes from, and what it was given, for example `ClipAndNoise(clip=1.0, noise_multiplier=0.5)`."""
    given = inspect.signature(type(filter_)).parameters
    arguments = ", ".join(f"{name}={getattr(filter_, name)!r}" for name in given if hasattr(filter_, name))
    where = " of the site" if filter_.get_prop(FilterContextKey.SOURCE) == FilterSource.SITE else ""
    return f"{type(filter_).__name__}({arguments}){where}"


def _contents(result: Shareable) -> dict[str, Any]:
    """Reply, round, number, bytes and digest of what is in a result: arrays, or ciphertexts as bytes; and the names of
    its metadata and metrics.
    """
    record: dict[str, Any] = {"reply": result.get_return_code(), "round": None}
    data: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    with suppress(ValueError):  # a reply that is only a code
        dxo = from_shareable(result)
        data, metadata = dxo.data or {}, dxo.meta or {}
    values = {name: np.frombuffer(v, np.uint8) if isinstance(v, bytes) else v for name, v in data.items()}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    others = {**metadata, **{name: value for name, value in values.items() if name not in arrays}}
    return record | {
        "round": metadata.get(ROUND_KEY),
        "tensors": len(arrays),
        "bytes": sum(array.nbytes for array in arrays.values()),
        "metadata": told_names(others),
        # the digest of stage `checked`, if no filter behind ours has changed anything
        "sha256": SanitizedResult(result, arrays, others).sha256(),
    }


def _peer_name(fl_ctx: FLContext) -> str:
    peer = fl_ctx.get_peer_context()
    return str(peer.get_identity_name(default="?")) if peer else "?"


def _check_identity(result: Shareable, claimed: str) -> None:
    # the peer context is sent by the site; this header is set by the server from the site's token
    client = result.get_header(ServerCommandKey.FL_CLIENT)
    if isinstance(client, Client) and client.name != claimed:
        raise PFedSAMError(ErrorCode.REFUSED_BY_GUARD, f"site '{client.name}' calls itself '{claimed}'.")


def _check_round(number: int, headers: Mapping[str, Any], task: str, fl_ctx: FLContext) -> None:
    """Refuse an update that was made for another round: one that came late, or was kept and sent again."""
    current = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
    if task != AppConstants.TASK_TRAIN or current is None:
        return
    jar = headers.get(ReservedHeaderKey.COOKIE_JAR) or {}
    rounds = {number, jar.get(AppConstants.CONTRIBUTION_ROUND, number)}
    if rounds != {current}:
        raise PFedSAMError(
            ErrorCode.REFUSED_BY_GUARD, f"the update is of round {sorted(rounds, key=str)}, this is round {current}."
        )


def _show_widgets(rebuilt: Shareable, fl_ctx: FLContext) -> None:
    """Put the checked result in the place of the submitted one, which widgets take from the peer's context."""
    peer = fl_ctx.get_peer_context()
    if peer is not None and peer.get_prop(FLContextKey.SHAREABLE) is not None:
        peer.put(FLContextKey.SHAREABLE, rebuilt, private=True, sticky=True)


def _append(fl_ctx: FLContext, file_name: str, record: dict[str, Any]) -> None:
    append_record(Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())), file_name, record)
