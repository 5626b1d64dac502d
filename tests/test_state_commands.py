"""`pfedsam state` as a hospital uses it: it looks where the site keeps its state, and never at half of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.commands import poc
from pfedsam.commands.console import console
from pfedsam.commands.poc_results import newest_state
from pfedsam.deployment.processes import Deployment
from pfedsam.errors import PFedSAMError
from pfedsam.storage.site_model import SiteModel, read, write
from pfedsam.storage.state import ROOT_VARIABLE
from pfedsam.storage.state_files import BEST, CURRENT

FIRST, SECOND = "ab" * 6, "cd" * 6
PROJECT = Path(__file__).resolve().parents[1] / "poc_workspace" / "project.yml"


def keep(root: Path, fingerprint: str = FIRST, federation: str = "lgg", site: str = "north", bundle: str = "b") -> Path:
    """A state on disk; returns its folder."""
    info = {"fingerprint": fingerprint * 5, "roles": {"shared": [], "personal": []}, "round": 3}
    folder = root / federation / site / f"{bundle}-{fingerprint}"
    write(folder / CURRENT, SiteModel({"a": torch.ones(2)}, {"b": torch.ones(2)}, {"b#step": torch.ones(1)}, info))
    return folder


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["state", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    done = run(*arguments)
    assert isinstance(done.exception, PFedSAMError), done.output
    return str(done.exception)


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which no cell of a table is broken."""
    monkeypatch.setattr(console, "_width", 200)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "default"))
    return tmp_path / "states"


@pytest.fixture
def kit(tmp_path: Path, root: Path) -> Path:
    """What `pfedsam site init --state-root` writes."""
    kit = tmp_path / "kit"
    (kit / "local").mkdir(parents=True)
    (kit / "local" / "pfedsam.json").write_text(json.dumps({"state_root": str(root)}))
    return kit


def test_the_kit_says_where_a_site_keeps_its_state(root: Path, kit: Path, tmp_path: Path) -> None:
    folder = keep(root)
    assert FIRST in run("list", "--kit", kit).output
    done = run("export", "lgg", "north", tmp_path / "out", "--kit", kit)
    assert done.exit_code == 0 and read(tmp_path / "out").moments == {}
    assert run("delete", "lgg", "north", "--yes", "--kit", kit).exit_code == 0
    assert not folder.exists()


def test_the_best_state_is_listed_with_its_round_and_an_export_says_which_it_takes(root: Path, tmp_path: Path) -> None:
    folder = keep(root)
    best = read(folder / CURRENT)
    best.info |= {"round": 2, "val_dice_personal": 0.71}
    write(folder / BEST, best)
    assert "0.710 (round 2)" in run("list", "--root", root).output
    done = run("export", "lgg", "north", tmp_path / "out", "--root", root)
    assert f"{folder / CURRENT}: current state of round 3, validation Dice not known; {BEST} beside it" in done.output
    assert read(tmp_path / "out").info["round"] == 3


