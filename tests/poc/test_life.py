"""The life of a federation in one script: two hospitals, one joins late, one is removed, certificates run out.

Real processes, real certificates, real commands of NVFlare and of ours. What each step proved is printed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from deployed import FEDERATION, PROJECT, Federation, free_port, wait_for
from nvflare.lighter.utils import Identity, generate_cert, serialize_cert

from pfedsam.data.phantom import write_phantom
from pfedsam.deployment.admin import connect, fetch, follow, submit
from pfedsam.deployment.processes import OUTCOME_VARIABLE, Deployment
from pfedsam.deployment.site_check import check_kit
from pfedsam.errors import PFedSAMError
from pfedsam.federated.records import SITES_FILE
from pfedsam.files import read_lines

pytestmark = pytest.mark.slow
FIRST, SECOND, LATE = "hospital-a", "hospital-b", "hospital-late"
THEIRS = "it@hospital-b.org"
#: Seconds that the first certificate of a hospital is good for: the start of its process and one connection.
SHORT = 25
#: Seconds after which a site that is let in has long been so: some 5 on a machine that does nothing else.
AWAY = 20


class Life:
    """The deployment, who does what in it, and what was proved."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.proved = folder, free_port(), []
        self.runtime = folder / "runtime"
        self.deployment = Deployment(self.runtime, PROJECT, self.port)
        self.project = self.runtime / "kits" / "pfedsam"
        self.authority = folder / "authority"
        self.started = time.monotonic()

    def prove(self, sentence: str) -> None:
        self.proved.append(sentence)
        print(f"{time.monotonic() - self.started:4.0f} s  {sentence}", flush=True)

    def call(self, *words: str) -> str:
        """A command as people type it, in the folder of the federation's paperwork."""
        module = {"nvflare": "nvflare.cli", "pfedsam": "pfedsam.cli"}[words[0]]
        home = {**os.environ, "HOME": str(self.folder), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", module, *words[1:]]
        done = subprocess.run(command, cwd=self.folder, env=home, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def kit_by_request(self, site: str) -> Path:
        """A kit whose key is made where it is used: request, approve, package."""
        where = self.folder / "paper" / site
        where.mkdir(parents=True, exist_ok=True)
        participant = {"name": site, "type": "client", "org": site.replace("-", "_")}
        (where / "site.yml").write_text(yaml.safe_dump({"name": "pfedsam", "participants": [participant]}))
        request = where / "request"
        self.call("nvflare", "cert", "request", "-p", str(where / "site.yml"), "--out", str(request), "--force")
        zipped = next(request.glob("*.request.zip"))
        approve = [
            "cert",
            "approve",
            str(zipped),
            "-c",
            str(self.authority),
            "--profile",
            str(self.authority / "profile.yml"),
        ]
        signed = where / f"{site}.signed.zip"
        self.call("nvflare", *approve, "--valid-days", "365", "--out", str(signed), "--force")
        fingerprint = _fingerprint(self.authority / "rootCA.pem")
        package = ["package", str(signed), "--request-dir", str(request), "--fingerprint", fingerprint]
        self.call("nvflare", *package, "-w", str(where / "kits"), "--force")
        kit = where / "kits" / "pfedsam" / "prod_00" / site
        assert (kit / "startup" / "client.key").stat().st_mode & 0o777 == 0o600
        return kit

    def start(self, *names: str) -> None:
        self.deployment.start(list(names), {OUTCOME_VARIABLE: "10"})

    def stop(self, name: str) -> None:
        self.deployment.kill(name, signal.SIGTERM)

    def registrations(self, site: str) -> int:
        """How often a site has been let in, by its own log: the server's list holds a lost site for two minutes."""
        log = self.deployment.log(site)
        return log.read_text(errors="replace").count("Successfully registered client") if log.exists() else 0

    def connects(self, site: str) -> None:
        """Start a site and wait until it is let in."""
        before = self.registrations(site)
        self.start(site)
        wait_for(lambda: self.registrations(site) > before, 60)

    def stays_away(self, site: str) -> None:
        """Start a site and see that it is not let in. Its log gives no reason if TLS refuses it: it waits for ever."""
        before = self.registrations(site)
        self.start(site)
        time.sleep(AWAY)
        assert self.registrations(site) == before
        self.stop(site)

    def pids(self, *names: str) -> dict[str, int]:
        return {name: min(one.pid for one in self.deployment.processes(name)) for name in names}


def _fingerprint(path: Path) -> str:
    from pfedsam.deployment.authority import fingerprint

    return fingerprint(path)


def _short_lived(life: Life, site: str, seconds: float) -> None:
    """Have the kit's certificate run out soon, signed by the federation's own root as all are."""
    root_key = serialization.load_pem_private_key((life.authority / "rootCA.key").read_bytes(), password=None)
    startup = life.deployment.kit(site) / "startup"
    key = serialization.load_pem_private_key((startup / "client.key").read_bytes(), password=None)
    now = datetime.now(timezone.utc)
    certificate = generate_cert(
        Identity(site, site.replace("-", "_")),
        Identity("pfedsam"),
        root_key,
        key.public_key(),
        not_valid_before=now - timedelta(days=360),
        not_valid_after=now + timedelta(seconds=seconds),
    )
    (startup / "client.crt").write_bytes(serialize_cert(certificate))


def _rounds(path: Path | None) -> list[dict[str, Any]]:
    """Who took part in each round, by the server's record."""
    return read_lines(path) if path else []


def test_two_hospitals_a_late_joiner_a_removed_site_and_certificates_that_run_out(tmp_path: Path) -> None:
    life = Life(tmp_path)
    life.call("pfedsam", "--version")
    data = write_phantom(tmp_path / "data", sites=3, cases=4, shape=(48, 48, 6))
    try:
        _live(life, dict(zip((FIRST, SECOND, LATE), data, strict=True)))
    finally:
        left = life.deployment.stop()
    assert left == []
    life.prove("nothing is left running")


def _live(life: Life, data: dict[str, Path]) -> None:
    life.deployment.provision()
    life.deployment.init({name: data[name] for name in (FIRST, SECOND)}, {"federations": [FEDERATION]})
    life.call("pfedsam", "certificates", "authority", str(life.project), str(life.authority))
    _short_lived(life, SECOND, SHORT)
    life.start(life.deployment.server, FIRST, SECOND)
    with connect(life.deployment.admin()) as session:
        life.deployment.wait(session)
        federation = Federation(life.deployment, data, session, life.folder)
        _a_certificate_runs_out(life)
        _the_root_is_renewed(life)
        _one_joins_while_a_job_runs(life, federation, data)
        _one_is_removed_while_a_job_runs(life, federation)
    _a_root_with_another_key_ends_access(life)


def _a_certificate_runs_out(life: Life) -> None:
    others = life.pids(life.deployment.server, FIRST)
    kit = life.deployment.kit(SECOND)
    (wrong,) = [one for one in check_kit(kit) if one.name == "certificate" and one.message.startswith("client.crt")]
    assert not wrong.fine
    wait_for(lambda: "it has ended" in _said(kit), SHORT + 5)
    life.stop(SECOND)
    life.stays_away(SECOND)
    life.prove(f"{SECOND} cannot connect when its certificate has run out, and `site check` says so")
    life.call("pfedsam", "site", "renew", str(kit), str(life.kit_by_request(SECOND)))
    life.connects(SECOND)
    assert all(one.fine for one in check_kit(kit) if one.name in ("certificate", "private key"))
    assert life.pids(life.deployment.server, FIRST) == others
    life.prove(f"{SECOND} connects with a renewed certificate whose key it made itself; nobody else was stopped")


def _said(kit: Path) -> str:
    return " ".join(one.message for one in check_kit(kit) if one.name == "certificate")


def _the_root_is_renewed(life: Life) -> None:
    server = life.pids(life.deployment.server, SECOND)
    life.call("pfedsam", "certificates", "root", str(life.authority))
    life.call("pfedsam", "site", "renew", str(life.deployment.kit(FIRST)), str(life.authority / "rootCA.pem"))
    life.stop(FIRST)
    life.connects(FIRST)
    assert life.pids(life.deployment.server, SECOND) == server
    life.prove(f"{FIRST} with the renewed root talks to the server that has the old one; nobody else was stopped")


def _one_joins_while_a_job_runs(life: Life, federation: Federation, data: dict[str, Path]) -> None:
    kit = life.deployment.kit(LATE)
    shutil.copytree(life.kit_by_request(LATE), kit)
    told = ["--data-root", str(data[LATE]), "--state-root", str(life.deployment.state_root(LATE))]
    policy = ["--federations", FEDERATION, "--least-sites", "1", "--least-validation-cases", "1"]
    life.call("pfedsam", "site", "init", str(kit), *told, *policy)
    grown = yaml.safe_load(PROJECT.read_text())
    grown["participants"].append({"name": LATE, "type": "client", "org": "hospital_late"})
    project = life.folder / "grown.yml"
    project.write_text(yaml.safe_dump(grown))
    job_id = submit(federation.session, federation.job("before", rounds=2))
    wait_for(lambda: "round 0, phase" in federation.log_of(FIRST, job_id), 120)
    life.deployment = federation.deployment = Deployment(life.runtime, project, life.port)
    life.connects(LATE)
    follow(federation.session, job_id, timeout=180)
    result = fetch(federation.session, job_id, life.folder / "results")
    assert result.completed, result.problem()
    assert {site for record in _rounds(result.file(SITES_FILE)) for site in record["sites"]} == {FIRST, SECOND}
    life.prove(f"{LATE} connected while a job of two ran; the job went on to its end without it")


def _one_is_removed_while_a_job_runs(life: Life, federation: Federation) -> None:
    session = federation.session
    job_id = submit(session, federation.job("with-three", rounds=3, min_clients=2))
    record = life.deployment.kit(life.deployment.server) / job_id / SITES_FILE
    wait_for(lambda: bool(_rounds(record)), 120)
    session.disable_client(SECOND)
    follow(session, job_id, timeout=300)
    result = fetch(session, job_id, life.folder / "results")
    records = {one["round"]: one for one in _rounds(result.file(SITES_FILE))}
    assert set(records[0]["sites"]) == {FIRST, SECOND, LATE}
    assert records[2]["sites"] == [FIRST, LATE] and records[2]["missing"] == [SECOND], records
    life.prove(f"{LATE} took part in the next job; {SECOND}, disabled in the middle, counted no more")
    states = federation.states()
    assert {FIRST, LATE} <= set(states) and all(states[site].info["final"] for site in (FIRST, LATE))
    life.prove("the personal models of the two that stayed are whole")
    assert "has disabled this site" in federation.log_of(SECOND, job_id)
    assert not states[SECOND].info["final"], "it was sent the last global model"
    life.prove(f"{SECOND} was sent no model any more, and its log says why")
    life.stop(SECOND)
    life.stays_away(SECOND)
    life.prove(f"{SECOND} cannot connect again while it is disabled")
    with connect(life.deployment.kit(THEIRS), timeout=10):
        life.prove(f"a disabled site's people are not kept out: {THEIRS} still logs in")
    session.enable_client(SECOND)


def _a_root_with_another_key_ends_access(life: Life) -> None:
    life.deployment.stop()
    life.call("pfedsam", "certificates", "renew", str(life.project), "--root")
    life.call(
        "nvflare", "provision", "-p", str(life.runtime / "project.yml"), "-w", str(life.project.parent), "--force"
    )
    for name in (life.deployment.server, FIRST, life.deployment.admin().name):
        startup = life.deployment.kit(name) / "startup"
        shutil.rmtree(startup)
        shutil.copytree(life.project / "prod_01" / name / "startup", startup)
    life.start(life.deployment.server)
    life.connects(FIRST)
    life.stays_away(SECOND)
    with pytest.raises(PFedSAMError, match="E22"), connect(life.deployment.kit(THEIRS), timeout=5):
        pass
    life.prove(
        f"with a root of another key {FIRST} is back and {SECOND}, which has its old kit, is not, nor are its people"
    )
