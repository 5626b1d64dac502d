"""Pages in a real browser: Debian's chromium, with axe-core and puppeteer from npm."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

InBrowser = Callable[[Path], dict[str, Any]]


@pytest.fixture(scope="session")
def in_browser(tmp_path_factory: pytest.TempPathFactory) -> InBrowser:
    """Opens a page on a laptop and on a phone, in light and in dark; no view of it may have a serious finding.

    What is returned are the script's findings, `keys` among them: what the keyboard reaches and does.
    """
    browser = shutil.which("chromium")
    if not (browser and shutil.which("npm")):
        pytest.skip("chromium or npm is not installed: apt install chromium nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    subprocess.run(["npm", "install", "--silent", "axe-core@4", "puppeteer-core@24"], cwd=folder, check=True)
    shutil.copy(Path(__file__).with_name("browser.js"), folder)

    def opened(page: Path) -> dict[str, Any]:
        line = ["node", "browser.js", browser, str(page)]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["errors"] == found["requests"] == []
        assert len(found["views"]) == 4
        for view in found["views"]:
            assert view["broken"] == 0
            assert not view["wider_than_the_window"], view["name"]
            assert [one for one in view["violations"] if one["impact"] in ("serious", "critical")] == []
        return found

    return opened
