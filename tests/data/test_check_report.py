"""The report of a site's check can be read: one line for what many files share, and no broken word in 80 columns."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from image_files import nifti
from PIL import Image
from rich.console import Console

from pfedsam.data.check_report import print_report
from pfedsam.data.checks import check_site
from pfedsam.data.site_report import CaseRow, SiteReport


def shown(report: SiteReport, width: int = 80) -> list[str]:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, no_color=True))
    return stream.getvalue().splitlines()


def xrays(site: Path, count: int = 20, white: int = 255) -> Path:
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (site / kind).mkdir(parents=True)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (30, 24), dtype=np.uint8)).save(site / "images" / f"x{number:02}.png")
        mask = np.zeros((30, 24), np.uint8)
        mask[5:9, 5:9] = white
        Image.fromarray(mask).save(site / "labels" / f"x{number:02}.png")
    return site


def test_twenty_masks_of_0_and_255_are_one_line(tmp_path: Path) -> None:
    report = check_site(xrays(tmp_path), colour=True)
    (line,) = [line for line in shown(report) if "255 is read as 1" in line]
    assert "19 more" in line and "x00.png" in line and line.startswith("NOTE E07")
    assert sum("255 is read" in finding.message for finding in report.findings) == 20


def test_of_an_error_every_case_is_named_and_another_error_has_its_own_line(tmp_path: Path) -> None:
    site = xrays(tmp_path, 8, white=7)
    Image.fromarray(np.full((30, 24), 9, np.uint8)).save(site / "labels" / "x03.png")
    lines = [line for line in shown(check_site(site, colour=True)) if line.startswith("ERROR")]
    seven, nine = sorted(lines, key=lambda line: "holds 9" in line)
    assert all(f"x{number:02}" in seven for number in (0, 1, 2, 4, 5, 6, 7)) and "x03" not in seven
    assert "x03" in nine and "more" not in nine


def test_two_cases_with_one_note_have_a_line_each(tmp_path: Path) -> None:
    lines = shown(check_site(xrays(tmp_path, 2), colour=True, minimum_cases=1))
    assert sum("255 is read as 1" in line for line in lines) == 2


WIDE = [
    CaseRow(
        f"patient-{n:03}-t2w", section, (240 + n, 240, 155), (0.977 + n, 0.977, 3.3), axes, kind, (0.0, 1.0, n), n * 999
    )
    for n, (section, axes, kind) in enumerate(
        [("training", "RAS", "int16"), ("validation", "LPS", "float32"), ("test", "LAS", "uint16")], 1
    )
]


@pytest.mark.parametrize("width", [80, 200])
def test_no_word_of_a_wide_table_is_broken(width: int) -> None:
    for number, row in enumerate(WIDE):
        row.empty_slices, row.intensity = 0.5 + number / 10, (number, 12345.678)
    lines = shown(SiteReport("site", cases=WIDE), width)
    text = " ".join(lines)
    for word in ("validation", "spacing mm", "foreground", "241x240x155", "1.98x0.977x3.3", "float32", "0 1 3", "2997"):
        assert word in text, word
    heads = [line for line in lines if line.split()[:1] == ["case"]]
    assert len(heads) == (2 if width == 80 else 1)
    assert all(len(line.rstrip()) <= width for line in lines if not line.startswith(("OK", "in all")))
    # each case is whole, in each table
    assert text.count("patient-002-t2w") == len(heads)


def test_what_all_cases_share_is_told_once(tmp_path: Path) -> None:
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 900, (20, 16, 4)).astype(np.int16)
        nifti(tmp_path / "images" / f"c{number}.nii.gz", values, np.diag([2.0, 2.0, 5.0, 1.0]))
        nifti(tmp_path / "labels" / f"c{number}.nii.gz", (values > 600).astype(np.uint8), np.diag([2.0, 2.0, 5.0, 1.0]))
    lines = shown(check_site(tmp_path, minimum_cases=1))
    (line,) = [line for line in lines if line.startswith("in all cases")]
    assert "shape 20x16x4, spacing mm 2x2x5, axes RAS, type int16, labels 0 1" in line
    assert sum("20x16x4" in one for one in lines) == 1
