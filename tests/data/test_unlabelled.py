"""Cases without a label, and labels that leave voxels open: read, checked, split and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.data.checks import check_site
from pfedsam.data.labels import OPEN, UNKNOWN, class_numbers, with_unknown
from pfedsam.data.loading import ReadImaged
from pfedsam.data.sites import datalist, read_split, unlabelled, write_split
from pfedsam.data.slices import EpochSampler, SliceDataset
from pfedsam.data.splitting import write_datalist
from pfedsam.data.transforms import ClassChannelsd
from pfedsam.errors import PFedSAMError

OPEN_VALUE = 9


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def make_site(folder: Path, cases: int = 6, without: tuple[int, ...] = ()) -> Path:
    random = np.random.default_rng(0)
    for case in range(cases):
        label = np.zeros((8, 8, 4), dtype=np.uint8)
        label[2:5, 2:5, 1:3] = 1
        save(folder / "images" / f"case-{case}.nii.gz", random.integers(0, 900, (8, 8, 4)).astype(np.int16))
        if case not in without:
            save(folder / "labels" / f"case-{case}.nii.gz", label)
    return folder


def scribble(site: Path, case: int) -> None:
    """Most of a label becomes open."""
    path = site / "labels" / f"case-{case}.nii.gz"
    label = np.full((8, 8, 4), OPEN_VALUE, dtype=np.uint8)
    label[0, :, :] = 0
    label[2:5, 3, 1:3] = 1
    save(path, label)


def write(site: Path, **content: object) -> None:
    (site / "datalist.json").write_text(json.dumps(content))


def names(items: list[dict[str, str]]) -> list[str]:
    return [item["case"] for item in items]


# the split ------------------------------------------------------------------------------------------------------------


def test_a_case_without_a_label_is_in_no_section_and_moves_no_other(tmp_path: Path) -> None:
    with_all, without = make_site(tmp_path / "a", 12), make_site(tmp_path / "b", 12, without=(0, 3, 7))
    whole, split = read_split(with_all), read_split(without)
    gone = {"case-0", "case-3", "case-7"}
    assert {section: [case.name for case in cases] for section, cases in split.items()} == {
        section: [case.name for case in cases if case.name not in gone] for section, cases in whole.items()
    }
    found = datalist(without, "unlabelled")
    assert set(names(found)) == gone and all("label" not in item for item in found)
    assert datalist(with_all, "unlabelled") == []
    assert write_split(without, tmp_path / "split.json")["unlabelled"] == sorted(gone)
    assert "unlabelled" not in write_split(with_all, tmp_path / "split.json")


def test_an_unlabelled_image_of_a_patient_in_validation_or_test_is_never_trained_on(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", without=(3, 4, 5))
    patients = {f"case-{case}": f"p{case % 3}" for case in range(6)}
    write(site, training=["case-0"], validation=["case-1"], test=["case-2"], patients=patients)
    assert [case.name for case in unlabelled(site)] == ["case-3"]
    report = check_site(site, minimum_cases=1)
    assert [row.section for row in report.cases] == ["training", "validation", "test", "unlabelled", "", ""]


def test_an_unlabelled_case_may_be_listed_for_training_and_for_nothing_else(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", without=(0,))
    listed = {"training": ["case-0", "case-1"], "validation": ["case-2"], "test": ["case-3"]}
    write(site, **listed)
    assert names(datalist(site, "training")) == ["case-1"] and names(datalist(site, "unlabelled")) == ["case-0"]
    write(site, **{**listed, "training": ["case-1"], "test": ["case-0"]})
    with pytest.raises(PFedSAMError, match=r"E03.*case-0"):
        datalist(site, "training")
    assert any(finding.code == "E03" and "case-0" in finding.message for finding in check_site(site).errors)


def test_a_written_split_takes_in_a_case_when_it_gets_a_label(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", 9, without=(8,))
    first = write_datalist(site)
    assert first.unlabelled == 1 and "1 case(s) without a label" in "\n".join(first.lines())
    assert not write_datalist(site).changed
    save(site / "labels" / "case-8.nii.gz", np.ones((8, 8, 4), dtype=np.uint8))
    second = write_datalist(site)
    assert second.added == ("case-8",) and second.unlabelled == 0
    (site / "labels" / "case-8.nii.gz").unlink()
    assert write_datalist(site).absent == ()


# the check ------------------------------------------------------------------------------------------------------------


def test_validate_tells_of_unlabelled_and_weak_cases_and_lets_the_site_train(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", 9, without=(7, 8))
    write_datalist(site)
    write(site, **json.loads((site / "datalist.json").read_text()), unknown=OPEN_VALUE)
    scribble(site, 1)
    done = CliRunner().invoke(app, ["validate", str(site)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "2 of 9 cases have no label (case-7, case-8)" in done.output and "unlabelled" in done.output
    row = {row.name: row for row in check_site(site).cases}["case-1"]
    assert row.unknown == pytest.approx(1 - (3 * 2 + 8 * 4) / 256) and row.foreground == 6
    assert f"{row.unknown:.0%}" in done.output


def test_an_open_value_that_nobody_named_is_no_class(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    scribble(site, 0)
    assert [finding.code for finding in check_site(site).errors if finding.case] == ["E07"]
    write(site, unknown=OPEN_VALUE)
    assert not [finding for finding in check_site(site).errors if finding.case]


@pytest.mark.parametrize("value", [0, -1, 70000, "9", True, 1.5])
def test_a_wrong_open_value_is_named(tmp_path: Path, value: object) -> None:
    site = make_site(tmp_path / "site")
    write(site, unknown=value)
    with pytest.raises(PFedSAMError, match=r"E08.*unknown"):
        datalist(site, "training")


def test_an_open_value_that_is_a_class_is_named(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    write(site, unknown=1)
    assert any(finding.code == "E08" and "unknown" in finding.message for finding in check_site(site).errors)
    with pytest.raises(PFedSAMError, match=r"E08.*lesion"):
        with_unknown(None, ["lesion"], 1)


# what training gets ---------------------------------------------------------------------------------------------------


def test_a_label_map_may_name_the_open_value() -> None:
    assert class_numbers(["disc"], {"4": "disc", "9": "unknown"}) == {0: 0, 4: 1, 9: UNKNOWN}
    assert class_numbers(["unknown"], {"4": "unknown"}) == {0: 0, 4: 1}  # a class of that name is a class
    assert with_unknown(None, ["disc", "cup"], 9) == {"1": "disc", "2": "cup", "9": "unknown"}
    assert with_unknown({"4": "disc"}, ["disc"], None) == {"4": "disc"}


def test_open_voxels_are_open_in_every_class() -> None:
    label = torch.tensor([[[0, 1, 2, OPEN_VALUE]]])
    channels = ClassChannelsd("label", [[1, 2], [2]], ["disc", "cup"], {"1": "disc", "2": "cup", "9": "unknown"})
    assert channels({"label": label})["label"].tolist() == [[[0, 1, 1, OPEN]], [[0, 0, 1, OPEN]]]


@pytest.mark.parametrize("suffix", [".nii.gz", ".png"])
def test_an_image_without_a_label_is_read_with_one_that_is_open_everywhere(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    if suffix == ".png":
        from PIL import Image

        Image.fromarray(np.zeros((6, 8, 3), dtype=np.uint8)).save(path)
    else:
        save(path, np.zeros((8, 6, 4), dtype=np.int16))
    read = ReadImaged(["image", "label"], "label", colour=suffix == ".png")({"image": path})
    channels = ClassChannelsd("label", [[1]], ["lesion"])(read)["label"]
    assert channels.shape[1:] == read["image"].shape[1:] == (8, 6, *((4,) if suffix == ".nii.gz" else ()))
    assert bool((channels == OPEN).all())


def volumes(site: Path, *sections: str) -> SliceDataset:
    items = [item for section in sections for item in datalist(site, section)]
    read, classes = ReadImaged(["image", "label"], "label"), ClassChannelsd("label", [[1]], ["lesion"])
    return SliceDataset(items, lambda item: classes(read(item)))


def test_an_epoch_is_the_same_with_and_without_unlabelled_cases_until_a_share_is_asked_for(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", 8, without=(6, 7))
    write(site, training=["case-0", "case-1"], validation=["case-2"], test=["case-3", "case-4", "case-5"])
    alone, beside = (EpochSampler(volumes(site, *parts)) for parts in (("training",), ("training", "unlabelled")))
    for draw in range(3):
        alone.set_draw(draw)
        beside.set_draw(draw)
        assert list(alone) == list(beside) and len(alone) == len(beside) == 6
    beside.unlabelled_share = 1.0
    drawn = list(beside)
    assert len(drawn) == len(beside) == 12 and len(set(drawn)) == 12
    open_everywhere = [bool((beside.dataset[one]["label"] == OPEN).all()) for one in drawn]
    assert sum(open_everywhere) == 6
    beside.unlabelled_share = 100.0
    assert len(list(beside)) == 6 + 2 * 4  # no more than there are


def test_the_slices_of_a_scribble_are_sorted_by_what_is_known_of_them(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    write(site, training=["case-0"], validation=["case-2"], test=["case-3"])
    scribble(site, 0)
    read = ReadImaged(["image", "label"], "label")
    classes = ClassChannelsd("label", [[1]], ["lesion"], {"1": "lesion", str(OPEN_VALUE): "unknown"})
    dataset = SliceDataset(datalist(site, "training"), lambda item: classes(read(item)))
    assert (dataset.positive, dataset.negative, dataset.unlabelled) == ([[1, 2]], [[0, 3]], [[]])
    assert sorted(dataset[1]["label"].unique().tolist()) == [0, 1, OPEN]
    assert dataset[0]["label"].unique().tolist() == [0, OPEN]
