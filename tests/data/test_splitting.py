"""A written split is as even as today's numbers allow, and is extended: nobody who has a section moves."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.comparison.provenance import split_hash
from pfedsam.data.checks import check_site
from pfedsam.data.listed_split import listed_split
from pfedsam.data.phantom import write_phantom
from pfedsam.data.sections import SECTIONS, deal, place
from pfedsam.data.site_folder import site_names
from pfedsam.data.sites import read_split
from pfedsam.data.splitting import write_datalist
from pfedsam.errors import PFedSAMError
from pfedsam.ownership import MARKER

#: `split_hash` of the seeds 0, 1 and 2 of a phantom of 4 sites, by its number of cases. Keys of records hold them.
HASHES = {
    9: ["10ecde591c62d140", "0a44328b20645ebb", "8dd7694b7b4b2122"],
    12: ["f74fda1b88b17e46", "35a722b43290e45b", "84b50a06d9a65c92"],
}
FEW_NAMES = some.sets(some.text(min_size=1, max_size=8), min_size=3, max_size=40)


def site_of(folder: Path, *names: str) -> Path:
    """A site of empty files, or more of them in one that is there."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / kind / f"{name}.nii.gz").touch()
    return folder


def sections(folder: Path, folds: int = 3) -> list[dict[str, str]]:
    """Case to section, of each fold."""
    splits = [read_split(folder, seed) for seed in range(folds)]
    return [{case.name: section for section, cases in split.items() for case in cases} for split in splits]


