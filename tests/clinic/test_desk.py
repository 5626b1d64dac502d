"""What clinicians' tools may ask of a site's model, without any server."""

from __future__ import annotations

import stat
from pathlib import Path

import nibabel
import numpy as np
import pytest
from conftest import tiny_model

from pfedsam.api import Model, load_model
from pfedsam.clinic.desk import Desk, corners_in
from pfedsam.errors import PFedSAMError


def values(path: Path | str) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def sent(desk: Desk, label: np.ndarray, affine: np.ndarray, name: str = "tmp1.nii.gz") -> str:
    """A label as Slicer sends it."""
    path = desk.scratch / name
    nibabel.save(nibabel.Nifti1Image(label.astype(np.int16), affine), path)
    return str(path)


def drawn(desk: Desk, case: str, number: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A label in the grid of a case, with a block of a number."""
    image = nibabel.load(next(one["path"] for one in desk.cases() if one["id"] == case))
    label = np.zeros(image.shape, np.int16)
    label[5:9, 6:11, 2:4] = number
    return label, image.affine


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_label_is_that_of_infer_and_names_its_model(desk: Desk, model: Model) -> None:
    case = desk.cases()[1]
    found = Path(desk.segment(case["id"])["file"])
    expected = model.segment(case["path"])
    assert (values(found) == expected.label).all() and expected.label.any()
    assert (nibabel.load(found).affine == nibabel.load(case["path"]).affine).all()
    told = bytes(nibabel.load(found).header["descrip"]).decode().rstrip("\0")
    assert told.startswith("Research only. pFedSAM brain_lesion_mri round3 ") and len(told) < 80
    assert found.is_relative_to(desk.scratch)


def test_what_is_shown_says_research_only_which_model_and_its_dice(desk: Desk) -> None:
    about = desk.about()
    for text in (about["name"], about["description"]):
        assert "esearch only" in text and "round 3 (final)" in text and "validation Dice 0.744" in text
    assert about["model"] == "brain_lesion_mri-round3-research-only"
    assert str(desk.model.file.parent) not in str(about), "no path of this machine"


def test_a_model_without_a_dice_says_so(site: Path, tmp_path: Path) -> None:
    from pfedsam.storage.site_model import read, write

    file = tiny_model(tmp_path / "m.safetensors")
    made = read(file)
    del made.info["val_dice_personal"]
    write(file, made)
    desk = Desk(site, load_model(file, engine="torch"), tmp_path)
    assert "validation Dice not known" in desk.about()["description"]
    assert not desk.about()["takes_boxes"]
    assert "E32" in desk.answer({"do": "segment", "image": desk.cases()[0]["id"], "box": [1, 9, 1, 9, 1, 3]})["error"]


def test_a_box_is_that_of_infer_from_corners_in_any_order(desk: Desk, model: Model) -> None:
    case = desk.cases()[1]
    found = values(desk.segment(case["id"], [30, 4, 8, 28, 4, 1])["file"])
    expected = model.segment(case["path"], [4, 30, 8, 28, 1, 4]).label
    assert (found == expected).all()
    assert (found != model.segment(case["path"]).label).any(), "the box must matter"


@pytest.mark.parametrize(
    ("box", "expected"),
    [([-4, 3, 2.6, 1, 0, 99], [0, 3, 1, 3, 0, 5]), ([9, 9, 0, 0, 5, 5], [9, 9, 0, 0, 5, 5])],
)
def test_what_of_a_box_lies_outside_is_cut_off(box: list[float], expected: list[int]) -> None:
    assert corners_in(box, (40, 44, 6)) == expected


@pytest.mark.parametrize(
    "box", [[1, 2, 3, 4], [-9, -2, 0, 4, 0, 1], [1, 2, 3, 4, 6, 8], [1, 2, 3, "4", 0, 1], [1, 2, 3, float("nan"), 0, 1]]
)
def test_what_is_no_box_in_the_image_is_refused(box: list[object]) -> None:
    with pytest.raises(PFedSAMError, match="E16"):
        corners_in(box, (40, 44, 6))


def test_a_label_is_kept_and_never_over_another(desk: Desk, site: Path) -> None:
    before = snapshot(site)
    without = next(case["id"] for case in desk.cases() if not case["labelled"])
    kept = [desk.save(without, sent(desk, *drawn(desk, without)))["saved"] for _ in range(3)]
    assert kept == [f"labels/{without}.nii.gz", f"corrections/{without}.nii.gz", f"corrections/{without}-2.nii.gz"]
    after = snapshot(site)
    assert {name: after[name] for name in before} == before and set(after) - set(before) == set(kept)
    for name in kept:
        assert (values(site / name) == drawn(desk, without)[0]).all()
        assert stat.S_IMODE((site / name).stat().st_mode) == 0o600
    assert all(case["labelled"] for case in desk.cases() if case["id"] == without)


def test_segments_are_known_by_name_not_by_number(desk: Desk, site: Path) -> None:
    case = desk.cases()[0]["id"]
    label, affine = drawn(desk, case, number=2)
    kept = desk.save(case, sent(desk, label, affine), ["note", "lesion"])["saved"]
    assert (values(site / kept) == (label > 0)).all()


@pytest.mark.parametrize(("number", "names"), [(1, ["note", "lesion"]), (2, None), (3, ["lesion"]), (1, [None])])
def test_a_segment_that_is_no_class_is_refused(desk: Desk, site: Path, number: int, names: list[str] | None) -> None:
    case, before = desk.cases()[0]["id"], snapshot(site)
    file = sent(desk, *drawn(desk, case, number))
    error = desk.answer({"do": "save", "image": case, "file": file, "segments": names})["error"]
    assert "E07" in error and "lesion" in error and snapshot(site) == before


def test_a_label_of_another_grid_is_refused(desk: Desk, site: Path) -> None:
    case, before = desk.cases()[0]["id"], snapshot(site)
    label, affine = drawn(desk, case)
    moved = affine.copy()
    moved[0, 3] += 20
    for file in (sent(desk, label[:-1], affine), sent(desk, label, moved, "tmp2.nii.gz")):
        assert "E04" in desk.answer({"do": "save", "image": case, "file": file})["error"]
    assert snapshot(site) == before


def test_a_label_in_another_order_of_axes_is_turned(desk: Desk, site: Path) -> None:
    case = desk.cases()[0]["id"]
    label, affine = drawn(desk, case)
    flipped = affine @ np.array([[-1, 0, 0, label.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    kept = desk.save(case, sent(desk, label[::-1], flipped))["saved"]
    assert (values(site / kept) == label).all()


def test_a_volume_that_was_sent_is_segmented_and_becomes_no_case(desk: Desk, site: Path, model: Model) -> None:
    case, before = desk.cases()[1], snapshot(site)
    copy = desk.scratch / "upload.nii.gz"
    copy.write_bytes(Path(case["path"]).read_bytes())
    for _ in range(2):  # Slicer may send it again
        desk.add("from the PACS", str(copy))
    found = desk.segment("from the PACS")["file"]
    assert (values(found) == model.segment(case["path"]).label).all()
    assert "E02" in desk.answer({"do": "save", "image": "from the PACS", "file": found})["error"]
    assert "E09" in desk.answer({"do": "add", "image": case["id"], "file": str(copy)})["error"]
    assert snapshot(site) == before and len(desk.cases()) == 3


@pytest.mark.parametrize(
    "question",
    [
        {"do": "segment", "image": "../secret"},
        {"do": "segment", "image": "/etc/passwd"},
        {"do": "segment", "image": {"a": 1}.__str__()},
        {"do": "segment", "image": None},
        {"do": "save", "image": "CASE", "file": "/etc/passwd"},
        {"do": "save", "image": "CASE", "file": "IMAGE"},
        {"do": "add", "image": "x", "file": "IMAGE"},
        {"do": "answer", "question": {}},
        {"do": "_path", "image": "CASE"},
        {"do": ["about"]},
        {"do": "segment", "image": "CASE", "which": "global"},
        {},
    ],
    ids=str,
)
def test_nothing_but_cases_and_what_was_sent_is_read(desk: Desk, site: Path, question: dict[str, object]) -> None:
    case, before = desk.cases()[0], snapshot(site)
    places = {"CASE": case["id"], "IMAGE": case["path"]}
    asked = {key: places.get(value, value) if isinstance(value, str) else value for key, value in question.items()}
    assert set(desk.answer(asked)) == {"error"} and snapshot(site) == before


def test_a_site_without_volumes_and_a_model_of_pictures_are_refused(site: Path, model: Model, tmp_path: Path) -> None:
    eyes = load_model(tiny_model(tmp_path / "eyes.safetensors", "fundus_disc_cup"), engine="torch")
    with pytest.raises(PFedSAMError, match=r"E32.*pfedsam view"):
        Desk(site, eyes, tmp_path)
    for path in (site / "images").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", ".png")))
    with pytest.raises(PFedSAMError, match="E02"):
        Desk(site, model, tmp_path)
