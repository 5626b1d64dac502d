"""What `pfedsam --help` says without importing the commands, and what light commands do not import."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.commands.listing import COMMANDS
from pfedsam.data.phantom import write_phantom

HEAVY = ("torch", "monai", "nvflare", "ignite", "pandas", "matplotlib", "scipy", "skimage", "sklearn")
#: Runs a command, then names the modules of a list that it has imported.
RUN = """
import sys
from pfedsam.cli import main
names, sys.argv = sys.argv[1].split(","), ["pfedsam", *sys.argv[2:]]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(*(name for name in names if name in sys.modules), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("light") / "data", sites=2, cases=3, shape=(32, 32, 6))[0]


@pytest.mark.parametrize(
    ("words", "kept_out"),
    [
        (["--help"], (*HEAVY, "numpy", "nibabel", "rich.progress", "pfedsam.commands.console")),
        (["--version"], (*HEAVY, "numpy", "rich.progress")),
        (["validate", "--help"], (*HEAVY, "numpy", "nibabel")),
        (["settings"], (*HEAVY, "numpy", "nibabel")),
        (["errors", "E07"], (*HEAVY, "numpy", "nibabel")),
        (["validate", "--quick"], tuple(name for name in HEAVY if name != "scipy")),  # nibabel's
    ],
    ids=" ".join,
)
def test_a_light_command_imports_no_heavy_library(words: list[str], kept_out: tuple[str, ...], site: Path) -> None:
    where = [str(site)] if "--quick" in words else []
    command = [sys.executable, "-c", RUN, ",".join(kept_out), *words, *where]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.split() == []


def test_the_help_says_what_the_commands_say() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, listed in COMMANDS.items():
        command = group.commands[name]
        first = (command.help or "").split("\n\n")[0]
        assert command.name == name and " ".join(first.split()) == listed.line
        assert getattr(command, "rich_help_panel", None) in (None, listed.panel)
        assert listed.line in shown and listed.panel in shown


def test_no_command_of_a_listed_module_is_left_out() -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    for module in {listed.module for listed in COMMANDS.values()}:
        parent = typer.Typer()
        parent.add_typer(import_module(f"pfedsam.commands.{module}").app)
        assert set(typer.main.get_group(parent).commands) <= set(group.commands)


def test_an_unknown_command_is_told_with_the_nearest_one() -> None:
    done = CliRunner().invoke(app, ["validat"])
    assert done.exit_code == 2 and "validate" in done.output
