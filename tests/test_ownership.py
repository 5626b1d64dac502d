"""Nothing that the software did not write is deleted or overwritten without `--force`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pfedsam.errors import PFedSAMError
from pfedsam.files import when_whole
from pfedsam.ownership import MARKER, claim, marker, require_free, require_ours, require_sealed, seal, use


def refused(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(PFedSAMError, match="E24") as caught:
        call(*arguments)
    return str(caught.value)


def test_a_folder_that_was_claimed_is_ours_for_the_same_kind_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    claim(folder, "evaluation")
    (folder / "results.json").write_text("{}")
    before = (folder / MARKER).read_bytes()
    claim(folder, "evaluation")
    assert (folder / MARKER).read_bytes() == before
    said = refused(claim, folder, "simulation")
    assert "'evaluation', not 'simulation'" in said and "--force" in said


@pytest.mark.parametrize("content", [None, "[]", "{", '{"what": "evaluation"', "\x00"])
def test_a_folder_with_files_and_no_marker_is_somebody_elses(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    if content is not None:
        (tmp_path / MARKER).write_text(content)
    assert "not ours" in refused(claim, tmp_path, "evaluation")
    assert marker(tmp_path) is None


def test_what_is_used_by_force_does_not_become_ours(tmp_path: Path) -> None:
    """The next command asks again, and a run folder stays one."""
    (tmp_path / "thesis.doc").write_text("mine")
    use(tmp_path, "evaluation", force=True)
    assert marker(tmp_path) is None and "not ours" in refused(use, tmp_path, "evaluation")
    claim(tmp_path / "run", "simulation")
    use(tmp_path / "run", "evaluation", force=True)
    assert (marker(tmp_path / "run") or {})["what"] == "simulation"
    use(tmp_path / "new", "evaluation")
    use(tmp_path / "new", "evaluation")


def test_what_is_claimed_by_force_is_ours_from_then_on(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    claim(tmp_path, "simulation", force=True)
    claim(tmp_path, "simulation")


def test_a_marker_that_was_cut_off_is_nobodys_file(tmp_path: Path) -> None:
    (tmp_path / f".{MARKER}.abc.tmp").write_text("{")
    claim(tmp_path, "evaluation")
    assert (marker(tmp_path) or {})["what"] == "evaluation"


def test_files_and_links_in_the_place_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("file", "link"):
        refused(require_ours, tmp_path / name, "evaluation", True)


def test_a_file_that_is_there_is_replaced_by_force_and_one_that_is_read_never(tmp_path: Path) -> None:
    file, link = tmp_path / "model", tmp_path / "link"
    require_free(file)
    file.write_text("mine")
    link.symlink_to(file)
    for path in (file, link):
        assert "--force" in refused(require_free, path)
        require_free(path, True)
        assert "is read" in refused(require_free, path, True, [tmp_path / "." / "model"])
    refused(require_free, tmp_path, True)


def test_a_sealed_folder_is_ours_until_a_file_in_it_is_changed_or_added(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    (folder / "app").mkdir(parents=True)
    (folder / "app" / "config.json").write_text("{}")
    seal(folder, "job")
    require_sealed(folder, "job")
    (folder / "app" / "notes.txt").write_text("mine")
    assert "app/notes.txt" in refused(require_sealed, folder, "job")
    (folder / "app" / "notes.txt").unlink()
    (folder / "app" / "config.json").write_text('{"rounds": 3}')
    assert "changed" in refused(require_sealed, folder, "job") and "not ours" in refused(
        require_sealed, tmp_path, "job"
    )
    require_sealed(folder, "job", force=True)
    told = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps({**told, "files": ["config.json"]}))
    refused(require_sealed, folder, "job")


def test_a_file_or_folder_takes_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")
    folder.mkdir()
    (folder / "before").touch()
    for out in (file, folder):
        with pytest.raises(RuntimeError), when_whole(out) as path:
            path.mkdir()
            raise RuntimeError
    assert file.read_text() == "before" and (folder / "before").exists() and len(os.listdir(tmp_path)) == 2
    with when_whole(file) as path:
        path.write_text("after")
    with when_whole(folder) as path:
        path.mkdir()
        (path / "after").touch()
    assert file.read_text() == "after" and os.listdir(folder) == ["after"] and len(os.listdir(tmp_path)) == 2
