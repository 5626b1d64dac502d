"""Scalars for TensorBoard: they travel as events, around the filters, so their tags are an allow-list of their own."""

from __future__ import annotations

import math
import re
from typing import Any

#: Tags that may leave a site. A phase's name is bound to short lower-case words, an expert's place to numbers.
LISTED = re.compile(
    r"val_dice_(global|personal)|"
    r"(loss|distilled_share)/[a-z_]{1,20}|"
    r"(gate_entropy|expert_share_\d{1,2})/layer_\d{1,2}"
)


class ListedScalars:
    """Sends listed scalars, and nothing else.

    Args:
        writer: an NVFlare log writer with `add_scalar`, or None: then nothing is sent.
    """

    def __init__(self, writer: Any | None) -> None:
        self._writer = writer

    def send(self, tag: str, value: float, step: int) -> None:
        """Send one finite number under a listed tag; a number that is not finite is left out.

        Raises:
            ValueError: if the tag is not listed.
        """
        if not LISTED.fullmatch(tag):
            raise ValueError(f"scalar tag {tag!r} is not listed in {__name__}")
        if self._writer is not None and math.isfinite(value):
            self._writer.add_scalar(tag, float(value), global_step=int(step))
