from __future__ import annotations

import io
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pfedsam.data.check_report import print_report
from pfedsam.data.checks import check_site
from pfedsam.data.site_report import SiteReport, require_valid
from pfedsam.data.sites import read_split
from pfedsam.data.splitting import write_datalist
from pfedsam.errors import PFedSAMError

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def values_of(path: Path) -> np.ndarray:
    nifti = nibabel.load(path)
    assert isinstance(nifti, nibabel.Nifti1Image)
    return np.asarray(nifti.dataobj)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A good site: four volumes of shape (8, 8, 4), half of whose slices are empty."""
    rng = np.random.default_rng(0)
    for case in range(4):
        label = np.zeros((8, 8, 4), dtype=np.uint8)
        label[2:4, 2:5, 1:3] = 1
        save(tmp_path / "images" / f"case-{case}.nii.gz", rng.integers(0, 900, (8, 8, 4)).astype(np.int16))
        save(tmp_path / "labels" / f"case-{case}.nii.gz", label)
    write_datalist(tmp_path)
    return tmp_path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A good site: three RGB photographs of 8 x 6 pixels with masks of 0 and 255."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for case in range(3):
        Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(tmp_path / f"images/eye-{case}.png")
        mask = np.zeros((6, 8), dtype=np.uint8)
        mask[1:3, 1:3] = 255
        Image.fromarray(mask).save(tmp_path / f"labels/eye-{case}.png")
    write_datalist(tmp_path)
    return tmp_path


def expect(report: SiteReport, code: str, severity: str, *words: str) -> None:
    """The report has a finding of this kind, of one line, that holds these words."""
    found = [finding for finding in report.findings if (finding.code, finding.severity) == (code, severity)]
    lines = [f"{finding.message} {finding.remedy}" for finding in found]
    assert any(all(word in line for word in words) for line in lines), report.findings
    assert not any("\n" in line for line in lines)
    if severity == "error":
        assert all(finding.remedy for finding in found) and not report.ok


def test_a_good_site_has_no_findings_and_its_rows_say_what_it_holds(site):
    report = check_site(site)
    assert report.ok and not report.findings
    require_valid(report)
    row = report.cases[0]
    assert (row.name, row.shape, row.spacing, row.orientation) == ("case-0", (8, 8, 4), (2, 2, 5), "RAS")
    assert (row.dtype, row.label_values, row.foreground, row.empty_slices) == ("int16", (0, 1), 12, 0.5)
    assert {row.section for row in report.cases} == {"training", "validation", "test"}
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_a_missing_folder_and_a_folder_without_images_are_one_error_each(tmp_path):
    expect(check_site(tmp_path / "nowhere"), "E02", "error", "nowhere", "<site>/images")
    (tmp_path / "images").mkdir()
    expect(check_site(tmp_path), "E02", "error", "no image")


def test_images_without_label_and_labels_without_image_are_found(site):
    (site / "labels" / "case-1.nii.gz").rename(site / "labels" / "case-7.nii.gz")
    (site / "images" / "notes.txt").touch()
    report = check_site(site)
    expect(report, "E03", "error", "case-1", "case-1.nii.gz")
    expect(report, "E09", "warning", "case-7.nii.gz", "no image")
    expect(report, "E09", "warning", "notes.txt")


def test_a_missing_labels_folder_names_the_layout(site):
    (site / "labels").rename(site / "masks")
    expect(check_site(site), "E03", "error", "labels", "<site>/labels")


def test_a_label_of_another_shape_is_found(site):
    save(site / "labels" / "case-2.nii.gz", np.ones((8, 8, 3), dtype=np.uint8))
    expect(check_site(site), "E04", "error", "case-2", "[8, 8, 4]", "[8, 8, 3]")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_corrupt_file_is_found_and_the_others_are_still_checked(site, kind):
    path = site / kind / "case-1.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    report = check_site(site)
    expect(report, "E05", "error", str(path))
    assert len(report.cases) == 4 and len(report.errors) == 1


@pytest.mark.parametrize(("value", "expected"), [(2, "[0, 1]"), (0.5, "whole numbers")])
def test_a_label_value_out_of_range_is_found(site, value, expected):
    label = np.zeros((8, 8, 4), dtype=np.float32)
    label[0, 0, 0] = value
    save(site / "labels" / "case-3.nii.gz", label)
    expect(check_site(site), "E07", "error", "case-3", f"{value:g}", expected)
    if value == 2:
        assert check_site(site, labels=(0, 1, 2)).ok


def test_photographs_masks_of_0_and_255_are_mapped_and_noted(photographs):
    report = check_site(photographs)
    assert report.ok
    expect(report, "E07", "note", "eye-0.png", "255")
    expect(report, "E09", "note", "pixels")
    row = report.cases[0]
    assert (row.shape, row.label_values, row.foreground, row.empty_slices) == ((8, 6), (0, 1), 4, None)


def test_a_coloured_mask_and_grey_values_are_out_of_range(photographs):
    colours = np.zeros((6, 8, 3), dtype=np.uint8)
    colours[0, 0] = (255, 0, 0)
    Image.fromarray(colours).save(photographs / "labels/eye-0.png")
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(photographs / "labels/eye-1.png")
    report = check_site(photographs)
    expect(report, "E07", "error", "eye-0.png", "channels")
    expect(report, "E07", "error", "eye-1.png", "and 41 more")


@pytest.mark.parametrize(
    ("affine", "severity", "word"),
    [
        (np.diag([-2.0, 2, 5, 1]), "error", "orientation"),
        (np.diag([2.0, 2, 4, 1]), "error", "spacing"),
        (AFFINE + np.array([[0, 0, 0, 9.0]] + [[0] * 4] * 3), "warning", "affine"),
    ],
)
def test_a_label_that_lies_elsewhere_is_found(site, affine, severity, word):
    save(site / "labels" / "case-1.nii.gz", np.ones((8, 8, 4), dtype=np.uint8), affine)
    expect(check_site(site), "E09", severity, "case-1", word)


def test_mixed_orientation_is_a_warning(site):
    rng = np.random.default_rng(9)
    for kind, values in (("images", rng.integers(0, 9, (8, 8, 4))), ("labels", np.ones((8, 8, 4)))):
        save(site / kind / "case-0.nii.gz", values.astype(np.int16), np.diag([-2.0, -2, 5, 1]))
    report = check_site(site)
    assert report.ok
    expect(report, "E09", "warning", "RAS in 3", "LPS in 1")


def test_a_spacing_of_one_millimetre_everywhere_is_noted(site):
    for path in [*site.glob("images/*"), *site.glob("labels/*")]:
        save(path, values_of(path), np.eye(4))
    report = check_site(site)
    assert report.ok
    expect(report, "E09", "note", "1 mm", "voxels")


def test_an_empty_mask_is_a_warning(site):
    save(site / "labels" / "case-1.nii.gz", np.zeros((8, 8, 4), dtype=np.uint8))
    report = check_site(site)
    assert report.ok and report.cases[1].empty_slices == 1
    expect(report, "E09", "warning", "case-1", "empty")


def test_constant_and_not_finite_images_are_errors(site):
    values = np.random.default_rng(1).random((8, 8, 4)).astype(np.float32)
    values[0, 0, :2] = np.nan, np.inf
    save(site / "images" / "case-0.nii.gz", values)
    save(site / "images" / "case-1.nii.gz", np.full((8, 8, 4), 7, dtype=np.int16))
    report = check_site(site)
    expect(report, "E09", "error", "case-0", "2 value(s)")
    expect(report, "E09", "error", "case-1", "constant")


def test_the_same_image_in_two_sections_is_leakage_and_in_one_a_warning(site):
    values = values_of(site / "images" / "case-0.nii.gz")
    save(site / "images" / "case-1.nii", values)
    (site / "images" / "case-1.nii.gz").unlink()
    sections = {"training": ["case-0", "case-1"], "validation": ["case-2"], "test": ["case-3"]}
    (site / "datalist.json").write_text(json.dumps(sections))
    report = check_site(site)
    assert report.ok
    expect(report, "E09", "warning", "case-0", "case-1", "same image")
    sections = {"training": ["case-0", "case-3"], "validation": ["case-2"], "test": ["case-1"]}
    (site / "datalist.json").write_text(json.dumps(sections))
    expect(check_site(site), "E08", "error", "leakage", "case-0", "case-1", "test", "training")


def test_every_fault_of_a_datalist_is_found(site):
    content = {
        "training": ["case-0", "case-9"],
        "validation": ["case-1", "case-8"],
        "patients": {"case-0": "P", "case-1": "P"},
    }
    (site / "datalist.json").write_text(json.dumps(content))
    report = check_site(site)
    for words in (["case-9"], ["case-8"], ["patient 'P'", "training", "validation"]):
        expect(report, "E08", "error", "datalist.json", *words)
    expect(report, "E08", "warning", "leaves out 2", "case-2")


def test_cases_that_a_written_split_does_not_list_are_named_with_what_adds_them(site):
    values = np.random.default_rng(9).integers(0, 900, (8, 8, 4))
    save(site / "images" / "new.nii.gz", values.astype(np.int16))
    save(site / "labels" / "new.nii.gz", (values > 800).astype(np.uint8))
    report = check_site(site)
    assert report.ok and [row.section for row in report.cases if row.name == "new"] == [""]
    expect(report, "E08", "warning", "leaves out 1 case(s): new", f"pfedsam split {site}")
    write_datalist(site)
    assert not check_site(site).findings


@pytest.mark.parametrize("seed", range(4))
def test_the_sections_of_the_rows_are_those_of_the_fold_of_the_seed(site, seed):
    split = read_split(site, seed)
    expected = {case.name: section for section, cases in split.items() for case in cases}
    assert {row.name: row.section for row in check_site(site, seed=seed).cases} == expected


def test_too_few_cases_are_found(site):
    expect(check_site(site, minimum_cases=5), "E06", "error", str(site), "4 case(s)", "5")
    (site / "datalist.json").unlink()
    for case in (0, 1):
        for kind in ("images", "labels"):
            (site / kind / f"case-{case}.nii.gz").unlink()
    report = check_site(site)
    expect(report, "E06", "error", "2 patient(s)", f"pfedsam split {site}")
    assert len(report.errors) == 1


def test_all_findings_are_collected_and_the_first_error_is_raised_with_a_count(site):
    (site / "labels" / "case-0.nii.gz").rename(site / "labels" / "other.nii.gz")
    (site / "images" / "case-1.nii.gz").write_bytes(b"nothing")
    save(site / "labels" / "case-2.nii.gz", np.full((8, 8, 4), 3, dtype=np.uint8))
    report = check_site(site)
    assert [finding.code for finding in report.errors] == ["E05", "E07", "E03"]
    with pytest.raises(PFedSAMError, match=r"E05: .*case-1.* \(and 2 more\) ") as info:
        require_valid(report)
    assert "\n" not in str(info.value)


@pytest.mark.filterwarnings("ignore:slice.*InstanceNumber")
def test_a_series_of_dicom_slices_is_read_as_a_volume(site):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    (site / "images" / "case-1.nii.gz").unlink()
    folder = site / "images" / "case-1"
    folder.mkdir()
    for number in range(4):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        ds.Rows, ds.Columns, ds.InstanceNumber = 8, 8, number + 1
        ds.PixelSpacing, ds.ImagePositionPatient = [2, 2], [0, 0, 5 * number]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 0
        ds.PixelData = (np.arange(64, dtype=np.uint16) + number).tobytes()
        ds.save_as(folder / f"slice-{number}.dcm", enforce_file_format=True)
    label = np.ones((8, 8, 4), dtype=np.uint8)
    save(site / "labels" / "case-1.nii.gz", label, np.diag([-2.0, -2, 5, 1]))
    report = check_site(site)
    assert report.ok, report.findings
    row = report.cases[1]
    assert (row.shape, row.spacing, row.orientation) == ((8, 8, 4), (2, 2, 5), "LPS")
    (folder / "slice-2.dcm").write_bytes((folder / "slice-2.dcm").read_bytes()[:300])
    expect(check_site(site), "E05", "error", str(folder / "slice-2.dcm"), "no pixels")


def test_the_printed_report_says_errors_in_words_and_shows_every_case(site):
    (site / "labels" / "case-0.nii.gz").rename(site / "labels" / "other.nii.gz")
    stream = io.StringIO()
    print_report(check_site(site), Console(file=stream, width=200, no_color=True))
    text = stream.getvalue()
    assert "ERROR E03" in text and "NOT OK" in text and "1 error(s)" in text
    assert all(f"case-{case}" in text for case in range(4))


# ---- what a bundle can take, and what it sees ----------------------------------------------------------------------


def test_volumes_do_not_fit_a_bundle_of_colour_pictures(site):
    report = check_site(site, colour=True)
    wrong = {finding.case for finding in report.errors}
    assert wrong == {f"case-{case}" for case in range(4)}
    expect(report, "E05", "error", "case-0", "volume", "--bundle")


def test_colour_pictures_are_read_as_grey_by_a_bundle_of_volumes_and_that_is_said_once(photographs):
    report = check_site(photographs)
    assert report.ok
    expect(report, "E09", "note", "3 case(s) (eye-0, eye-1, eye-2)", "one grey slice")
    assert not check_site(photographs, colour=True).remarks


def test_labelled_voxels_outside_the_field_of_view_are_counted(site):
    """The volumes are 16 mm wide, voxels of 2 mm; a view of 8 mm has the indices 2 to 5."""
    label = np.zeros((8, 8, 4), np.uint8)
    label[0:3, 4, 1] = 1
    save(site / "labels" / "case-1.nii.gz", label)
    assert not any("outside" in finding.message for finding in check_site(site, field_of_view=16).findings)
    report = check_site(site, field_of_view=8)
    assert report.ok and report.cases[1].unseen == 2
    expect(report, "E09", "warning", "'case-1': 2 labelled voxels, 67%", "field of view of 8 mm", "field_of_view_mm")
    expect(report, "E09", "warning", "4 case(s)", "75% of the image")


def test_a_label_in_another_order_of_the_axes_is_turned_if_it_lies_at_the_same_place(site):
    image = nibabel.load(site / "images" / "case-1.nii.gz")
    label = nibabel.load(site / "labels" / "case-1.nii.gz")
    way = nibabel.orientations.axcodes2ornt(("L", "S", "P"))
    nibabel.save(label.as_reoriented(way), site / "labels" / "case-1.nii.gz")
    report = check_site(site)
    assert report.ok and report.cases[1].foreground == 12 and image.shape == report.cases[1].shape
    expect(report, "E09", "note", "1 case(s) (case-1)", "another order of the axes")


def test_many_cases_with_labels_that_are_not_seen_are_one_warning(site):
    for case in range(4, 10):
        save(site / "images" / f"case-{case}.nii.gz", np.random.default_rng(case).random((8, 8, 4)))
        label = np.zeros((8, 8, 4), np.uint8)
        label[0 : case - 2, 4, 1] = 1
        save(site / "labels" / f"case-{case}.nii.gz", label)
    report = check_site(site, field_of_view=8)
    unseen = [finding for finding in report.findings if "labelled voxels lie" in finding.message]
    assert len(unseen) == 1 and unseen[0].message.startswith("6 case(s) (case-4, ")
    assert "up to 100%" in unseen[0].message


def test_the_field_of_view_is_of_the_plane_right_and_front_whatever_the_order_of_the_axes(site):
    """Slices are the first axis here, and lie 20 mm apart: none is outside."""
    values = np.random.default_rng(5).integers(0, 900, (8, 8, 8)).astype(np.int16)
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 2.0, 0], [20.0, 0, 0, 0], [0, 0, 0, 1]])
    save(site / "images" / "case-1.nii.gz", values, affine)
    save(site / "labels" / "case-1.nii.gz", (values > 800).astype(np.uint8), affine)
    report = check_site(site, field_of_view=16)
    assert report.cases[1].unseen == 0 and "case-1" not in report.outside


def test_an_image_of_nearly_one_value_is_a_warning(site):
    values = np.full((8, 8, 16), 7, np.int16)
    values[0, 0, :2] = 900
    save(site / "images" / "case-1.nii.gz", values)
    save(site / "labels" / "case-1.nii.gz", (values > 8).astype(np.uint8))
    report = check_site(site)
    assert report.ok
    expect(report, "E09", "warning", "case-1", "nearly all of its values are the same")


def test_a_pair_with_noise_in_its_affine_is_a_pair(site):
    """Turned by nearly 45 degrees, where rounding decides which way an axis points most."""
    turn = np.eye(4)
    turn[:2, :2] = np.array([[1, -1], [1, 1]]) * np.sqrt(2)
    for kind, tiny in (("images", 1e-7), ("labels", -1e-7)):
        noise = np.zeros((4, 4))
        noise[0, 0], noise[0, 1] = tiny, tiny
        values = np.random.default_rng(8).integers(0, 9, (8, 8, 4)) if kind == "images" else np.ones((8, 8, 4))
        save(site / kind / "case-1.nii.gz", values.astype(np.int16), turn + noise)
    assert not [finding for finding in check_site(site).findings if "differ in" in finding.message and finding.case]


def test_a_label_of_a_picture_that_was_stored_on_its_side_is_explained(photographs):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (6, 8, 3), dtype=np.uint8)).save(
        photographs / "images/eye-0.png", exif=exif
    )
    expect(check_site(photographs), "E04", "error", "eye-0", "[6, 8] (upright, as its EXIF orientation says)", "[8, 6]")


def test_values_near_to_whole_ones_are_read_as_in_training(site):
    save(site / "labels" / "case-1.nii.gz", np.full((8, 8, 4), 0.9999999, np.float32))
    report = check_site(site)
    assert report.ok and report.cases[1].label_values == (1,)
    save(site / "labels" / "case-1.nii.gz", np.full((8, 8, 4), 255, np.int16))
    report = check_site(site)
    expect(report, "E07", "note", "case-1", "255 is read as 1")
