"""Errors that a person can act on.

An error has a *code*, which may leave a site, and a *sentence*, which may not: the sentence names files, cases and
keys, so it stays in the site's own log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any


class ErrorCode(str, Enum):
    """A code that may leave a site; its value is what travels.

    Attributes:
        meaning: what is wrong. Public: it may be shown to the administrator of a federation.
        remedy: what helps in general; an error's own sentence knows more.
    """

    meaning: str
    remedy: str

    def __new__(cls, code: str, meaning: str = "", remedy: str = "") -> ErrorCode:
        """A member from its code, meaning and remedy."""
        member = str.__new__(cls, code)
        member._value_, member.meaning, member.remedy = code, meaning, remedy
        return member

    def __str__(self) -> str:
        return self.value

    SITE_SETTINGS = (
        "E01",
        "site settings missing or wrong",
        "Write the site's settings again with `pfedsam site init`, and look at them with `pfedsam site check`.",
    )
    SITE_FOLDER = "E02", "site folder missing or empty", "Give the folder that holds `images` and `labels` of one site."
    MISSING_LABEL = "E03", "case without a label", "Give each image a label of the same name, or take the image away."
    SHAPES_DIFFER = (
        "E04",
        "image and label differ in shape",
        "Resample the label to its image, with nearest-neighbour interpolation.",
    )
    UNREADABLE_IMAGE = (
        "E05",
        "unreadable image or label",
        "Export the file again from its source; the message names what the reader found.",
    )
    TOO_FEW_CASES = "E06", "too few cases", "Add cases, or write an even split with `pfedsam split`."
    LABEL_OUT_OF_RANGE = (
        "E07",
        "label out of range",
        "Give labels the class numbers of the bundle; `pfedsam validate` lists the values.",
    )
    WRONG_SPLIT = "E08", "wrong split", "Correct `datalist.json`, or write it anew with `pfedsam split`."
    SITE_DATA = (
        "E09",
        "other problem in the site's data",
        "Run `pfedsam validate` on the site folder and follow its lines.",
    )
    WRONG_CHECKPOINT = (
        "E10",
        "wrong checkpoint",
        "Fetch the weights again with `pfedsam models download`, or give the file that the bundle expects.",
    )
    OTHER_BASE_WEIGHTS = (
        "E11",
        "base weights differ from the federation's",
        "Take the same backbone and checkpoint as the other sites.",
    )
    SHARED_TENSORS = (
        "E12",
        "shared tensors do not fit",
        "Take the bundle and the settings of the federation; names, shapes and types of the tensors must be equal.",
    )
    PERSONAL_STATE = (
        "E13",
        "personal state unreadable or of another network",
        "Take another federation name, or delete the state with `pfedsam state delete`.",
    )
    STATE_IN_USE = "E14", "personal state is in use by another job", "Wait for the other job, or abort it."
    NO_OUTGOING_FILTER = (
        "E15",
        "outgoing filter missing",
        "Write the site's policy again with `pfedsam site init`; never send without the filter.",
    )
    WRONG_SETTING = (
        "E16",
        "a setting is unknown or out of range",
        "Look the setting up with `pfedsam settings` and correct the value.",
    )
    NOT_FINITE = (
        "E17",
        "loss, gradient or parameter is not finite",
        "Lower the learning rate, or see in the server's log which site's update was unlike the others'.",
    )
    OVERRIDE_NOT_ALLOWED = (
        "E18",
        "override not allowed",
        "A job may set listed settings to plain values only; put anything else into the bundle.",
    )
    REFUSED_BY_FILTER = (
        "E19",
        "result refused by the site's outgoing filter",
        "See the site's log: something that may not leave was in the result.",
    )
    REFUSED_BY_GUARD = (
        "E20",
        "result refused by the server's guard",
        "See the server's log: the site sent something else than the job agreed.",
    )
    FEDERATION_NOT_AGREED = (
        "E21",
        "federation not agreed with the site",
        "Let the site's IT add the federation to its settings with `pfedsam site init --federations`.",
    )
    DEPLOYMENT = (
        "E22",
        "the deployment does not answer or refuses",
        "Look at the processes with `pfedsam poc status`, and at the logs that the message names.",
    )
    PRIVACY_TOO_WEAK = (
        "E23",
        "the site asks for clipping or noise that the job has not",
        "Export the job with the clip and noise that the site asks for, or agree on others.",
    )
    NOT_OURS = (
        "E24",
        "files that are not ours would be overwritten",
        "Choose another folder, or give `--force` if nothing in it is needed.",
    )
    OTHER_RUN = (
        "E25",
        "a run folder belongs to another run",
        "Give another `--out`, or `--fresh`, which moves the old run aside.",
    )
    BEYOND_LIMITS = (
        "E26",
        "the job asks for more rounds, epochs or hours than the site allows",
        "Shorten the job, or let the site's IT raise its limits with `pfedsam site init`.",
    )
    TOO_FEW_SITES = (
        "E27",
        "too few sites take part",
        "See which site failed or was refused, then resume the job with `pfedsam job resume`.",
    )
    UNKNOWN_NAME = (
        "E28",
        "no bundle, strategy, job or backbone has this name",
        "Take one of the names that the message lists, or the path of a file.",
    )
    CONFIGURATION_FILE = (
        "E29",
        "a configuration file is not valid or lacks something",
        "Correct the file that the message names.",
    )
    BUNDLE_FAILED = (
        "E30",
        "a bundle could not be started",
        "Check the settings, then try the bundle alone with `monai.bundle run`.",
    )
    MISSING_LIBRARY = (
        "E31",
        "an optional library is not installed",
        "Install the extra of pfedsam that the message names.",
    )
    CONTRADICTION = (
        "E32",
        "what is asked for does not go together",
        "Leave out one of the things that the message names.",
    )
    RUN_INCOMPLETE = (
        "E33",
        "a run or its records lack what is asked for",
        "Finish or repeat the run that the message names.",
    )
    EXPORT_DIFFERS = (
        "E34",
        "an exported model computes other numbers",
        "Use the model file itself, and tell the project which model it was.",
    )
    PEERS_WOULD_SEE = (
        "E35",
        "another site could read this site's model, and it has not agreed to that",
        "Take downloads that do not tell one site's model, or let the site's IT set `peers_see_my_model`.",
    )
    UNEXPECTED = "E99", "unexpected error", "See the log of the site or server where it was raised."


#: Characters of a value in a sentence.
LONGEST_VALUE = 100
REFUSED = "SITE_REFUSED"
_REPLY = re.compile(rf"{REFUSED}:(E\d\d)")


class PFedSAMError(Exception):
    """An error with a code that may leave the site and a sentence that may not.

    Args:
        code: which kind of error.
        message: one sentence: what (file, site, key), what was expected, what was found.
        remedy: one sentence: what to do next.

    Raises:
        ValueError: if the code is unknown.
    """

    def __init__(self, code: ErrorCode | str, message: str, remedy: str = "") -> None:
        self.code = ErrorCode(code)
        self.meaning = self.code.meaning
        self.message = message
        self.remedy = remedy
        super().__init__(f"{self.code}: {message}" + (f" {remedy}" if remedy else ""))

    def as_reply(self) -> str:
        """The return code that leaves the site: nothing but the code."""
        return f"{REFUSED}:{self.code}"


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are, for a message."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def shown(value: Any) -> str:
    """A value for a sentence, not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; lists in lists
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def code_of_reply(reply: str) -> ErrorCode | None:
    """The code in a return code made by `PFedSAMError.as_reply`, or None if it is none of ours."""
    match = _REPLY.fullmatch(reply)
    return next((code for code in ErrorCode if match and code.value == match.group(1)), None)


def first_of_ours(error: BaseException | None) -> PFedSAMError | None:
    """The error of ours that a library wrapped in its own, or None."""
    while error is not None and not isinstance(error, PFedSAMError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def failing_as(code: ErrorCode, message: str, remedy: str) -> Iterator[None]:
    """Whatever a library raises inside becomes an error of ours; one of ours that it wrapped comes out as it was.

    Raises:
        PFedSAMError: `code` with `message: <the library's words>` and the remedy.
    """
    try:
        yield
    except Exception as error:
        raise first_of_ours(error) or PFedSAMError(code, f"{message}: {error}", remedy) from error
