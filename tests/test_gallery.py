"""The pictures of the gallery are those that its page shows, small, and say nothing but what is seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

GALLERY = Path(__file__).parents[1] / "custom" / "gallery"
PICTURES = sorted(GALLERY.glob("*.webp"))
MOST, MOST_BYTES = 8, 150_000


def test_the_page_shows_each_picture_with_words() -> None:
    shown = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", (GALLERY / "README.md").read_text())
    assert sorted(name for _, name in shown) == [path.name for path in PICTURES]
    assert all(len(words) > 20 for words, _ in shown) and 0 < len(PICTURES) <= MOST


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_a_picture_is_small_and_its_file_says_nothing_beside_it(path: Path) -> None:
    assert path.stat().st_size <= MOST_BYTES
    with Image.open(path) as image:
        # a WebP has these two of its animation, which it is not
        assert image.format == "WEBP" and set(image.info) <= {"loop", "background", "timestamp", "duration"}
        assert max(image.size) <= 1600 and len(set(image.convert("L").tobytes())) > 20
