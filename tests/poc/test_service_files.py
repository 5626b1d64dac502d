"""The service files of the guide: what a site writes is closed to other users of the machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

FILES = Path(__file__).resolve().parents[2] / "poc_workspace"


def test_the_container_starts_the_site_with_a_closed_umask(tmp_path: Path) -> None:
    (line,) = [one for one in (FILES / "site" / "Dockerfile").read_text().splitlines() if one.startswith("ENTRYPOINT")]
    start = tmp_path / "sub_start.sh"
    start.write_text('umask; echo "$@"\n')
    command = [word.replace("/kit/startup/sub_start.sh", str(start)) for word in json.loads(line.split(" ", 1)[1])]
    said = subprocess.run([*command, "--verify"], capture_output=True, text=True, check=True).stdout
    assert said == "0077\n--once --verify\n"


def test_the_services_have_a_closed_umask() -> None:
    for name in ("site/pfedsam-site.service", "server/pfedsam-server.service"):
        assert "UMask=0077" in (FILES / name).read_text().splitlines()
