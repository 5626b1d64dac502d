"""The service files of the guide: closed to other users, started again when they shall be, with our waits."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from service import FILES, settings

from pfedsam.deployment.processes import OUTCOME_SECONDS, OUTCOME_VARIABLE

UNITS = (FILES / "site" / "pfedsam-site.service", FILES / "server" / "pfedsam-server.service")


def test_the_container_starts_the_site_with_a_closed_umask(tmp_path: Path) -> None:
    (line,) = [one for one in (FILES / "site" / "Dockerfile").read_text().splitlines() if one.startswith("ENTRYPOINT")]
    start = tmp_path / "sub_start.sh"
    start.write_text('umask; echo "$@"\n')
    command = [word.replace("/kit/startup/sub_start.sh", str(start)) for word in json.loads(line.split(" ", 1)[1])]
    said = subprocess.run([*command, "--verify"], capture_output=True, text=True, check=True).stdout
    assert said == "0077\n--once --verify\n"


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_the_services_have_a_closed_umask(unit: Path) -> None:
    assert settings(unit)["UMask"] == ["0077"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("leaves", "code", "ends_with"),
    [("restart.fl", 0, 75), ("shutdown.fl", 0, 0), ("", 0, 0), ("", 3, 3), ("restart.fl", 3, 75)],
)
def test_a_service_fails_when_the_console_asked_for_a_restart_and_ends_when_it_asked_for_the_end(
    unit: Path, leaves: str, code: int, ends_with: int, tmp_path: Path
) -> None:
    """By the rule `on-failure` systemd starts a service again that ends with another code than 0."""
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    start = kit / "startup" / "sub_start.sh"
    leave = f'touch "{kit / leaves}"' if leaves else ":"
    start.write_text(f'#!/bin/bash\n[ "$1" = --once ] || exit 9\n{leave}\nexit {code}\n')
    start.chmod(0o755)
    found = settings(unit, {"/opt/pfedsam/kit": str(kit)})
    (command,) = found["ExecStart"]
    assert found["Restart"] == ["on-failure"]
    assert subprocess.run(shlex.split(command.replace("$$", "$"))).returncode == ends_with


def test_a_job_at_the_server_waits_as_long_for_lost_sites_as_on_this_machine() -> None:
    site, server = (settings(unit)["Environment"] for unit in UNITS)
    assert f"{OUTCOME_VARIABLE}={OUTCOME_SECONDS}" in server
    assert not [one for one in site if one.startswith(OUTCOME_VARIABLE)], "a site waits for nobody"


def test_lost_jobs_are_closed_before_the_server_starts_and_a_failure_of_that_does_not_stop_it() -> None:
    (command,) = settings(UNITS[1])["ExecStartPre"]
    assert command == "-/opt/pfedsam/venv/bin/pfedsam job close --all --kit /opt/pfedsam/kit"


def test_systemd_takes_the_service_files(tmp_path: Path) -> None:
    """Where there is no systemd, its own check cannot be made; every line is a setting or a section anyway."""
    places = {"/opt/pfedsam/venv/bin/pfedsam": "/bin/true", "User=pfedsam": "User=root", "Group=pfedsam": "Group=root"}
    for unit in UNITS:
        text = unit.read_text()
        for place, own in places.items():
            text = text.replace(place, own)
        (tmp_path / unit.name).write_text(text)
        lines = [one for one in text.splitlines() if one and not one.startswith("#")]
        assert all("=" in one or one in ("[Unit]", "[Service]", "[Install]") for one in lines)
        if shutil.which("systemd-analyze"):
            check = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)]
            done = subprocess.run(check, capture_output=True, text=True)
            assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
