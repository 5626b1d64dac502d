"""Errors that a person can act on.

An error has a *code*, which may leave a site, and a *sentence*, which may not: the sentence names files, cases and
keys, so it stays in the site's own log (ARCHITECTURE, rule 4).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What each code means. The text is public: it may be shown to the administrator of a federation.
CODES: dict[str, str] = {
    "E01": "site settings missing or wrong",
    "E02": "site folder missing or empty",
    "E03": "case without a label",
    "E04": "image and label differ in shape",
    "E05": "unreadable image or label",
    "E06": "too few cases",
    "E07": "label out of range",
    "E08": "wrong split",
    "E09": "other problem in the site's data",
    "E10": "wrong checkpoint",
    "E11": "base weights differ from the federation's",
    "E12": "shared tensors do not fit",
    "E13": "personal state unreadable or of another network",
    "E14": "personal state is in use by another job",
    "E15": "outgoing filter missing",
    "E16": "unknown or wrong configuration",
    "E17": "loss is not finite",
    "E18": "override not allowed",
    "E19": "result refused by the site's outgoing filter",
    "E20": "result refused by the server's guard",
    "E21": "federation not agreed with the site",
    "E22": "the deployment does not answer or refuses",
    "E23": "the site asks for clipping or noise that the job has not",
    "E24": "files that are not ours would be overwritten",
    "E25": "a run folder belongs to another run",
    "E26": "the job asks for more rounds, epochs or hours than the site allows",
    "E27": "too few sites take part",
    "E99": "unexpected error",
}

REFUSED = "SITE_REFUSED"
_REPLY = re.compile(rf"{REFUSED}:(E\d\d)")


class PFedSAMError(Exception):
    """An error with a code that may leave the site and a sentence that may not.

    Args:
        code: a key of `CODES`.
        message: one sentence: what (file, site, key), what was expected, what was found.
        remedy: one sentence: what to do next.

    Raises:
        KeyError: if the code is unknown.
    """

    def __init__(self, code: str, message: str, remedy: str = "") -> None:
        self.code = code
        self.meaning = CODES[code]
        self.message = message
        self.remedy = remedy
        super().__init__(f"{code}: {message}" + (f" {remedy}" if remedy else ""))

    def as_reply(self) -> str:
        """The return code that leaves the site: nothing but the code."""
        return f"{REFUSED}:{self.code}"


def few(names: Iterable[str], limit: int = 5) -> str:
    """The first of many names, and how many more there are, for a message."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def code_of_reply(reply: str) -> str | None:
    """The code in a return code made by `PFedSAMError.as_reply`, or None if it is none of ours."""
    match = _REPLY.fullmatch(reply)
    return match.group(1) if match and match.group(1) in CODES else None


def first_of_ours(error: BaseException | None) -> PFedSAMError | None:
    """The error of ours that a library wrapped in its own, or None."""
    while error is not None and not isinstance(error, PFedSAMError):
        error = error.__cause__ or error.__context__
    return error
