"""Colours of classes, for masks with a palette and for outlines: one set, so that both show the same."""

from __future__ import annotations

#: Of Okabe and Ito, which people with colour-blind eyes tell apart; from the ninth class on they repeat.
CLASS_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (255, 255, 255),
)
#: Entries of a palette of 8 bits.
_ENTRIES = 256


def colour_of(number: int) -> tuple[int, int, int]:
    """Red, green and blue of class `number`, counted from 1."""
    return CLASS_COLOURS[(number - 1) % len(CLASS_COLOURS)]


def palette() -> list[int]:
    """A palette for class numbers, as Pillow takes it: 0 is black, each number has the colour of its class."""
    return [0, 0, 0, *(value for number in range(1, _ENTRIES) for value in colour_of(number))]
