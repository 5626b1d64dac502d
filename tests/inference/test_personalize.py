"""A new hospital: experts are fitted beside a global model, and the table says what was gained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pfedsam.bundle_tools.verify import tiny_site
from pfedsam.cli import app
from pfedsam.commands.federation import DEMO_OVERRIDES
from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.ownership import claim


def test_a_site_whose_labels_the_bundle_does_not_know_is_refused(model: Path, tmp_path: Path) -> None:
    site = tiny_site(tmp_path / "site", 2, rgb=False)
    words = ["personalize", str(site), "--global", str(model), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E07"


@pytest.mark.parametrize("command", ["personalize", "evaluate"])
def test_a_folder_of_somebody_else_is_used_by_force_only(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("mine")
    words = {"personalize": [command, "site", "--global", "none"], "evaluate": [command, "site", "none"]}[command]
    done = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24"
    assert [path.name for path in out.iterdir()] == ["results.json"]
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--force"])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code in ("E10", "E13")


def test_a_personal_model_that_is_there_is_replaced_by_force_only(tmp_path: Path) -> None:
    claim(tmp_path / "out", "personal model")
    (tmp_path / "out" / "model.safetensors").write_text("weeks of training")
    done = CliRunner().invoke(app, ["personalize", "site", "--global", "none", "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24"


#: With the present rates and one adapted block the global model finds nothing at the most shifted site (Dice 0.002),
#: and 5 cases do not change that. Strict: it tells when they do.
NOTHING_TO_START_FROM = pytest.mark.xfail(
    raises=AssertionError, strict=True, reason="a global model that finds nothing"
)


@pytest.mark.slow
@pytest.mark.parametrize("site", [2, pytest.param(3, marks=NOTHING_TO_START_FROM)])
def test_five_cases_of_an_unseen_site_gain_over_the_global_model(site: int, tmp_path: Path) -> None:
    """Real weights: three phantom sites train, the other makes its personal model of 5 cases."""
    sites = write_phantom(tmp_path / "phantom", sites=4, cases=9, shape=(96, 96, 12))
    data = tmp_path / "data"
    data.mkdir()
    unseen = sites.pop(site)
    for other in sites:
        other.rename(data / other.name)
    told = {"image_size": 64, **DEMO_OVERRIDES}
    settings = [word for key, value in told.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    run = [sys.executable, "-m", "pfedsam.cli"]
    subprocess.run(
        [*run, "simulate", str(data), "--out", str(tmp_path / "run"), "--rounds", "6", *settings], check=True
    )
    model = tmp_path / "run" / "global_model.safetensors"
    command = [
        *run,
        "personalize",
        str(unseen),
        "--global",
        str(model),
        "--cases",
        "5",
        "--out",
        str(tmp_path / "own"),
    ]
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    found = json.loads((tmp_path / "own" / "results.json").read_text())["sites"][unseen.name]
    print(f"unseen site: global {found['dice_global']:.3f}, personal {found['dice_personal']:.3f}")
    assert "gain" in done.stdout
    assert found["dice_personal"] > found["dice_global"]