def told(*words: object) -> str:
    done = CliRunner().invoke(app, ["split", *map(str, words)], env={"COLUMNS": "400"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("cases", HASHES)
def test_a_phantom_has_the_split_that_its_records_are_of(tmp_path: Path, cases: int) -> None:
    folders = write_phantom(tmp_path, sites=4, cases=cases, shape=(16, 16, 4))
    found = [split_hash({site.name: read_split(site, seed) for site in folders}) for seed in range(3)]
    assert found == HASHES[cases]
    assert [read_split(folders[0], 4)[section] for section in SECTIONS] == [
        read_split(folders[0], 1)[section] for section in SECTIONS
    ]


@settings(max_examples=60, deadline=None)
@given(FEW_NAMES, some.integers(2, 5))
def test_dealt_folds_test_everybody_once_and_are_even(names: set[str], folds: int) -> None:
    if len(names) < max(4, folds):
        return
    dealt = deal(names, folds)
    assert all(fold.keys() == names for fold in dealt)
    assert all(sum(fold[name] == "test" for fold in dealt) == 1 for name in names)
    tested = [sum(section == "test" for section in fold.values()) for fold in dealt]
    assert max(tested) - min(tested) <= 1
    assert all("validation" in fold.values() and "training" in fold.values() for fold in dealt)


@settings(max_examples=60, deadline=None)
@given(FEW_NAMES, some.lists(some.text(min_size=9, max_size=12), unique=True, max_size=30))
def test_new_patients_move_nobody_and_keep_the_folds_even(names: set[str], new: list[str]) -> None:
    folds = deal(names)
    before = [dict(fold) for fold in folds]
    for name in new:
        place(name, folds)
    for fold, old in zip(folds, before, strict=True):
        assert {name: fold[name] for name in names} == old
        others = [section for section in fold.values() if section != "test"]
        # from one patient too many or too few at the start, new ones lead to the share
        off = abs(others.count("validation") - 0.2 * len(others))
        start = [section for section in old.values() if section != "test"]
        assert off <= max(1, abs(start.count("validation") - 0.2 * len(start)))
    assert all(sum(fold[name] == "test" for fold in folds) == 1 for name in (*names, *new))
    tested = [sum(section == "test" for section in fold.values()) for fold in folds]
    assert max(tested) - min(tested) <= 1


def test_one_patient_more_moves_none_of_68(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *(f"p{n:02d}" for n in range(68)))
    first = write_datalist(site)
    assert len(first.added) == 68 and first.changed and len(first.counts) == 3
    before, file = sections(site), (site / "datalist.json").read_bytes()
    again = write_datalist(site)
    assert not again.changed and not again.added and (site / "datalist.json").read_bytes() == file
    site_of(site, "a new one")
    assert sections(site) == before, "without a section until it is given one"
    assert write_datalist(site).added == ("a new one",)
    after = sections(site)
    assert Counter(fold.pop("a new one") == "test" for fold in after) == {True: 1, False: 2}
    assert after == before
    assert (site / "datalist.json.before").read_bytes() == file


def test_a_new_case_of_a_known_patient_goes_where_the_patient_is(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *"abcdef")
    (site / "datalist.json").write_text(json.dumps({"patients": {"b": "P", "again": "P"}}))
    write_datalist(site)
    site_of(site, "again")
    write_datalist(site)
    assert all(fold["again"] == fold["b"] for fold in sections(site))


def test_a_case_that_vanished_is_named_kept_out_and_comes_back_to_its_place(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *"abcdefgh")
    write_datalist(site)
    before = sections(site)
    for kind in ("images", "labels"):
        (site / kind / "d.nii.gz").rename(tmp_path / f"{kind}.nii.gz")
    with pytest.raises(PFedSAMError, match=r"E08.*unknown case 'd'.*pfedsam split"):
        read_split(site)
    said = told(site)
    assert "kept out, their images are not there: d" in said and "fold 2: 5 training, 0 validation, 2 test" in said
    assert all("d" not in fold for fold in sections(site, 2))
    with pytest.raises(PFedSAMError, match=r"E08.*validation are absent.*another seed"):
        read_split(site, 2)
    expected = [finding.message for finding in check_site(site, seed=2).findings if "are absent" in finding.message]
    assert len(expected) == 1
    write_datalist(site_of(site, "new"))
    assert sections(site)[2]["new"] == "validation", "the place of the absent is empty"
    for kind in ("images", "labels"):
        shutil.move(tmp_path / f"{kind}.nii.gz", site / kind / "d.nii.gz")
    assert all("d" not in fold for fold in sections(site)), "until the split is written again"
    assert write_datalist(site).absent == ()
    assert [{name: fold[name] for name in "abcdefgh"} for fold in sections(site)] == before


def test_sections_of_the_users_own_are_kept_and_new_patients_get_their_shares(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *(f"p{n}" for n in range(10)))
    entry = {"image": "images/p9.nii.gz", "patient": "Q"}
    own = {"training": [f"p{n}" for n in range(8)], "validation": ["p8"], "test": [entry], "note": "mine"}
    (site / "datalist.json").write_text(json.dumps(own))
    assert not write_datalist(site).changed
    for n in range(10):
        write_datalist(site_of(site, f"new{n}"))
    listed = json.loads((site / "datalist.json").read_text())
    assert {section: len(listed[section]) for section in SECTIONS} == {"training": 16, "validation": 2, "test": 2}
    assert all(listed[section][: len(own[section])] == own[section] for section in SECTIONS)
    assert listed["note"] == "mine"


def test_sections_without_a_test_stay_without(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *"abcd")
    (site / "datalist.json").write_text(json.dumps({"training": ["a", "b", "c"], "validation": ["d"]}))
    write_datalist(site_of(site, *"efgh"))
    split = read_split(site)
    assert [len(split[section]) for section in SECTIONS] == [6, 2, 0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"folds": 3}, "'folds'"),
        ({"folds": []}, "'folds'"),
        ({"folds": [[]]}, "'folds'"),
        ({"folds": [{"training": ["a"], "validation": ["b"]}], "test": ["c"]}, "expected one of them"),
        (
            {"folds": [{"training": ["a"], "validation": ["b"]}, {"training": ["a"], "validation": ["c"]}]},
            "of fold 1 list other cases than the first.*b, c",
        ),
        ({"folds": [{"training": ["a"], "validation": 7}]}, "'validation' of fold 0"),
        ({"folds": [{"training": ["a"], "validation": ["a"]}]}, "'a' is listed twice"),
        ({"training": ["a"], "validation": ["b"], "absent": "c"}, "'absent'"),
        ({"training": ["a"], "validation": ["b"], "shares": {"training": "all"}}, "'shares'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_left_alone(tmp_path: Path, content: dict, words: str) -> None:
    site = site_of(tmp_path / "s", *"abcde")
    file = site / "datalist.json"
    file.write_text(json.dumps(content))
    before = file.read_bytes()
    with pytest.raises(PFedSAMError, match=rf"E08.*{words}") as found:
        write_datalist(site)
    assert found.value.remedy and "\n" not in str(found.value)
    assert file.read_bytes() == before and not (site / "datalist.json.before").exists()


def test_other_folds_and_too_few_patients_are_refused(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *"ab")
    with pytest.raises(PFedSAMError, match=r"E06.*2 patient\(s\)"):
        write_datalist(site)
    site_of(site, *"cdefgh")
    write_datalist(site, folds=4)
    with pytest.raises(PFedSAMError, match=r"E08.*4 fold\(s\), 3 were asked for"):
        write_datalist(site, folds=3)
    assert not write_datalist(site).changed


def test_who_may_read_the_images_may_read_the_split(tmp_path: Path) -> None:
    site = site_of(tmp_path / "s", *"abc")
    for path in (site / "images").iterdir():
        path.chmod(0o640)
    file = write_datalist(site).path
    assert file.stat().st_mode & 0o777 == 0o640
    file.chmod(0o644)
    write_datalist(site_of(site, "d"))
    assert file.stat().st_mode & 0o777 == 0o644


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    site = site_of(tmp_path / "data" / "s", *"abcdef")
    first = told(site)
    assert "6 patients, 6 case(s) added" in first and "fold 2: 3 training, 1 validation, 2 test" in first
    assert "6 patients, unchanged" in told(tmp_path / "data")


def test_data_that_are_only_read_get_their_split_beside_them(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("x", "y"):
        site_of(data / name, *"abcdef")
    (data / "x" / "datalist.json").write_text(json.dumps({"patients": {"a": "P", "b": "P"}}))
    files = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    told(data, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == files
    assert site_names(out) == ("x", "y") and listed_split(data / "x") is None
    assert all(fold["a"] == fold["b"] for fold in sections(out / "x"))
    before = sections(out / "y")
    moved = shutil.move(data, tmp_path / "elsewhere")
    site_of(moved / "y", "g")
    assert "7 patients, 1 case(s) added" in told(moved, "--out", out)
    assert [{name: fold[name] for name in "abcdef"} for fold in sections(out / "y")] == before


def test_links_go_into_no_folder_of_somebody_else(tmp_path: Path) -> None:
    site_of(tmp_path / "data" / "x", *"abc")
    site_of(tmp_path / "own" / "x", *"abc")
    for words in ((), ("--force",)):  # links take the place of no folder, forced or not
        with pytest.raises(PFedSAMError, match="E24"):
            told(tmp_path / "data", "--out", tmp_path / "own", *words)
        assert not (tmp_path / "own" / MARKER).exists()
    assert not (tmp_path / "own" / "x" / "datalist.json").exists()
    with pytest.raises(PFedSAMError, match="E02"):
        told(tmp_path)


def test_links_go_not_into_the_data_nor_around_them(tmp_path: Path) -> None:
    data = site_of(tmp_path / "data" / "x", *"abc").parent
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "linked").symlink_to(data)
    for out in (data, data / "x", data / "new", tmp_path, tmp_path / "linked" / "new"):
        for words in ((), ("--force",)):
            with pytest.raises(PFedSAMError, match="E24") as found:
                told(data, "--out", out, *words)
            assert "--force" not in str(found.value)
    (tmp_path / "linked").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_links_into_a_folder_of_somebody_else_by_force_leave_it_theirs(tmp_path: Path) -> None:
    site_of(tmp_path / "data" / "x", *"abc")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(PFedSAMError, match=r"E24.*--force"):
        told(tmp_path / "data", "--out", tmp_path / "own")
    told(tmp_path / "data", "--out", tmp_path / "own", "--force")
    assert (tmp_path / "own" / "x" / "images").is_symlink() and not (tmp_path / "own" / MARKER).exists()


def test_links_go_through_no_link_to_another_folder(tmp_path: Path) -> None:
    site_of(tmp_path / "data" / "x", *"abc")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x").symlink_to(tmp_path / "data" / "x")
    with pytest.raises(PFedSAMError, match=r"E24.*is a link"):
        told(tmp_path / "data", "--out", tmp_path / "own", "--force")
    assert not (tmp_path / "own" / MARKER).exists()


def test_a_phantom_that_is_replaced_keeps_a_split_of_the_users_own_under_another_name(tmp_path: Path) -> None:
    def write(cases: int) -> list[Path]:
        return write_phantom(tmp_path, sites=2, cases=cases, shape=(16, 16, 4), force=True)

    one, two = (site / "datalist.json" for site in write(4))
    one.unlink()
    write(4)
    assert one.is_file(), "also for one that was written before there was a split"
    own = {"training": ["s2-case-01"], "validation": ["s2-case-02"]}
    two.write_text(json.dumps(own))
    write(4)
    assert json.loads(two.read_text()) == own, "with equal settings it is left alone"
    before = [two.with_name(f"datalist.json.before{end}") for end in ("", ".2")]
    write(3)
    assert json.loads(before[0].read_text()) == own and not one.with_name("datalist.json.before").exists()
    assert all(len(sections(path.parent)[0]) == 3 and check_site(path.parent).ok for path in (one, two))
    two.write_text("{}")
    write(2)
    assert not one.exists() and not two.exists()
    assert json.loads(before[0].read_text()) == own and before[1].read_text() == "{}"
