"""Server and sites as real processes on this machine: provisioned, with mutual TLS on loopback."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from nvflare.fuel.flare_api.flare_api import Session

from pfedsam.deployment.kits import init_kit
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.federated.settings import SITE_SETTINGS, SiteSettings, read_settings, site_folder
from pfedsam.storage.run_folder import claim_run, is_deployment

#: What the marker of a deployment's folder says.
RUNTIME = "poc"
_GRACE_SECONDS = 10
#: Seconds that a job waits, after its last workflow, for what its sites say of their end; NVFlare's own value is 900.
OUTCOME_VARIABLE, OUTCOME_SECONDS = "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT", "60"
#: Less memory for server and sites (`tests/benchmarks/bench_sites.py`). By default NVFlare allocates a chunk of
#: 1 MiB, more than a payload, for each message that it sends, however small, and each array is asked for; with a
#: download chunk of 0 they travel in the message itself. Window and interval keep NVFlare's proportions: 64 and 16
#: chunks. glibc keeps freed memory in up to 8 arenas a core.
MEMORY = {
    "NVFLARE_STREAMING_CHUNK_SIZE": "65536",
    "NVFLARE_STREAMING_WINDOW_SIZE": "4194304",
    "NVFLARE_STREAMING_ACK_INTERVAL": "1048576",
    "NVFLARE_NP_DOWNLOAD_CHUNK_SIZE": "0",
    "MALLOC_ARENA_MAX": "1",
}
#: The server gives large blocks back at once. A site must not: it would ask the system for the memory of every tensor
#: anew, and a training step would take 1.7 times as long (`tests/benchmarks/bench_speed.py`).
SERVER_MEMORY = {**MEMORY, "MALLOC_TRIM_THRESHOLD_": "131072"}

#: Settings of sites that are all on this machine: nothing leaves it.
_ONE_MACHINE = {"least_sites": 1, "least_validation_cases": 1, "curves": True}


@dataclass
class Deployment:
    """A provisioned project whose participants all run on this machine.

    Args:
        root: folder of everything that is generated: kits, HOME, logs, states.
        project: NVFlare project file.
        port: of the server, in place of the project's own.
    """

    root: Path
    project: Path
    port: int | None = None
    _content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self._content = yaml.safe_load(self.project.read_text())
        server = self._of("server")[0]
        self.port = self.port or int(server["fed_learn_port"])
        server["fed_learn_port"] = self.port

    @property
    def server(self) -> str:
        """Name of the server."""
        return str(self._of("server")[0]["name"])

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return [str(participant["name"]) for participant in self._of("client")]

    def admin(self, role: str = "project_admin") -> Path:
        """Kit of the first administrator with a role."""
        return self.kit(
            next(str(participant["name"]) for participant in self._of("admin") if participant["role"] == role)
        )

    def kit(self, name: str) -> Path:
        """Startup kit of a participant."""
        return self.root / "kits" / self._content["name"] / "prod_00" / name

    def state_root(self, site: str) -> Path:
        """Where a site keeps its personal state: each has a root of its own."""
        return self.root / "states" / site

    def log(self, name: str) -> Path:
        """What a process printed."""
        return self.root / "logs" / f"{name}.log"

    def data(self) -> dict[str, Path]:
        """The site folder of each site, by its own policy.

        Raises:
            PFedSAMError: E01 if a policy names none, E02 if there is none.
        """
        folders = {}
        for site in self.sites:
            path = self.kit(site) / "local" / SITE_SETTINGS
            root = read_settings(path).data_root
            if root is None:
                raise PFedSAMError(ErrorCode.SITE_SETTINGS, f"{path} names no data.", "Start with `pfedsam poc up`.")
            folders[site] = site_folder(root, site)
        return folders

    def claim(self, force: bool = False) -> bool:
        """Mark the folder as ours, or see that it is.

        Args:
            force: take a folder of somebody else, too.

        Returns:
            Whether an earlier version made it, which knew no marker.

        Raises:
            PFedSAMError: E24 if it is somebody else's: root keys of a federation may lie there.
        """
        return claim_run(self.root, RUNTIME, is_deployment, force)

    def provision(self) -> None:
        """Make the startup kits anew, in a folder that is ours.

        Raises:
            PFedSAMError: E24 as `claim`, E22 with NVFlare's last line if it fails.
        """
        self.claim()
        shutil.rmtree(self.root / "kits", ignore_errors=True)
        for name in ("home", "logs"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        project = self.root / "project.yml"
        project.write_text(yaml.safe_dump(self._content, sort_keys=False))
        command = ["-m", "nvflare.cli", "provision", "-p", str(project), "-w", str(self.root / "kits"), "--force"]
        done = subprocess.run([sys.executable, *command], env=self._environment(MEMORY), capture_output=True, text=True)
        if done.returncode or not self.kit(self.server).is_dir():
            said = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise PFedSAMError(
                ErrorCode.DEPLOYMENT, f"provisioning of {self.project} failed: {said}.", "Mend the project file."
            )

    def init(self, data: Mapping[str, Path], settings: Mapping[str, Any] | None = None, byoc: bool = False) -> None:
        """Write the policy of the server and of every site.

        All of them are on this machine: any number of sites and of validation cases is enough, and curves are sent.

        Args:
            data: site folder of each site.
            settings: more of `SiteSettings`, for every site.
            byoc: let jobs carry code.
        """
        init_kit(self.kit(self.server), SiteSettings(), byoc=byoc)
        for site in self.sites:
            site_settings = {
                "data_root": str(data[site].resolve()),
                "state_root": str(self.state_root(site)),
                **_ONE_MACHINE,
                **(settings or {}),
            }
            init_kit(self.kit(site), SiteSettings.model_validate(site_settings), byoc=byoc)

    def require_free_port(self) -> None:
        """Refuse to start on a port that is taken.

        Raises:
            PFedSAMError: E22 naming the port.
        """
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", int(self.port or 0)))
            except OSError:
                raise PFedSAMError(
                    ErrorCode.DEPLOYMENT,
                    f"port {self.port} is taken.",
                    "Stop what uses it, or choose another with --port.",
                ) from None

    def start(self, names: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Start participants, by default the server and all sites. They go on when this process ends.

        Raises:
            PFedSAMError: E22 if the server is to be started and its port is taken.
        """
        names = [self.server, *self.sites] if names is None else names
        if self.server in names:
            self.require_free_port()
        for name in names:
            self._start(name, environment or {})

    def wait(self, session: Session, timeout: float = 90.0) -> None:
        """Wait until every site is connected.

        Raises:
            PFedSAMError: E22 naming the sites that are missing.
        """
        until = time.monotonic() + timeout
        while True:
            missing = set(self.sites) - {client.name for client in session.get_connected_client_list()}
            if not missing:
                return
            if time.monotonic() > until:
                logs = ", ".join(str(self.log(name)) for name in sorted(missing))
                raise PFedSAMError(
                    ErrorCode.DEPLOYMENT, f"not connected after {timeout:.0f} s: {sorted(missing)}.", f"See {logs}."
                )
            time.sleep(0.5)

    def processes(self, name: str | None = None) -> list[psutil.Process]:
        """What runs of a participant, or of all, with everything that these processes started.

        They are found by their command lines, which name the kit: also a job process whose parent is gone, or one that
        another call has started.
        """
        folder = self.root if name is None else self.kit(name)
        me = psutil.Process()
        spared = {me, *me.parents()}
        running: dict[psutil.Process, None] = {}
        for process in psutil.process_iter(["cmdline", "uids"]):
            if process in spared or not _is_nvflare(process, folder):
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                running |= dict.fromkeys([process, *process.children(recursive=True)])
        return [process for process in running if process not in spared]

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """End a participant and its job processes at once, as a power cut would."""
        running = self.processes(name)
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        psutil.wait_procs(running, timeout=_GRACE_SECONDS)

    def stop(self) -> list[int]:
        """End every process of this deployment, whoever started it: politely, then by force.

        Returns:
            Pids that are still there (none, if all went well).
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            # looked for again: one may have been started in the meantime
            running = self.processes()
            for process in running:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
            psutil.wait_procs(running, timeout=_GRACE_SECONDS)
        return [process.pid for process in self.processes()]

    def _of(self, kind: str) -> list[dict[str, Any]]:
        return [participant for participant in self._content["participants"] if participant["type"] == kind]

    def _start(self, name: str, environment: Mapping[str, str]) -> None:
        kit = self.kit(name)
        server = name == self.server
        kind, module = ("server", "server_train") if server else ("client", "client_train")
        org = next(participant["org"] for participant in self._content["participants"] if participant["name"] == name)
        arguments = ["secure_train=true", f"org={org}", "config_folder=config", *([] if server else [f"uid={name}"])]
        (kit / "transfer").mkdir(exist_ok=True)
        command = [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{kind}.{module}"]
        command += ["-m", str(kit), "-s", f"fed_{kind}.json", "--set", *arguments]
        with self.log(name).open("a") as log:
            # a session of its own: Ctrl-C in the terminal is for us, who then stop them in order
            variables = {**(SERVER_MEMORY if server else MEMORY), **(environment or {})}
            how: dict[str, Any] = {"env": self._environment(variables), "start_new_session": True}
            subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **how)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        variables = {
            OUTCOME_VARIABLE: OUTCOME_SECONDS,
            "HOME": str(self.root / "home"),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": self._threads(),
        }
        # NVFlare starts the job processes with the python of the path
        variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **variables, **more}

    def _threads(self) -> str:
        return str(max(1, (os.cpu_count() or 1) // max(1, len(self.sites))))


def _is_nvflare(process: psutil.Process, folder: Path) -> bool:
    """Whether a process of this user runs a module of NVFlare on something in a folder; not one that reads a log."""
    command, uids = process.info["cmdline"] or (), process.info["uids"]
    if uids is None or uids.real != os.getuid():
        return False
    below = re.compile(re.escape(str(folder)) + r"(/|$)")
    return any(word.startswith("nvflare.") for word in command) and any(below.match(word) for word in command)