@pytest.mark.parametrize("width", [40, 80])
def test_the_path_of_each_state_is_listed_whole_and_is_what_commands_take(
    root: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_width", width)
    files = [keep(root, site=site) / CURRENT for site in ("north", "south")]
    lines = run("list", "--root", root).output.splitlines()
    assert [line for line in lines if str(root) in line][-2:] == [f"{n}  {file}" for n, file in enumerate(files, 1)]
    assert all(read(Path(line.split("  ", 1)[1])).info["round"] == 3 for line in lines[-2:])


def test_the_folder_of_a_simulation_will_do_as_a_root(tmp_path: Path) -> None:
    folder = keep(tmp_path / "state")
    assert "no state" in run("list", "--root", tmp_path).output
    (tmp_path / "run.json").write_text("{}")
    assert str(folder / CURRENT) in run("list", "--root", tmp_path).output
    assert run("delete", "lgg", "north", "--yes", "--root", tmp_path).exit_code == 0 and not folder.exists()


def test_where_nothing_is_found_the_folder_and_both_options_are_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(root)
    (tmp_path / "default").mkdir()
    for said in (run("list").output, refused("delete", "lgg", "north", "--yes")):
        assert all(word in said for word in (str(tmp_path / "default"), "--kit", "--root")), said

    # the default of nobody's choice, which no site has made yet
    monkeypatch.delenv(ROOT_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run("list")
    assert done.exit_code == 0 and f"no state under {tmp_path / '.pfedsam'}" in done.output


def test_a_kit_that_names_no_root_says_nothing_of_states(root: Path, kit: Path, tmp_path: Path) -> None:
    (kit / "local" / "pfedsam.json").write_text("{}")
    keep(tmp_path / "default")
    for words in (("list",), ("delete", "lgg", "north", "--yes"), ("export", "lgg", "north", tmp_path / "out")):
        said = refused(*words, "--kit", kit)
        assert all(word in said for word in ("E13", "names no state_root", "own home", NOT_KNOWN, "--root")), said


def test_a_state_of_another_name_is_not_taken_and_the_known_ones_are_named(root: Path) -> None:
    folder = keep(root)
    said = refused("delete", "lgg", "nroth", "--yes", "--root", root)
    assert "lgg north" in said and "--kit" in said and folder.exists()


def test_a_kit_without_settings_and_two_places_at_once_are_refused(root: Path, kit: Path, tmp_path: Path) -> None:
    assert "E01" in refused("list", "--kit", tmp_path)
    assert run("list", "--kit", kit, "--root", root).exit_code == 2


def test_of_two_fingerprints_one_is_chosen_by_how_it_begins(root: Path) -> None:
    first, second = keep(root), keep(root, SECOND)
    said = refused("delete", "lgg", "north", "--yes", "--root", root)
    assert FIRST in said and SECOND in said and "--fingerprint" in said and "--all" in said
    assert "no state" in refused("delete", "lgg", "north", "--yes", "--root", root, "--fingerprint", "0")
    assert first.exists() and second.exists()
    # the whole fingerprint, of which the folder has the first digits only
    done = run("delete", "lgg", "north", "--yes", "--root", root, "--fingerprint", SECOND * 5)
    assert done.exit_code == 0 and first.exists() and not second.exists()


def test_of_two_bundles_one_is_chosen_by_its_name(root: Path) -> None:
    first, second = keep(root), keep(root, bundle="fundus")
    assert run("delete", "lgg", "north", "--yes", "--root", root, "--bundle", "fundus").exit_code == 0
    assert first.exists() and not second.exists()


def test_all_states_of_a_site_in_a_federation_go_at_once_and_others_stay(root: Path) -> None:
    gone = [keep(root), keep(root, SECOND)]
    stays = [keep(root, federation="other"), keep(root, site="south")]
    done = run("delete", "lgg", "north", "--all", "--yes", "--root", root)
    assert done.exit_code == 0 and all(str(folder) in done.output for folder in gone)
    assert not any(folder.exists() for folder in gone) and all(folder.exists() for folder in stays)


def test_nothing_is_deleted_without_a_yes(root: Path) -> None:
    folder = keep(root)
    assert run("delete", "lgg", "north", "--root", root).exit_code == 1
    assert folder.exists()


def test_brackets_in_a_path_are_printed_as_they_are(tmp_path: Path) -> None:
    root = tmp_path / "[srv]" / "[/red]"
    keep(root)
    assert "lgg" in run("list", "--root", root).output
    said = run("delete", "lgg", "north", "--yes", "--root", root).output
    assert "[srv]/[/red]" in said


NOT_KNOWN = "is not known"


@pytest.mark.parametrize("named", ["--root", "--kit", ROOT_VARIABLE])
def test_a_root_that_is_named_and_not_there_is_no_proof_that_nothing_is_kept(
    root: Path, kit: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"--root": ("--root", root), "--kit": ("--kit", kit)}.get(named, ())
    if not where:
        monkeypatch.setenv(named, str(root))
    for words in (("list",), ("delete", "lgg", "north", "--yes"), ("export", "lgg", "north", root / "out")):
        said = refused(*words, *where)
        assert "E13" in said and str(root) in said and NOT_KNOWN in said, said
    root.write_text("a file")
    assert "is no folder" in refused("list", *where)


@pytest.fixture
def not_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of a user who is not the administrator, to whom modes mean nothing; this process is that user."""
    # what is imported first by somebody who may not read the sources would fail for another reason
    run("list"), run("--help")
    administrator = os.geteuid() == 0
    if administrator:
        os.seteuid(NOBODY)
    try:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            monkeypatch.setenv(ROOT_VARIABLE, folder)
            yield Path(folder)
            for path in (Path(folder), *(Path(folder) / one for one in CLOSED.values())):
                if path.exists():
                    path.chmod(0o700)
    finally:
        if administrator:
            os.seteuid(0)


#: User without rights, on every Linux.
NOBODY = 65534
CLOSED = {
    "federation": Path("lgg"),
    "site": Path("lgg") / "north",
    "state": Path("lgg") / "north" / f"b-{FIRST}",
}


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100])
@pytest.mark.parametrize("closed", ["root", *CLOSED])
def test_a_folder_that_may_not_be_looked_into_is_named_and_is_no_proof_of_deletion(
    not_allowed: Path, closed: str, mode: int
) -> None:
    keep(not_allowed)
    folder = not_allowed / CLOSED.get(closed, ".")
    folder.chmod(mode)
    for words in (("list",), ("delete", "lgg", "north", "--yes"), ("delete", "lgg", "other", "--yes")):
        for where in ((), ("--root", not_allowed)):
            said = refused(*words, *where)
            assert "E13" in said and str(folder) in said and NOT_KNOWN in said, said
    folder.chmod(0o700)
    assert FIRST in run("list").output


@pytest.mark.parametrize("place", [".", "lgg", "lgg/north"])
def test_a_link_to_a_disk_that_is_not_there_is_no_proof_of_deletion(root: Path, tmp_path: Path, place: str) -> None:
    keep(root)
    (root / place).resolve().rename(tmp_path / "unmounted")
    (root / place).resolve().symlink_to(tmp_path / "not there")
    said = refused("delete", "lgg", "north", "--yes", "--root", root)
    assert "E13" in said and str((root / place).absolute()) in said and NOT_KNOWN in said


@pytest.mark.parametrize("closed", ["federation", "site", "state"])
def test_a_state_that_may_not_be_deleted_is_an_error_that_says_so(not_allowed: Path, closed: str) -> None:
    folder = keep(not_allowed)
    (not_allowed / CLOSED[closed]).chmod(0o500)
    said = refused("delete", "lgg", "north", "--yes")
    assert "E13" in said and str(folder) in said and "not deleted, or not all of it" in said and "owner" in said
    assert folder.exists() or closed == "federation"


@pytest.mark.parametrize("value", ["0.9", "[bold]", [1], {"a": 1}, True, None, 10**30, "x" * 300])
def test_whatever_a_state_tells_of_itself_is_listed(root: Path, value: object) -> None:
    file = keep(root) / CURRENT
    model = read(file)
    for key in ("val_dice_personal", "final", "round"):
        model.info[key] = value
    write(file, model)
    done = run("list", "--root", root)
    assert done.exit_code == 0 and FIRST in done.output
    # the round; what is no Dice and no word for the end is not shown as one
    assert value is None or done.output.count(str(value)[:9]) >= 1


def test_a_file_that_is_there_is_not_replaced_by_an_export_and_a_state_never(root: Path, tmp_path: Path) -> None:
    folder, out = keep(root), tmp_path / "thesis.doc"
    out.write_text("mine")
    assert "E24" in refused("export", "lgg", "north", out, "--root", root) and out.read_text() == "mine"
    whole = (folder / CURRENT).read_bytes()
    assert "E24" in refused("export", "lgg", "north", folder / CURRENT, "--root", root, "--force")
    assert (folder / CURRENT).read_bytes() == whole
    assert run("export", "lgg", "north", out, "--root", root, "--force").exit_code == 0 and read(out).moments == {}


def test_make_poc_shows_the_state_that_was_written_last(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path, PROJECT)
    site = deployment.sites[0]
    newest = keep(deployment.state_root(site), FIRST, poc.FEDERATION, site) / CURRENT
    older = keep(deployment.state_root(site), SECOND, poc.FEDERATION, site) / CURRENT
    os.utime(older, (1, 1))
    assert newest_state(deployment, poc.FEDERATION, site) == newest
    with pytest.raises(PFedSAMError, match="E13"):
        newest_state(deployment, poc.FEDERATION, deployment.sites[1])


@pytest.mark.parametrize(
    ("dice", "shown"),
    [(0.71239, "0.712"), (1, "1.000"), (None, ""), ("high", "?"), ([0.7], "?"), ({}, "?"), (True, "?")],
)
@pytest.mark.parametrize("final", [True, [1], "yes"])
def test_a_state_whose_info_holds_something_else_is_listed_all_the_same(
    root: Path, dice: object, shown: str, final: object
) -> None:
    path = keep(root) / CURRENT
    model = read(path)
    model.info |= {"val_dice_personal": dice, "final": final}
    write(path, model)
    lines = run("list", "--root", root).output.splitlines()
    head = next(line for line in lines if "federation" in line)
    (line,) = [line for line in lines if "lgg" in line and str(root) not in line]
    ends = {"final": head.index("Dice"), "Dice": head.index("best")}
    cells = {column: line[head.index(column) : end].strip() for column, end in ends.items()}
    assert cells == {"final": "yes" if final is True else "", "Dice": shown}
