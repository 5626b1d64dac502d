from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from pfedsam.data.checks import check_site
from pfedsam.data.phantom import write_phantom
from pfedsam.data.phantom_heads import FLAIR, TISSUES, scanners
from pfedsam.data.site_folder import read_site
from pfedsam.errors import PFedSAMError

SHAPE = (40, 40, 10)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> list[Path]:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "sites", sites=4, cases=4, shape=SHAPE)


def values_of(path: Path | None) -> np.ndarray:
    assert path is not None
    nifti = nibabel.load(path)
    assert isinstance(nifti, nibabel.Nifti1Image)
    return np.asarray(nifti.dataobj)


def volumes(site: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(values_of(case.image), values_of(case.label)) for case in read_site(site)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def contrast(site: Path) -> float:
    """Mean of lesion over median of head, over the cases of a site."""
    return float(
        np.mean([image[label > 0].mean() / np.median(image[image > image.mean()]) for image, label in volumes(site)])
    )


def test_every_site_is_a_valid_site_folder(phantom):
    assert [site.name for site in phantom] == ["site-1", "site-2", "site-3", "site-4"]
    for site in phantom:
        report = check_site(site)
        assert report.ok and not report.findings, report.findings
        assert all(row.shape == SHAPE and row.orientation == "RAS" and row.dtype == "int16" for row in report.cases)
        assert all(row.foreground > 0 for row in report.cases)


def test_case_names_are_unique_over_the_sites(phantom):
    names = [case.name for site in phantom for case in read_site(site)]
    assert len(set(names)) == len(names) == 16


def test_many_slices_are_empty(phantom):
    labels = [label for site in phantom for _, label in volumes(site)]
    assert 0.4 < np.mean([1 - label.any(axis=(0, 1)).mean() for label in labels]) < 0.85


def test_the_last_site_inverts_the_lesions_contrast(phantom):
    assert min(contrast(site) for site in phantom[:3]) > 1.1
    assert contrast(phantom[3]) < 0.95


def test_no_threshold_finds_the_lesions(phantom):
    for image, label in volumes(phantom[0]):
        best = max(
            2 * (label[image > level].sum()) / (label.sum() + (image > level).sum())
            for level in np.percentile(image, np.linspace(50, 99.9, 60))
        )
        assert best < 0.85


def test_the_same_arguments_give_the_same_bytes(phantom, tmp_path):
    again = write_phantom(tmp_path / "again", sites=4, cases=4, shape=SHAPE)
    assert contents(again[0].parent) == contents(phantom[0].parent)


def test_another_seed_gives_other_images(phantom, tmp_path):
    other = write_phantom(tmp_path / "other", sites=1, cases=1, shape=SHAPE, seed=1)
    assert (volumes(other[0])[0][0] != volumes(phantom[0])[0][0]).any()


def test_the_first_cases_do_not_depend_on_the_number_of_cases(phantom, tmp_path):
    fewer = write_phantom(tmp_path / "fewer", sites=2, cases=1, shape=SHAPE)
    assert (volumes(fewer[0])[0][0] == volumes(phantom[0])[0][0]).all()


def test_an_equal_phantom_is_not_written_again_and_another_replaces_it_when_it_is_told_to(tmp_path):
    calls: list[tuple[int, int]] = []

    def write(sites: int, cases: int, force: bool = False) -> None:
        write_phantom(tmp_path, sites, cases, (16, 16, 4), 0, lambda done, total: calls.append((done, total)), force)

    write(2, 2)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    write(2, 2)
    assert len(calls) == 4
    (tmp_path / "site-1" / "datalist.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(PFedSAMError, match=r"E24.*sites 2, not 1, cases 2, not 1.*--force"):
        write(1, 1)
    assert contents(tmp_path) == before and len(calls) == 4
    write(1, 1, force=True)
    assert len(calls) == 5
    assert sorted(contents(tmp_path)) == [
        "phantom.json",
        "site-1/datalist.json.before",
        "site-1/images/s1-case-01.nii.gz",
        "site-1/labels/s1-case-01.nii.gz",
    ]


def test_an_interrupted_phantom_is_completed(tmp_path):
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path, sites=1, cases=2, shape=(16, 16, 4), progress=stop)
    assert json.loads((tmp_path / "phantom.json").read_text())["complete"] is False
    sites = write_phantom(tmp_path, sites=1, cases=2, shape=(16, 16, 4))
    assert len(read_site(sites[0])) == 2


def test_with_equal_settings_only_what_is_missing_is_written(tmp_path):
    def write() -> None:
        write_phantom(tmp_path, sites=2, cases=3, shape=(16, 16, 4))

    write()
    whole, marker = contents(tmp_path), json.loads((tmp_path / "phantom.json").read_text())
    own, lost = "site-1/labels/s1-case-01.nii.gz", "site-1/images/s1-case-02.nii.gz"
    for interrupted in (False, True):  # a site folder that is missing, then an interrupted run
        (tmp_path / own).write_text("mine")
        (tmp_path / "site-1" / "labels" / "notes.txt").write_text("mine")
        if interrupted:
            (tmp_path / lost).unlink()
            (tmp_path / "phantom.json").write_text(json.dumps(marker | {"complete": False}))
        else:
            shutil.rmtree(tmp_path / "site-2")
        write()
        assert contents(tmp_path) == whole | {own: b"mine", "site-1/labels/notes.txt": b"mine"}
    write_phantom(tmp_path, sites=2, cases=3, shape=(16, 16, 4), force=True)
    assert contents(tmp_path)[own] == b"mine"


def test_a_killed_run_leaves_no_torn_file(tmp_path, monkeypatch):
    def torn(nifti: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(nibabel, "save", torn)
        write_phantom(tmp_path, sites=1, cases=3, shape=(16, 16, 4))
    assert [path for path in tmp_path.rglob("s1-*") if path.is_file()] == []
    sites = write_phantom(tmp_path, sites=1, cases=3, shape=(16, 16, 4))
    assert check_site(sites[0]).ok and not any(content == b"half" for content in contents(tmp_path).values())


def test_a_phantom_that_was_being_replaced_is_not_taken_for_a_whole_one(tmp_path, monkeypatch):
    def stop(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    write_phantom(tmp_path, sites=1, cases=2, shape=(16, 16, 4))
    whole = contents(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", stop)
        write_phantom(tmp_path, sites=1, cases=2, shape=(16, 16, 4), seed=1, force=True)
    (tmp_path / "site-1" / "images" / "s1-case-01.nii.gz").unlink()
    write_phantom(tmp_path, sites=1, cases=2, shape=(16, 16, 4))
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("marker", [None, "[]", '{"settings": 1}', "{"])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, marker):
    (tmp_path / "thesis.txt").write_text("mine")
    if marker is not None:
        (tmp_path / "phantom.json").write_text(marker)
    before = contents(tmp_path)
    with pytest.raises(PFedSAMError) as info:
        write_phantom(tmp_path, sites=1, cases=1)
    error = info.value
    assert error.code == "E02" and str(tmp_path) in error.message and error.remedy and "\n" not in str(error)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("arguments", [{"sites": 0}, {"cases": 0}, {"seed": -1}, {"shape": (96, 96, 2)}])
def test_settings_that_cannot_be_drawn_are_refused(tmp_path, arguments):
    with pytest.raises(PFedSAMError) as info:
        write_phantom(tmp_path / "out", **arguments)
    assert info.value.code == "E16" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 7])
def test_scanners_differ_and_the_last_is_the_most_shifted(sites):
    machines = scanners(sites, seed=3)
    assert len(machines) == sites and machines == scanners(sites, seed=3)
    assert machines[0].tissue == FLAIR and all(set(machine.tissue) == {*TISSUES, "lesion"} for machine in machines)
    darker = [machine.tissue["lesion"] < machine.tissue["white"] for machine in machines]
    assert darker == [False] * (sites - 1) + [sites > 1]
    assert len({repr(machine) for machine in machines}) == sites
