"""The pictures of the gallery are those that its page shows, small, and say nothing but what is seen."""

from __future__ import annotations

import re
import runpy
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


def test_a_terminal_shows_tables_without_progress_files_and_records() -> None:
    printed = """writing phantom cases: 1 of 36, passed: 0:01:00, left: ?
  writing phantom cases      ━━━━━━━━━ 36/36 0:01:31 left: 0:00:00
4 site folders with 9 cases each in runs/bench-phantom-data
15 runs, 4 done before; records: tests/benchmarks/results/phantom.jsonl
4 record(s) are of other images
  Strategies on the test cases that all have
│ pfedsam      │   1/1 │  0.269 │
"""
    shown = runpy.run_path(str(GALLERY / "pictures.py"))["tables_in"](printed)
    assert shown == "  Strategies on the test cases that all have\n│ pfedsam      │   1/1 │  0.269 │"
