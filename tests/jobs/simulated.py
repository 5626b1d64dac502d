"""Runs of the checked-in job in NVFlare's simulator, each with its own home, workspace and state root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import recorder
from recorder import Item, Needles

from pfedsam.training.catalogue import find_strategy

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCE = ROOT / "jobs" / "pfedsam"
#: A network and batches small enough for a test.
TINY = {"backbone": "vit_test", "image_size": 64, "batch_size": 4}
FEDERATION = "phantom-demo"
BUNDLE = "brain_lesion_mri"
JOB_ID = "simulate_job"
#: Of the checked-in job; that of the tests' jobs, too.
INTERPOLATION = find_strategy("pfedsam").checked().interpolation
#: Seconds after which a run is stopped.
LIMIT = 900


def component(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A component of a configuration, by its id."""
    return next(one for one in config["components"] if one["id"] == name)


@dataclass
class Job:
    """The checked-in job with other settings: with a local phase in each round, so that a site always has a state.

    Attributes:
        sites: number of sites.
        recorded: whether the server records and the sites copy their states.
        special: configurations of single sites; a site without one has `client`.
        plan, special_plans: what the plan says, for all and for single sites.
        source: folder of the job.
    """

    sites: int = 2
    recorded: bool = True
    special: dict[str, dict[str, Any]] = field(default_factory=dict)
    special_plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    custom: dict[str, bytes] = field(default_factory=dict)
    source: Path = SOURCE

    def __post_init__(self) -> None:
        self.server = json.loads((self.source / "app/config/config_fed_server.json").read_text())
        self.client = json.loads((self.source / "app/config/config_fed_client.json").read_text())
        self.plan = json.loads((self.source / "app/config/plan.json").read_text())
        self.server["min_clients"], self.server["num_rounds"] = self.sites, 1
        self.plan["overrides"] = {**self.plan["overrides"], **TINY}
        if self.plan["strategy"]["name"] == "pfedsam":
            self.plan["strategy"] = find_strategy("local_phase_each_round").strategy
        if self.recorded:
            self.server["components"].append({"id": "recorder", "path": "recorder.Recorder"})
            self.client["components"].append({"id": "watcher", "path": "recorder.StateWatcher"})

    def site(self, name: str) -> dict[str, Any]:
        """The configuration of one site alone, to be changed."""
        return self.special.setdefault(name, deepcopy(self.client))

    def site_plan(self, name: str) -> dict[str, Any]:
        """The plan of one site alone, to be changed."""
        self.site(name)
        return self.special_plans.setdefault(name, deepcopy(self.plan))

    def write(self, folder: Path, locked: bool = False) -> Path:
        """Write the job folder: one app for all, or one for the server and one for each site."""
        names = [f"site-{number + 1}" for number in range(self.sites)]
        apps = {"app": ["@ALL"]}
        if self.special:
            apps = {"app": ["server"], **{f"app_{name}": [name] for name in names}}
        for app, (target, *_) in apps.items():
            shutil.copytree(self.source / "app", folder / app)
            client = self.special.get(target, self.client)
            (folder / app / "config/config_fed_server.json").write_text(json.dumps(self.server))
            (folder / app / "config/config_fed_client.json").write_text(json.dumps(client))
            (folder / app / "config/plan.json").write_text(json.dumps(self.special_plans.get(target, self.plan)))
            if locked:
                shutil.rmtree(folder / app / "custom")
                continue
            for name in ("recorder.py", "leaky.py"):
                shutil.copyfile(HERE / name, folder / app / "custom" / name)
            for name, data in self.custom.items():
                (folder / app / "custom" / name).write_bytes(data)
        meta = json.loads((self.source / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"min_clients": 1, "deploy_map": apps}))
        return folder


