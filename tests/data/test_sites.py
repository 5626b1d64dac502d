from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from pfedsam.data.listed_split import listed_split
from pfedsam.data.sections import section_by_key
from pfedsam.data.site_folder import Case, labelled_cases, read_site
from pfedsam.data.sites import SECTIONS, datalist, read_split, result_name, site_images, split_site, write_split
from pfedsam.errors import PFedSAMError


def make_site(folder: Path, cases: int = 6, label: str = ".nii.gz") -> Path:
    """A site of empty files: reading a site opens none of them."""
    for kind, suffix in (("images", ".nii.gz"), ("labels", label)):
        (folder / kind).mkdir(parents=True)
        for case in range(cases):
            (folder / kind / f"case-{case}{suffix}").touch()
    return folder


def some_cases(patients: int, images: int = 1) -> list[Case]:
    return [
        Case(f"p{patient}-{image}", Path(f"images/p{patient}-{image}.png"), None, f"p{patient}")
        for patient in range(patients)
        for image in range(images)
    ]


def write_datalist(folder: Path, content: object) -> None:
    (folder / "datalist.json").write_text(json.dumps(content), encoding="utf-8")


def refused(code: str, *words: str):
    """The error has this code, is one line and holds these words."""

    class _Refused:
        def __enter__(self):
            self.raises = pytest.raises(PFedSAMError)
            self.info = self.raises.__enter__()

        def __exit__(self, *exit_):
            caught = self.raises.__exit__(*exit_)
            error = self.info.value
            assert error.code == code and error.remedy and "\n" not in str(error)
            assert all(word in str(error) for word in words), str(error)
            return caught

    return _Refused()


