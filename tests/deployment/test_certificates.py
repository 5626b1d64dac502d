"""Certificates: when they end, and a renewal that NVFlare's own provisioning really follows."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.certificates import ROOT, STATE_FILE, of_kit, of_project, renew
from pfedsam.deployment.kits import init_kit
from pfedsam.deployment.site_check import check_kit
from pfedsam.errors import PFedSAMError
from pfedsam.federated.settings import SiteSettings

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
SITES, SERVER = ("hospital-a", "hospital-b"), "localhost"


class Workspace:
    """What the project administrator has: each provisioning is a new folder `prod_<number>` beside the last."""

    def __init__(self, root: Path) -> None:
        self.root, self.project = root, root / yaml.safe_load(PROJECT.read_text())["name"]

    def provision(self) -> None:
        command = [
            sys.executable,
            "-m",
            "nvflare.cli",
            "provision",
            "-p",
            str(PROJECT),
            "-w",
            str(self.root),
            "--force",
        ]
        home = {"HOME": str(self.root), "PATH": os.environ["PATH"]}
        subprocess.run(command, env=home, check=True, capture_output=True)

    def kit(self, name: str) -> Path:
        return max(self.project.glob("prod_*")) / name

    def serials(self) -> dict[str, int]:
        kits = {name: of_kit(self.kit(name)) for name in (SERVER, *SITES)}
        return {f"{name}/{one.name}": one.serial for name, found in kits.items() for one in found}


@pytest.fixture(scope="module")
def provisioned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("provisioned"))
    made.provision()
    return made


@pytest.fixture
def workspace(provisioned: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(provisioned.root, tmp_path / "workspace")))


def ending(project: Path, name: str, left: timedelta) -> str:
    """Have a certificate of the project end soon, signed by the project's own root as all are; returns it."""
    path = project / STATE_FILE
    content = json.loads(path.read_text())
    old = x509.load_pem_x509_certificate(content[name]["cert"].encode())
    key = serialization.load_pem_private_key(content["root_pri_key"].encode(), password=None)
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=400)).not_valid_after(now + left)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    new = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    content[name]["cert"] = new.public_bytes(serialization.Encoding.PEM).decode()
    path.write_text(json.dumps(content))
    return str(content[name]["cert"])


def test_a_renewal_makes_new_certificates_of_those_that_end_and_leaves_all_others(workspace: Workspace) -> None:
    first, second = SITES
    ending(workspace.project, first, timedelta(days=20))
    workspace.provision()
    before = workspace.serials()
    workspace.provision()
    assert workspace.serials() == before, "NVFlare renews nothing by itself"
    assert [one.name for one in renew(workspace.project)] == [first]
    for kept in ("cert.json", "cert.json.before"):
        assert stat.S_IMODE((workspace.project / "state" / kept).stat().st_mode) == 0o600
    workspace.provision()
    after = workspace.serials()
    assert {name for name in after if after[name] != before[name]} == {f"{first}/client"}
    (renewed,) = [one for one in of_kit(workspace.kit(first)) if one.name == "client"]
    assert renewed.days > 300 and after[f"{second}/{ROOT}"] == before[f"{first}/{ROOT}"]


def test_a_new_root_renews_everything(workspace: Workspace) -> None:
    before = workspace.serials()
    renewed = renew(workspace.root, root=True)
    assert {ROOT, SERVER, *SITES} <= {one.name for one in renewed}
    workspace.provision()
    after = workspace.serials()
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


def test_a_renewal_names_who_is_unknown_and_writes_nothing(workspace: Workspace) -> None:
    kept = (workspace.project / STATE_FILE).read_bytes()
    with pytest.raises(PFedSAMError, match=r"E28: .* no certificate of .*nobody"):
        renew(workspace.project, ["nobody"])
    assert renew(workspace.project) == [] and (workspace.project / STATE_FILE).read_bytes() == kept
    with pytest.raises(PFedSAMError, match="E32: the root certificate"):
        renew(workspace.project, within=100_000)
    with pytest.raises(PFedSAMError, match=r"E01: .* no provisioned project"):
        of_project(workspace.kit(SERVER))


def test_a_site_is_warned_of_the_end_of_its_certificates(workspace: Workspace) -> None:
    site, told = SITES[0], {}
    kit = workspace.kit(site)
    init_kit(kit, SiteSettings())
    for days in (59, 10, -1):
        (kit / "startup" / "client.crt").write_text(ending(workspace.project, site, timedelta(days=days, hours=1)))
        lines = [one for one in check_kit(kit) if one.name == "certificate" and "client.crt" in one.message]
        told[days] = [(one.fine, one.warning, "certificates renew" in one.message) for one in lines]
        shown = CliRunner().invoke(app, ["certificates", "show", str(kit)])
        assert shown.exit_code == 1 and ("it has ended" in shown.output) == (days < 0)
    assert told == {59: [(True, True, True)], 10: [(False, True, True)], -1: [(False, True, True)]}


def test_the_command_says_what_it_renews_and_what_comes_next(workspace: Workspace) -> None:
    done = CliRunner().invoke(app, ["certificates", "renew", str(workspace.project), SITES[0]])
    assert done.exit_code == 0 and f"{SITES[0]}: ends" in done.output and "nvflare provision" in done.output
    assert "pfedsam site renew <kit> <new kit>" in done.output
    nothing = CliRunner().invoke(app, ["certificates", "renew", str(workspace.project)])
    assert nothing.exit_code == 0 and "nothing in" in nothing.output
