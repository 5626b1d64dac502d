"""Scalars for TensorBoard: they travel as events, around the filters, so what may be in one is fixed here.

NVFlare's own writers take the names of events from the job, and NVFlare fills environment variables of the site into
every text of a job's configuration. So this sender takes nothing from a job: one event, listed tags, finite numbers.
Validation Dice is rounded as it is in a result (see `boundary`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE, AnalyticsDataType, LogWriterName
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.analytix_utils import create_analytic_dxo
from nvflare.app_common.widgets.convert_to_fed_event import FED_EVENT_PREFIX

from pfedsam.federated.boundary import METRIC_DECIMALS, rounded_metric
from pfedsam.federated.records import SCALARS, SENT_FILE, append_record
from pfedsam.training.strategy import Strategy

#: The event that `TBAnalyticsReceiver` of the packaged jobs waits for.
EVENT = FED_EVENT_PREFIX + ANALYTIC_EVENT_TYPE
#: Names of phases that may leave a site; any other phase is told by its number.
PHASES = ("alone", "final", "global", "local", "train")


@dataclass(frozen=True)
class Tag:
    """A kind of tag that may leave a site.

    Attributes:
        name: as it is shown to people, with `<...>` for what differs.
        pattern: regular expression of its tags.
        meaning: what the number is.
        decimals: of the number, None for as computed (32 bits, some 7 digits, in TensorBoard's files).
    """

    name: str
    pattern: str
    meaning: str
    decimals: int | None = None


_PHASE, _LAYER = rf"({'|'.join(PHASES)}|phase_\d{{1,2}})", r"layer_\d{1,2}"
#: Whatever may leave a site as a scalar.
TAGS = (
    Tag("val_dice_global", "val_dice_global", "Dice of the global model on the validation cases", METRIC_DECIMALS),
    Tag("val_dice_personal", "val_dice_personal", "Dice of the personal model on the same cases", METRIC_DECIMALS),
    Tag("loss/<phase>", f"loss/{_PHASE}", "mean training loss of a phase"),
    Tag("distilled_share/<phase>", f"distilled_share/{_PHASE}", "share of its steps in which the teacher taught"),
    Tag("gate_entropy/layer_<n>", f"gate_entropy/{_LAYER}", "how evenly a layer's gate uses its experts"),
    Tag("expert_share_<n>/layer_<n>", rf"expert_share_\d{{1,2}}/{_LAYER}", "share of one expert in a layer's gate"),
)
#: Tags that may leave a site.
LISTED = re.compile("|".join(kind.pattern for kind in TAGS))


def phase_tag(strategy: Strategy, name: str) -> str:
    """What a phase is called in a tag: its name if that is listed, else its place, so that no text of a job leaves."""
    if name in PHASES:
        return name
    return f"phase_{[phase.name for phase in (*strategy.phases, *strategy.final)].index(name)}"


class ListedScalars(FLComponent):
    """Sends listed scalars to the server, and nothing else.

    The tags are written down in the site's records: each before it is sent for the first time, and at the end of the
    run how often it was sent after that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._engine = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take the engine of the run; at its end write down how often each tag was sent."""
        if event_type == EventType.ABOUT_TO_START_RUN:
            self._engine = fl_ctx.get_engine()
        elif event_type == EventType.END_RUN:
            _record({tag: count - 1 for tag, count in self.sent.items() if count > 1}, fl_ctx)
            self.sent.clear()

    def send(self, tag: str, value: float, step: int) -> None:
        """Send one number under a listed tag; a number that is not finite is left out.

        Raises:
            ValueError: if the tag is not listed, or a Dice is not from 0 to 1.
            OSError: if the tag cannot be written down; nothing is sent then.
        """
        if not LISTED.fullmatch(tag):
            raise ValueError(f"scalar tag {tag!r} is not listed in {__name__}")
        if self._engine is None or not math.isfinite(value):
            return
        if any(kind.decimals is not None and re.fullmatch(kind.pattern, tag) for kind in TAGS):
            value = rounded_metric(value)
        dxo = create_analytic_dxo(
            tag=tag,
            value=float(value),
            data_type=AnalyticsDataType.SCALAR,
            writer=LogWriterName.TORCH_TB,
            global_step=int(step),
        )
        with self._engine.new_context() as fl_ctx:
            if tag not in self.sent:
                _record({tag: 1}, fl_ctx)
            self.fire_fed_event(EVENT, dxo.to_shareable(), fl_ctx)
        self.sent[tag] += 1


def _record(counts: Mapping[str, int], fl_ctx: FLContext) -> None:
    if counts:
        run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        append_record(run_dir, SENT_FILE, {"stage": SCALARS, "tags": dict(counts)})