def test_cases_are_sorted_and_named_without_suffix(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for name in ("b.nii.gz", "a.PNG", "c.dcm", ".hidden.png", "notes.txt"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "d").mkdir()
    (tmp_path / "images" / "d" / "slice-1").touch()
    (tmp_path / "images" / "empty").mkdir()
    for name in ("a.tif", "b.nii", "c.png", "d.nii.gz"):
        (tmp_path / "labels" / name).touch()
    cases = read_site(tmp_path)
    assert [case.name for case in cases] == ["a", "b", "c", "d"]
    assert [case.label.name for case in cases if case.label] == ["a.tif", "b.nii", "c.png", "d.nii.gz"]
    assert [case.patient for case in cases] == ["a", "b", "c", "d"]


def test_a_missing_or_empty_folder_is_refused_with_the_expected_layout(tmp_path):
    with refused("E02", "nowhere", "<site>/images/<case>"):
        read_site(tmp_path / "nowhere")
    (tmp_path / "images").mkdir()
    with refused("E02", "no image", "<site>/labels/<case>"):
        read_site(tmp_path)


def test_a_label_that_may_be_misnamed_is_refused_with_the_files_looked_for(tmp_path):
    site = make_site(tmp_path / "site")
    (site / "labels" / "case-2.nii.gz").rename(site / "labels" / "case-2b.nii.gz")
    assert [case.name for case in read_site(site) if case.label is None] == ["case-2"]
    with refused("E03", "case-2", "case-2.nii.gz", "case-2.png", "labels", "case-2b.nii.gz"):
        labelled_cases(site, read_site(site))


def test_a_site_without_any_label_is_refused(tmp_path):
    site = make_site(tmp_path / "site")
    for label in (site / "labels").iterdir():
        label.unlink()
    with refused("E03", "case-0"):
        labelled_cases(site, read_site(site))


def test_two_images_of_one_case_are_refused(tmp_path):
    site = make_site(tmp_path / "site")
    (site / "images" / "case-1.png").touch()
    with refused("E09", "case-1"):
        read_site(site)


@pytest.mark.parametrize(("patients", "images", "folds"), [(60, 1, 3), (40, 3, 3), (80, 2, 5)])
def test_every_patient_is_tested_exactly_once_over_the_seeds_of_all_folds(patients, images, folds):
    cases = some_cases(patients, images)
    tested: Counter[str] = Counter()
    for seed in range(folds):
        tested.update(case.name for case in split_site(cases, seed, folds)["test"])
    assert tested == Counter(case.name for case in cases)


@pytest.mark.parametrize("seed", range(6))
def test_no_patient_is_in_two_sections_and_every_case_in_one(seed):
    cases = some_cases(40, 2)
    split = split_site(cases, seed)
    sections = [{case.patient for case in split[section]} for section in SECTIONS]
    assert all(sections) and sum(map(len, sections)) == 40
    assert sorted(case.name for section in SECTIONS for case in split[section]) == sorted(case.name for case in cases)


#: Sections of four names with the seeds 0 to 3.
KNOWN = [
    ["test", "training", "training", "test"],
    ["training", "test", "training", "validation"],
    ["training", "training", "test", "training"],
    ["test", "training", "training", "test"],
]
NAMES = some.sets(some.text(max_size=10), max_size=30)


@settings(max_examples=60, deadline=None)
@given(NAMES, NAMES, some.integers(0, 9), some.integers(2, 6), some.sampled_from([0.1, 0.2, 0.5]))
def test_patients_that_come_or_go_move_nobody(names, others, seed, folds, fraction):
    def sections(of: set[str]) -> dict[str, str]:
        # many more, so that no section is empty
        cases = [Case(name, Path("i"), None, name) for name in (*of, *(f"{n} of many" for n in range(300)))]
        split = split_site(cases, seed, folds, fraction)
        return {case.patient: section for section in SECTIONS for case in split[section]}

    with_, without = sections(names | others), sections(names)
    assert {name: with_[name] for name in without} == without


def test_one_patient_more_moves_none_of_68(tmp_path):
    site = make_site(tmp_path / "site", cases=68)
    for seed in range(9):
        before = {c.name: section for section, cases in read_split(site, seed).items() for c in cases}
        for kind in ("images", "labels"):
            (site / kind / "a-new-one.nii.gz").touch()
        after = {c.name: section for section, cases in read_split(site, seed).items() for c in cases}
        assert after.pop("a-new-one") in SECTIONS and after == before
        for kind in ("images", "labels"):
            (site / kind / "a-new-one.nii.gz").unlink()


def test_the_rule_is_fixed_and_its_shares_are_as_asked():
    """Known answers: another rule or key would move the patients of every site."""
    names = ("TCGA_CS_4941", "case-1", "M\u00fcller", "")
    assert [[section_by_key(name, seed) for seed in range(4)] for name in names] == KNOWN
    for seed in range(3):
        counts = Counter(section_by_key(f"patient {n}", seed) for n in range(3000))
        assert counts["test"] == pytest.approx(1000, abs=100)
        assert counts["validation"] == pytest.approx(400, abs=80)


def test_the_split_depends_on_patients_and_seed_only():
    cases = some_cases(40)
    moved = [Case(case.name, Path("elsewhere") / case.image, None, case.patient) for case in reversed(cases)]
    names = [[[c.name for c in split_site(group, 1)[s]] for s in SECTIONS] for group in (cases, moved)]
    assert names[0] == names[1]
    first, second = split_site(cases, 0), split_site(cases, 3)
    assert first["test"] == second["test"]
    assert len({tuple(case.name for case in split_site(cases, 3 * k)["validation"]) for k in range(8)}) > 1


def test_too_few_patients_are_refused_with_what_splits_them():
    with refused("E06", "2 patient(s) in 'images'", "empty", "pfedsam split ."):
        split_site(some_cases(2, 4), 0)
    with refused("E06", "validation", "pfedsam split"):
        split_site(some_cases(40), 0, validation_fraction=1e-9)
    with refused("E06", "pfedsam split <site>"):
        split_site([], 0)
    for wrong in ({"folds": 1}, {"validation_fraction": 0}, {"validation_fraction": 1}):
        with refused("E16"):
            split_site(some_cases(4), 0, **wrong)


def test_datalist_of_a_site_without_file_is_the_split_by_seed(tmp_path):
    site = make_site(tmp_path / "site", cases=30)
    split = split_site(read_site(site), 1)
    for section in SECTIONS:
        entries = datalist(site, section, seed=1)
        assert [entry["case"] for entry in entries] == [case.name for case in split[section]]
        assert all(Path(entry["image"]).is_file() and Path(entry["label"]).is_file() for entry in entries)
    with refused("E28", "testing"):
        datalist(site, "testing")


def test_datalist_file_decides_and_its_test_section_may_be_missing(tmp_path):
    site = make_site(tmp_path / "site")
    entry = {"image": "images/case-3.nii.gz", "label": "labels/case-3.nii.gz", "patient": "P3"}
    write_datalist(site, {"training": ["case-5", "case-0"], "validation": [entry]})
    for seed in (0, 1):
        assert [entry["case"] for entry in datalist(site, "training", seed)] == ["case-5", "case-0"]
        assert [(e["case"], e["patient"]) for e in datalist(site, "validation", seed)] == [("case-3", "P3")]
        assert datalist(site, "test", seed) == []


def test_a_map_of_patients_alone_leaves_the_split_to_the_seed(tmp_path):
    site = make_site(tmp_path / "site", cases=60)
    write_datalist(site, {"patients": {f"case-{case}": f"P{case // 2}" for case in range(60)}})
    assert listed_split(site) is None
    for seed in range(3):
        split = read_split(site, seed)
        seen = [{case.patient for case in split[section]} for section in SECTIONS]
        assert sum(map(len, seen)) == 30


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"training": ["case-0", "case-9"], "validation": ["case-1"]}, ["case-9", "training"]),
        ({"training": ["case-0", "case-1"], "validation": ["case-1"]}, ["case-1", "twice"]),
        ({"training": ["case-0"]}, ["validation"]),
        ({"training": [], "validation": ["case-1"]}, ["training"]),
        ({"training": [7], "validation": ["case-1"]}, ["7"]),
        ({"training": [{"image": "images/none.png"}], "validation": ["case-1"]}, ["images/none.png"]),
        ({"training": [{"image": "../site/images/case-0.nii.gz"}], "validation": ["case-1"]}, ["../site"]),
        ({"training": ["case-0"], "validation": ["case-1"], "patients": {"case-0": "P", "case-1": "P"}}, ["P"]),
        (
            {
                "training": [{"image": "images/case-0.nii.gz", "patient": "Q"}],
                "validation": [{"image": "images/case-1.nii.gz", "patient": "Q"}],
            },
            ["'Q'", "training", "validation"],
        ),
        ({"train": ["case-0"]}, ["training"]),
        ([1, 2], ["training"]),
    ],
)
def test_a_wrong_datalist_is_refused_and_names_the_culprit(tmp_path, content, words):
    site = make_site(tmp_path / "site")
    write_datalist(site, content)
    with refused("E08", "datalist.json", *words):
        datalist(site, "training")


