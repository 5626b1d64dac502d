"""A check that remembers: only what has changed is read again, and the report is the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import pfedsam.data.case_checks as case_checks
from pfedsam.data.checks import check_site
from pfedsam.data.phantom import write_phantom
from pfedsam.data.reader import load_picture


@pytest.fixture
def site(tmp_path: Path) -> Path:
    write_phantom(tmp_path / "data", sites=1, cases=5, shape=(16, 16, 4))
    return tmp_path / "data" / "site-1"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the image files that were read."""
    names: list[str] = []

    def noted(path: Path, label: bool = False):
        if not label:
            names.append(path.name)
        return load_picture(path, label)

    monkeypatch.setattr(case_checks, "load_picture", noted)
    return names


def spoil(image: Path) -> None:
    """A volume of one value: it cannot be trained on."""
    import nibabel

    before = nibabel.load(image)
    nibabel.save(nibabel.Nifti1Image(np.zeros(before.shape, dtype=np.uint8), before.affine), image)


def test_a_second_check_reads_nothing_and_says_the_same(site: Path, tmp_path: Path, read: list[str]) -> None:
    known = tmp_path / "checks.json"
    first = check_site(site, known=known)
    assert len(read) == 5 and first.to_dict() == check_site(site).to_dict()
    read.clear()
    assert check_site(site, known=known).to_dict() == first.to_dict() and read == []


def test_what_has_changed_is_read_again_and_what_is_wrong_until_it_is_mended(site, tmp_path, read) -> None:
    known = tmp_path / "checks.json"
    check_site(site, known=known)
    image = sorted((site / "images").iterdir())[2]
    good = image.read_bytes()
    spoil(image)
    for _ in range(2):
        read.clear()
        report = check_site(site, known=known)
        assert read == [image.name] and [finding.case for finding in report.errors] == [image.name.split(".")[0]]
    image.write_bytes(good)
    read.clear()
    assert check_site(site, known=known).ok and read == [image.name]
    # other labels, another question
    read.clear()
    check_site(site, (0, 1, 2), known=known)
    assert len(read) == 5


def test_duplicates_are_found_among_cases_that_are_not_read(site, tmp_path, read) -> None:
    known = tmp_path / "checks.json"
    check_site(site, known=known)
    first, *others = sorted((site / "images").iterdir())
    for other in others:
        other.write_bytes(first.read_bytes())
    report = check_site(site, known=known)
    assert first.name not in read[5:] and any("leakage" in finding.message for finding in report.errors)


def test_a_case_that_is_gone_is_forgotten(site, tmp_path) -> None:
    known = tmp_path / "checks.json"
    check_site(site, known=known)
    (image, *_), (label, *_) = (sorted((site / kind).iterdir()) for kind in ("images", "labels"))
    assert image.name.split(".")[0] in known.read_text()
    image.unlink()
    label.unlink()
    check_site(site, known=known)
    assert image.name.split(".")[0] not in known.read_text() and known.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "[]", "{", '{"CASE": {"key": "KEY"}}', '{"CASE": 3}'])
def test_a_file_that_somebody_has_spoilt_costs_a_new_check_only(site, tmp_path, read, content: str) -> None:
    known = tmp_path / "checks.json"
    first = check_site(site, known=known)
    name, record = next(iter(json.loads(known.read_text()).items()))
    known.write_text(content.replace("CASE", name).replace("KEY", record["key"]))
    read.clear()
    assert check_site(site, known=known).to_dict() == first.to_dict() and len(read) == 5
    assert json.loads(known.read_text())[name] == record


def test_cases_are_handed_on_as_they_were_read_with_their_section(site, tmp_path) -> None:
    visited: dict[str, str] = {}
    spoil(sorted((site / "images").iterdir())[0])
    report = check_site(site, visit=lambda case, section, image, label: visited.update({case.name: section}))
    assert visited == {row.name: row.section for row in report.cases[1:]}


def test_a_file_that_cannot_be_written_costs_the_next_check_only(site, tmp_path, caplog) -> None:
    (tmp_path / "a file").write_text("")
    report = check_site(site, known=tmp_path / "a file" / "checks.json")
    assert report.ok and "cannot be kept" in caplog.text
