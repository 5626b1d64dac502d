"""A picture of a prediction on its image, for a quick look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion

from pfedsam.data.colours import colour_of
from pfedsam.data.intensity import WINDOW
from pfedsam.data.picture import Picture
from pfedsam.files import when_whole
from pfedsam.inference.predict import Prediction

#: A picture whose long side is shorter, in pixels, is shown so many whole times as large; slices of volumes too.
_LEAST_SIDE = 400
#: Height of the letters by the long side of what is shown, and the smallest that can be read.
_LETTERS, _LEAST_LETTERS = 1 / 45, 13
#: Width of a line by the same side.
_LINE = 1 / 250
_PAPER, _INK = (20, 20, 20), (235, 235, 235)
_NOTE = "Research only. Not for diagnostic use."

Mask = NDArray[np.bool_]


def write_overlay(found: Prediction, path: Path, classes: Mapping[str, Sequence[int]], model: str) -> None:
    """Outline every class on the picture, or on the slice with the largest prediction, with a caption below.

    The outlines are those of the label map that is written beside it.

    A picture has its own size, and is enlarged by a whole factor only if it is tiny. A slice of a volume has square
    pixels of its finer spacing.

    Args:
        found: the prediction.
        path: file to write (PNG).
        classes: label values that belong to each class, by its name: of nested ones also those inside it.
        model: what the caption calls the model.
    """
    label = found.label().reshape(found.image.volume_shape)
    z = int((label > 0).sum(axis=(0, 1)).argmax())
    masks = {name: np.isin(label[..., z], list(values)) for name, values in classes.items()}
    shown = _shown(found.image, z)
    factors = _factors(found.image)
    canvas = _enlarged(shown, factors)
    width = max(1, round(max(canvas.shape[:2]) * _LINE))
    for number, mask in enumerate(masks.values(), 1):
        _draw_outline(canvas, _enlarged(found.image.rows(mask), factors), colour_of(number), width)
    head = f"{found.image.source.name}, {model}"
    if found.image.kind != "picture":
        head += f", slice {z + 1} of {found.image.volume_shape[2]}"
    unit = "pixels" if found.image.kind == "picture" else "voxels in this slice"
    entries: list[tuple[str, tuple[int, int, int] | None]] = [(head, None)]
    for number, (name, mask) in enumerate(masks.items(), 1):
        count = int(mask.sum())
        entries.append((f"{name}: {count:,} {unit}" if count else f"{name}: nothing found", colour_of(number)))
    entries.append((_NOTE, None))
    with when_whole(path) as file:
        _with_caption(canvas, entries).save(file)


def _shown(image: Picture, z: int) -> NDArray[np.uint8]:
    """What lies below the outlines, `(rows, columns, 3)`: colours as they are, grey between two percentiles."""
    rows = np.asarray(image.rows(image.plane(z)))
    if image.is_colour:
        return np.ascontiguousarray(rows)
    values = rows.astype(np.float64)
    low, high = (float(one) for one in np.percentile(image.grey(), WINDOW))
    if low == high:
        low, high = float(image.values.min()), float(image.values.max())
    grey = np.clip((values - low) / (high - low or 1.0), 0, 1) * 255
    return np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)


def _factors(image: Picture) -> tuple[float, float]:
    """How much larger than stored rows and columns are shown."""
    across, down = (1.0, 1.0) if image.spacing is None else image.spacing[:2]
    finest = min(across, down)
    sides = image.shape[1] * down / finest, image.shape[0] * across / finest
    whole = -(-_LEAST_SIDE // max(sides))
    return whole * down / finest, whole * across / finest


def _enlarged(rows: NDArray[Any], factors: tuple[float, float]) -> NDArray[Any]:
    """Rows `(h, w[, 3])`, each pixel shown as a block: nothing is smoothed."""
    sizes = [max(1, round(size * factor)) for size, factor in zip(rows.shape[:2], factors, strict=True)]
    at = [
        np.minimum((np.arange(size) + 0.5) * stored / size, stored - 1).astype(int)
        for size, stored in zip(sizes, rows.shape[:2], strict=True)
    ]
    return np.ascontiguousarray(rows[np.ix_(*at)])


def _draw_outline(canvas: NDArray[np.uint8], area: Mask, colour: tuple[int, int, int], width: int) -> None:
    """A line just inside the border of an area, with a dark one just outside it: it is seen on white and on black."""
    if not area.any():
        return
    canvas[binary_dilation(area) & ~area] = _PAPER
    canvas[area & ~binary_erosion(area, iterations=width)] = colour


def _with_caption(canvas: NDArray[np.uint8], entries: Sequence[tuple[str, Any]]) -> Image.Image:
    """The picture with lines of text below it; an entry with a colour has a square of it before its text."""
    height, width = canvas.shape[:2]
    size = max(_LEAST_LETTERS, round(_LETTERS * max(height, width)))
    font, gap = _font(size), size // 2
    lines: list[tuple[str, Any]] = []
    for text, colour in entries:
        room = width - 2 * gap - (0 if colour is None else size + gap)
        first, *others = _wrapped(text, font, room)
        lines += [(first, colour), *((other, None) for other in others)]
    step = round(1.4 * size)
    out = Image.new("RGB", (width, height + 2 * gap + step * len(lines)), _PAPER)
    out.paste(Image.fromarray(canvas), (0, 0))
    draw, y = ImageDraw.Draw(out), height + gap
    for text, colour in lines:
        x = gap
        if colour is not None:
            draw.rectangle((x, y + size // 6, x + size, y + size // 6 + size), fill=colour)
            x += size + gap
        draw.text((x, y), text, font=font, fill=_INK)
        y += step
    return out


def _font(size: int) -> Any:
    """The letters that matplotlib brings along: names of files may hold any."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _wrapped(text: str, font: Any, room: int) -> list[str]:
    """A text in lines that are not wider than `room`; a word that is wider is broken."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}".lstrip()
        if font.getlength(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return lines