def test_an_unreadable_datalist_is_refused(tmp_path):
    site = make_site(tmp_path / "site")
    (site / "datalist.json").write_text("{", encoding="utf-8")
    with refused("E08", "datalist.json", "JSON"):
        datalist(site, "training")


def test_a_listed_case_without_label_is_refused(tmp_path):
    site = make_site(tmp_path / "site")
    (site / "labels" / "case-0.nii.gz").unlink()
    write_datalist(site, {"training": ["case-1"], "validation": ["case-2"]})
    assert datalist(site, "training")
    write_datalist(site, {"training": ["case-1"], "validation": ["case-0"]})
    with refused("E03", "case-0"):
        datalist(site, "validation")


def test_the_written_split_is_the_split_used_and_can_serve_as_datalist(tmp_path):
    site = make_site(tmp_path / "site", cases=30)
    before = sorted(path for path in site.rglob("*"))
    path = tmp_path / "state" / "split.json"
    content = write_split(site, path, seed=2, folds=3)
    assert sorted(path for path in site.rglob("*")) == before
    assert json.loads(path.read_text()) == content and content["seed"] == 2 and content["folds"] == 3
    assert [item.name for item in path.parent.iterdir()] == ["split.json"]
    expected = {section: datalist(site, section, 2) for section in SECTIONS}
    (site / "datalist.json").write_text(path.read_text())
    assert {section: datalist(site, section, 0) for section in SECTIONS} == expected
    assert write_split(site, path)["source"] == "datalist.json"


@pytest.mark.parametrize("suffix", [".NII.GZ", ".Nii", ".PNG", ".jpeg", ".TIF", ".tiff", ".bmp", ".DCM"])
def test_one_list_of_suffixes_for_images_and_labels_whatever_their_capitals(tmp_path, suffix):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"a.b{suffix}").touch()
    (case,) = read_site(tmp_path)
    assert case.name == "a.b" and case.label == tmp_path / "labels" / f"a.b{suffix}"
    assert site_images(tmp_path) == [{"image": str(case.image)}]


def test_a_label_may_be_a_folder_of_slices(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind / "a").mkdir(parents=True)
        (tmp_path / kind / "a" / "1").touch()
    assert read_site(tmp_path)[0].label == tmp_path / "labels" / "a"


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_two_files_of_one_case_are_refused(tmp_path, kind):
    make_site(tmp_path)
    (tmp_path / kind / "case-1.PNG").touch()
    with pytest.raises(PFedSAMError, match=rf"E09.*'case-1' has two {kind}.*case-1\.PNG"):
        read_site(tmp_path)


def test_images_of_a_site_in_a_folder_with_brackets_none_left_out_unsaid(tmp_path):
    site = make_site(tmp_path / "site [1] *")
    (site / "images" / "case-1.nii.gz").rename(site / "images" / "case-1.JPG")
    assert [Path(item["image"]).name for item in site_images(site)][:2] == ["case-0.nii.gz", "case-1.JPG"]
    (site / "images" / "scan.mha").touch()
    (site / "images" / "empty").mkdir()
    with pytest.raises(PFedSAMError, match=r"E09.*empty.*scan\.mha.*no image of a known format"):
        site_images(site)


@pytest.mark.parametrize(
    ("image", "name"), [("A.NII.GZ", "A"), ("x.1.png", "x.1"), ("1.2.840.113", "1.2.840.113"), ("a.tiff", "a")]
)
def test_a_result_is_named_by_its_case_also_where_a_folder_has_dots(tmp_path, image, name):
    from monai.data.utils import create_file_basename

    if image == "1.2.840.113":
        (tmp_path / image).mkdir()
        (tmp_path / image / "1").touch()
    told = result_name({"filename_or_obj": str(tmp_path / image)}, None)
    path = create_file_basename("lesion", told["subject"], tmp_path, separate_folder=False, patch_index=told["idx"])
    assert Path(path).name == f"{name}_lesion"
