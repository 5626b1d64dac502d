"""Shortcuts that give the same outputs and gradients up to rounding, each of which can be turned off.

    with without("unpadded"):
        network(images)

`unpadded`: SAM's ViT attends in windows without the tokens that only pad them (`pfedsam.networks.vit`);
`fused_lora`: a low-rank update is added in place of being computed beside (`pfedsam.networks.lora`);
`folded_norm`: a frozen batch norm is a part of the convolution before it, and a 1x1 convolution a matrix product
(`pfedsam.networks.tiny_vit`);
`row_groups`: the first, large maps of TinyViT go through its convolutions by groups of rows, which stay in the CPU's
cache (without gradients only);
`sdpa`: torch's fused attention where it is faster or needs less memory.

The environment variable `PFEDSAM_WITHOUT` names those that are off from the start, with commas between them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pfedsam.errors import ErrorCode, PFedSAMError

VARIABLE = "PFEDSAM_WITHOUT"
SHORTCUTS = ("unpadded", "fused_lora", "folded_norm", "row_groups", "sdpa")


def named(text: str) -> set[str]:
    """Names of shortcuts with commas between them.

    Raises:
        PFedSAMError: E16 if there is no such shortcut.
    """
    names = {name for name in text.split(",") if name}
    if names - set(SHORTCUTS):
        message = f"{VARIABLE} names {sorted(names - set(SHORTCUTS))}."
        raise PFedSAMError(ErrorCode.WRONG_SETTING, message, f"There are {', '.join(SHORTCUTS)}.")
    return names


_off: set[str] = named(os.environ.get(VARIABLE, ""))


def uses(shortcut: str) -> bool:
    """Whether a shortcut is on."""
    return shortcut not in _off


@contextmanager
def without(*shortcuts: str) -> Iterator[None]:
    """Shortcuts off inside a `with` block, in the whole process (E16 if there is no such shortcut)."""
    before = set(_off)
    _off.update(named(",".join(shortcuts)))
    try:
        yield
    finally:
        _off.clear()
        _off.update(before)