@dataclass(frozen=True)
class Run:
    """A run that has ended, and where everything is."""

    folder: Path
    data: Path
    exit_code: int
    output: str
    seconds: float

    @property
    def workspace(self) -> Path:
        return self.folder / "ws"

    @property
    def state_root(self) -> Path:
        return self.folder / "kept"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def global_model(self) -> Path:
        return self.workspace / "server" / JOB_ID / "app_server" / "global_model.safetensors"

    def state_folder(self, site: str) -> Path:
        """The only state folder of a site."""
        (folder,) = (self.state_root / FEDERATION / site).iterdir()
        return folder

    def site_log(self, site: str) -> str:
        return (self.workspace / site / "log.txt").read_text()

    def server_log(self) -> str:
        return (self.workspace / "server" / "log.txt").read_text()

    def sent(self, site: str, stage: str = "checked") -> list[dict[str, Any]]:
        """What the site's filter wrote down: as the allow-list let it pass, or as it `left`."""
        lines = _lines(self.workspace / site / JOB_ID / "pfedsam_sent.jsonl")
        return [one for one in lines if one["stage"] == stage]

    def received(self) -> list[dict[str, Any]]:
        """What the server's guard wrote down."""
        return _lines(self.workspace / "server" / JOB_ID / "pfedsam_received.jsonl")

    @cached_property
    def items(self) -> list[Item]:
        return recorder.read_items(self.folder / "record")

    @cached_property
    def frames(self) -> bytes:
        return b"".join(recorder.read_frames(self.folder / "record"))

    @cached_property
    def server_files(self) -> dict[str, bytes]:
        return recorder.server_files(self.workspace)

    def results(self, site: str, task: str = "train") -> list[Item]:
        """Results of a site as the server received them, before the guard."""
        return [one for one in self.items if (one.kind, one.site, one.task) == ("result", site, task)]

    @cached_property
    def everything(self) -> dict[str, bytes]:
        """All that the server got or wrote, by where it is."""
        found = {"frames": self.frames}
        for one in self.items:
            where = f"{one.kind} {one.site} {one.task} {one.number}"
            found[where] = found.get(where, b"") + b"\0" + one.blob()
        for name, data in self.server_files.items():
            found[f"server/{name}"] = name.encode() + b"\0" + data
        return found

    def needles(self, site: str) -> Needles:
        """Windows of every personal tensor and moment that the site ever had on its disk.

        And of the experts' last layers as the final phase left them, before they were moved towards the global model:
        the interpolation is a power of two, so these are the very same bytes.
        """
        if site not in self._needles:
            files = [*(self.folder / "states" / site).glob("*"), *self.state_root.glob(f"*/{site}/*/*.safetensors")]
            parts = []
            for path in {path.read_bytes(): path for path in files}.values():
                arrays = recorder.personal_arrays(path)
                own = {name: array for name, array in arrays.items() if name.startswith("personal/")}
                fitted = [array / INTERPOLATION for name, array in own.items() if name.endswith((".up", ".up_bias"))]
                parts.append(Needles.of([*own.values(), *fitted]))
                parts.append(Needles.of(arrays.values(), forms=False))
            self._needles[site] = Needles(window for part in parts for window in part.windows)
        return self._needles[site]

    @cached_property
    def _needles(self) -> dict[str, Needles]:
        return {}

    def found(self, wanted: Needles) -> list[str]:
        """Where at the server any of the wanted windows occurs."""
        return [where for where, data in self.everything.items() if wanted.in_(data)]


def simulate(
    folder: Path,
    job: Job,
    data: Path,
    *,
    threads: int | None = None,
    locked: bool = False,
    environment: Mapping[str, str | None] | None = None,
    forked: bool = True,
) -> Run:
    """Run a job to its end.

    Args:
        folder: everything is written below it; `kept` in it is the state root, `ws` the workspace; they may be there
            already.
        job: the job.
        data: folder of the site folders.
        threads: sites that run at the same time; by default all.
        locked: run the form without `app/custom`.
        environment: further variables; None takes one away.
        forked: as `pfedsam simulate` does it, which is twice as fast; else by the command `nvflare simulator`.
    """
    for name in ("home", "record", "states", "kept", "ws"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    job_folder = job.write(folder / "job", locked)
    variables: dict[str, str | None] = {
        **os.environ,
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": str(folder.parent / "matplotlib"),
        "PFEDSAM_DATA": str(data),
        "PFEDSAM_STATE_ROOT": str(folder / "kept"),
        recorder.RECORD: str(folder / "record"),
        recorder.STATES: str(folder / "states"),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    words = [str(one) for one in (job_folder, "-w", folder / "ws", "-n", job.sites, "-t", threads or job.sites)]
    command = [str(Path(sys.executable).parent / "nvflare"), "simulator", *words]
    if forked:
        command = [sys.executable, "-m", "pfedsam.deployment.simulator_process"]
    asked = folder / "asked.json"
    asked.write_text(json.dumps({"arguments": words, "environment": {}}) + "\n")
    started = time.monotonic()
    with (folder / "output.txt").open("wb") as output, asked.open("rb") as told:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={key: value for key, value in variables.items() if value is not None},
            stdin=told,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(LIMIT)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = time.monotonic() - started
    return Run(folder, data, code, (folder / "output.txt").read_text(errors="replace"), seconds)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
