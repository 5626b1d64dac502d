"""The container of a site ends as the service does, and loses no state with a forgotten mount."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from service import FILES

DOCKERFILE = (FILES / "site" / "Dockerfile").read_text()


def entry_point(kit: Path, script: str) -> subprocess.Popen[str]:
    """The container's command, on a kit that starts a script in NVFlare's place."""
    (kit / "startup").mkdir(parents=True)
    (kit / "startup" / "sub_start.sh").write_text(script)
    (words,) = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    return subprocess.Popen([word.replace("/kit/", f"{kit}/") for word in json.loads(words)], text=True)


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("touch restart.fl; exit 0", 75), ("touch shutdown.fl; exit 0", 0)],
)
def test_a_restart_of_the_console_starts_the_container_again_and_a_shutdown_does_not(
    tmp_path: Path, script: str, code: int
) -> None:
    assert entry_point(tmp_path / "kit", f'cd "{tmp_path / "kit"}"\n{script}\n').wait(30) == code


def test_a_stop_of_the_container_reaches_what_runs_in_it(tmp_path: Path) -> None:
    kit, told = tmp_path / "kit", tmp_path / "told"
    # as NVFlare's script does: the shell becomes the program
    process = entry_point(kit, f"touch {told}\nexec sleep 60\n")
    while not told.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM


def test_a_mount_that_was_forgotten_is_no_folder_of_the_container() -> None:
    assert not re.search(r"^VOLUME", DOCKERFILE, re.MULTILINE)
    # a layer with the wheelhouse would stay in the image
    assert not re.search(r"^(COPY|ADD) wheelhouse", DOCKERFILE, re.MULTILINE)
    assert re.search(r"^USER pfedsam$", DOCKERFILE, re.MULTILINE)
