"""The viewer's page in a real browser, as a person uses it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedsam.data.reader import load_picture
from pfedsam.storage.site_model import read, write
from pfedsam.viewer.grid import Grid
from pfedsam.viewer.server import ViewerServer
from pfedsam.viewer.session import Session
from pfedsam.viewer.subjects import subjects_of

pytestmark = pytest.mark.slow
Serve = Callable[[Session], ViewerServer]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and what it needs. Needs Debian's chromium (`apt install chromium nodejs npm`)."""
    if not (shutil.which("chromium") and shutil.which("npm")):
        pytest.skip("chromium or npm is not installed: apt install chromium nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    subprocess.run(["npm", "install", "--silent", "axe-core@4", "puppeteer-core@24"], cwd=folder, check=True)
    shutil.copy(Path(__file__).with_name("browser.js"), folder)
    return folder


def use(node: Path, server: ViewerServer, pictures: Path, **wanted: Any) -> dict[str, Any]:
    """What the script tells; the screenshots are in `pictures`."""
    line = ["node", "browser.js", shutil.which("chromium") or "", server.address, str(pictures), json.dumps(wanted)]
    done = subprocess.run(line, cwd=node, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == found["requests"] == []
    for view in found["views"]:
        assert not view["wider_than_the_window"], view["name"]
        assert [one for one in view["violations"] if one["impact"] in ("serious", "critical")] == []
    assert found["status"] == "" and found["back"] and found["zoomed"] and found["whole"]
    return found


def copied(site: Path, to: Path, *without: str) -> Path:
    """A site of its own, with some labels away."""
    shutil.copytree(site, to)
    for name in without:
        (to / "labels" / name).unlink()
    return to


def test_a_volume(node: Path, site: Path, brain_model: Path, serve: Serve, tmp_path: Path) -> None:
    mine = copied(site, tmp_path / "mine")
    image = mine / "images" / "one.nii.gz"
    found = use(
        node, serve(Session(subjects_of(image, brain_model))), tmp_path, box=True, probability="probability-personal-1"
    )
    assert set(found["seen"]) == {
        *("truth", "global", "personal", "difference-global", "difference-personal", "probability")
    }
    assert all(found["seen"].values()) and "lesion" in found["scores"]
    first, second = (int(text.split()[0]) for text in found["slices"])
    assert second == first + 1
    # the box lies around the middle, in the slice that was shown
    assert found["box"] == "" and "box" in found["scored"]
    x0, x1, y0, y1, z0, z1 = found["corners"]
    shape = Grid.of(load_picture(image)).shown_shape
    assert x0 < shape[0] / 2 < x1 and y0 < shape[1] / 2 < y1 and z0 == z1 == first
    # the case has a label, so the correction lies beside it
    saved = mine / "corrections" / "one.nii.gz"
    assert str(saved) in found["saved"] and saved.stat().st_mode & 0o777 == 0o600
    drawn = Grid.of(load_picture(image)).shown(load_picture(saved, label=True).values)
    at = np.argwhere(drawn)
    assert set(at[:, 2]) == {first - 1} and np.ptp(at[:, 0]) >= 4 and np.ptp(at[:, 1]) <= 3


def test_a_picture(node: Path, eyes: Path, eye_model: Path, serve: Serve, tmp_path: Path) -> None:
    mine = copied(eyes, tmp_path / "mine", "eye.png")
    found = use(node, serve(Session(subjects_of(mine / "images" / "eye.png", eye_model))), tmp_path)
    assert found["seen"] == {"global": True, "personal": True} and "pixels" in found["scores"]
    saved = mine / "labels" / "eye.png"
    assert str(saved) in found["saved"]
    drawn = load_picture(saved, label=True).values
    at = np.argwhere(drawn)
    assert np.ptp(at[:, 0]) >= 5 and np.ptp(at[:, 1]) <= 3 and abs(at[:, 1].mean() - 29.5) <= 2


def test_an_empty_prediction_is_visibly_empty(
    node: Path, eyes: Path, eye_model: Path, serve: Serve, tmp_path: Path
) -> None:
    blind = read(eye_model)
    for name, tensor in blind.shared.items():
        if "hyper" in name:
            # every logit is 0 then, so nothing is more probable than one half
            blind.shared[name] = tensor * 0
    write(tmp_path / "blind.safetensors", blind)
    found = use(
        node, serve(Session(subjects_of(eyes / "images" / "eye.png", tmp_path / "blind.safetensors"))), tmp_path
    )
    assert found["seen"] == {
        **{"truth": True, "global": False, "personal": False},
        **{"difference-global": True, "difference-personal": True},
    }
    assert found["scores"].count("0.00 (empty)") == 4
