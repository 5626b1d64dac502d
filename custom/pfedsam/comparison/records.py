"""What a record of a comparison and the results of a run hold: a file that was changed by hand is named."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pfedsam.errors import shown

logger = logging.getLogger(__name__)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Case(_Part):
    site: str
    case: str
    model: str
    dice: list[float]


class _RecordCase(_Case):
    hd95: list[float]
    asd: list[float]
    nsd: list[float]
    failed: list[bool]
    patient: str = ""


class _Note(_Part):
    round: int | None
    bytes: int
    val_dice_global: float | None = None
    val_dice_personal: float | None = None


class _Card(_Part):
    code: str
    configuration: str
    split: str
    machine: str


class _Seconds(_Part):
    training: float


class _Record(_Part):
    key: str
    strategy: str
    kind: str
    seed: int
    held_out: str | None
    rounds: int
    settings: dict[str, Any]
    cases: list[_RecordCase]
    history: list[_Note]
    steps: int | None
    teacher_passes: int | None
    bytes_per_round: float
    seconds: _Seconds
    card: _Card


class _Site(_Part):
    cases: int
    dice_global: float
    dice_personal: float
    failures_global: int
    failures_personal: int
    bytes_per_round: float


class _Results(_Part):
    sites: dict[str, _Site]
    cases: list[_Case]
    mean_global: float
    mean_personal: float
    worst_global: float
    worst_personal: float
    about: dict[str, Any] = {}


def problem_of_record(record: Mapping[str, Any], whole: bool = True) -> str:
    """What is wrong with a record of `pfedsam compare`, "" if nothing is.

    Args:
        record: one line of the records.
        whole: whether something that is missing is wrong, too.
    """
    return _problem(_Record, record, whole)


def problem_of_results(results: Any) -> str:
    """What is wrong with the content of a `results.json`, "" if nothing is."""
    return _problem(_Results, results, whole=True)


@cache
def warn_once(text: str) -> None:
    """Log a warning, the first time that it is given."""
    logger.warning("%s", text)


def _problem(model: type[BaseModel], content: Any, whole: bool) -> str:
    try:
        model.model_validate(content)
    except ValidationError as error:
        details = [detail for detail in error.errors() if whole or detail["type"] != "missing"]
        if details:
            where = ".".join(map(str, details[0]["loc"])) or "the whole"
            problem = "is missing" if details[0]["type"] == "missing" else f"is {shown(details[0]['input'])}"
            return f"{where} {problem}"
    return ""
