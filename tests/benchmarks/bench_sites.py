"""Memory and time of the server for 2 to 64 sites.

    python tests/benchmarks/bench_sites.py

The exported job `pfedsam` in NVFlare's simulator, with its own workflow, guard, aggregator and persistor. Only the
sites are replaced: each is a process without torch that answers `train` with a prepared update of the default network.
All are connected all the time, and wait for each other in each round so that they send at the same moment: the worst
case for the server. (With fewer processes than sites the simulator serves a few at a time, and little can pile up.)

Memory is the resident memory of the server's process: before the first round, with all modules loaded, theta0 read,
freed memory given back and no site connected; its high-water mark (of the kernel, so nothing is missed between samples)
in the rounds; and what is kept after the last round when freed memory was given back once more. The simulator has a
thread for each site in that process, which counts, too. A payload is the bytes of one update's tensors.

Two settings: NVFlare's and glibc's defaults, and `lean`: the environment that `make poc` and the service file give to
the server (`pfedsam.deployment.processes.SERVER_MEMORY`). The bar, for `lean`: from the fewest sites to the most, the
high-water mark grows by at most 2 payloads for each further site, and the last step is no steeper than
that line. Otherwise the exit code is not 0, with a message. A constant part (thread pools, the sum and the model of the
server) is no growth by sites. Seconds are only reported. Prints tables and writes results/sites.json; rows that are in
it are not repeated, but those of another payload are taken out.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

# No import of ours at the top: this file goes into the job, and a site must not load torch.
BUNDLE = "brain_lesion_mri"
ROUNDS = 3
#: Payloads by which the server's peak may grow for each further site, and how much steeper its last step may be.
BAR, STEEPER = 2.0, 1.25
#: Numbers of sites of each setting. With NVFlare's defaults the results of 64 sites at once did not get through: on two
#: cores none had after seven minutes, and the senders timed out after five.
SITES = {"defaults": (2, 8, 30), "lean": (2, 8, 30, 64)}
SETTINGS = tuple(SITES)
#: The settings that the bar is for; the defaults are there to compare.
MEANT = "lean"
#: Seconds after which a run is stopped.
LIMIT = 1200
#: Name of this file in the job.
MODULE = "prepared_sites"
#: Names the folder of a run to the processes of the job: paths have no place in a job, and the server refuses them.
FOLDER = "PFEDSAM_BENCH_SITES"
UPDATE, TOLD, EVENTS = "update.npz", "update.json", "events.jsonl"
RESULTS = Path(__file__).parent / "results" / "sites.json"


class PreparedUpdate(Executor):
    """A site that sends the same update in each round, as soon as all sites have the task.

    Args:
        sites: number of sites. In `meeting` in the run's folder each site leaves a file for each round.
    """

    def __init__(self, sites: int) -> None:
        super().__init__()
        self.sites = sites

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        here, current = Path(__file__).parent, int(shareable.get_header(AppConstants.CURRENT_ROUND))
        with np.load(here / UPDATE) as file:
            update = {name: file[name] for name in file.files}
        meta = {
            **json.loads((here / TOLD).read_text()),
            "pfedsam_round": current,
            MetaKey.NUM_STEPS_CURRENT_ROUND: 10,
            # better in each round, so that the server saves the best model each time
            MetaKey.INITIAL_METRICS: {"val_dice": 0.5 + current / 100},
        }
        present = Path(os.environ[FOLDER]) / "meeting" / str(current)
        present.mkdir(parents=True, exist_ok=True)
        (present / fl_ctx.get_identity_name()).touch()
        while len(list(present.iterdir())) < self.sites and not abort_signal.triggered:
            time.sleep(0.02)
        return DXO(DataKind.WEIGHT_DIFF, data=update, meta=meta).to_shareable()


class ServerProbe(FLComponent):
    """Writes down the time and the memory of the server's process at the start and the end of each round."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            # what the persistor and the guard import later must not look like memory of a round
            from pfedsam.bundles import network_of

            network_of(BUNDLE, weights=False)
        elif event_type == AppEventType.TRAINING_STARTED:
            give_back()
            # the kernel's high-water mark begins anew
            Path("/proc/self/clear_refs").write_text("5")
            self._write("baseline")
        elif event_type == EventType.END_WORKFLOW:
            give_back()
            self._write("kept")
        elif event_type in (AppEventType.ROUND_STARTED, AppEventType.ROUND_DONE):
            self._write(event_type)

    def _write(self, event: str) -> None:
        memory, status = psutil.Process().memory_full_info(), Path("/proc/self/status").read_text()
        told = {
            "event": event,
            "pid": os.getpid(),
            "time": time.time(),
            "rss": memory.rss,
            "uss": memory.uss,
            "high_water": int(status.split("VmHWM:")[1].split()[0]) * 1024,
            "threads": threading.active_count(),
        }
        with (Path(os.environ[FOLDER]) / EVENTS).open("a") as file:
            file.write(json.dumps(told) + "\n")


def environment(settings: str) -> dict[str, str]:
    """What is added to the environment of the processes."""
    from pfedsam.deployment.processes import SERVER_MEMORY

    return SERVER_MEMORY if settings == MEANT else {}


def give_back() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def update_of_bundle() -> tuple[dict[str, np.ndarray], str]:
    """What a site sends: an update of the bundle's shared tensors, and the fingerprint of its base weights."""
    from pfedsam.bundles import network_of
    from pfedsam.parameters import Roles, manifest

    network = network_of(BUNDLE)
    random = np.random.default_rng(0)
    specs = manifest(network, Roles(), "shared")
    update = {name: random.normal(0, 1e-3, spec.shape).astype(spec.dtype) for name, spec in specs.items()}
    return update, network.base_fingerprint


def payload_bytes() -> int:
    """Bytes of the tensors of one update."""
    return sum(array.nbytes for array in update_of_bundle()[0].values())


def write_job(folder: Path, sites: int) -> None:
    """Write the exported job with the sites replaced."""
    from pfedsam.deployment.job_files import find_job
    from pfedsam.deployment.jobs import CLIENT, SERVER, export_job
    from pfedsam.federated.boundary import FINGERPRINT_KEY

    job = export_job(
        find_job("pfedsam"),
        folder / "job",
        plan={"bundle": BUNDLE},
        server={"min_clients": sites, "num_rounds": ROUNDS},
        force=True,
    )
    config, custom = job / "app" / "config", job / "app" / "custom"
    server = json.loads((config / SERVER).read_text())
    server["workflows"] = [one for one in server["workflows"] if one["id"] == "scatter_and_gather"]
    probe = {"id": "probe", "path": f"{MODULE}.ServerProbe", "args": {}}
    server["components"].append(probe)
    (config / SERVER).write_text(json.dumps(server))
    executor = {
        "path": f"{MODULE}.PreparedUpdate",
        "args": {"sites": sites},
    }
    client = json.loads((config / CLIENT).read_text())
    client |= {"executors": [{"tasks": ["train"], "executor": executor}], "task_result_filters": [], "components": []}
    (config / CLIENT).write_text(json.dumps(client))
    shutil.copyfile(__file__, custom / f"{MODULE}.py")
    update, fingerprint = update_of_bundle()
    np.savez(custom / UPDATE, **update)  # type: ignore[arg-type]
    (custom / TOLD).write_text(json.dumps({FINGERPRINT_KEY: fingerprint}))


def simulate(folder: Path, sites: int, settings: str) -> tuple[list[dict[str, Any]], list[tuple[float, int, int]]]:
    """Run the job; what the probe wrote, and samples of time, RSS and USS of the server's process."""
    command = [sys.executable, __file__, "--run", str(folder), "--sites", str(sites)]
    (folder / "home").mkdir()
    told = {"HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", FOLDER: str(folder)}
    told |= environment(settings)
    samples: list[tuple[float, int, int]] = []
    server: psutil.Process | None = None
    deadline = time.monotonic() + LIMIT
    with (
        (folder / "output.txt").open("wb") as output,
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **told},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{settings}, {sites} sites: not done after {LIMIT} s.")
                if server is None and (events := events_of(folder)):
                    server = psutil.Process(events[0]["pid"])
                if server is not None and server.is_running():
                    try:
                        memory = server.memory_full_info()
                        samples.append((time.time(), memory.rss, memory.uss))
                    except (psutil.NoSuchProcess, psutil.AccessDenied):
                        pass
                time.sleep(0.05)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return events_of(folder), samples


def run_simulator(folder: Path, sites: int) -> None:
    """NVFlare's simulator, but sites start when the server is ready, and one after the other.

    If 64 start at once on two cores, some of them miss NVFlare's ten seconds to connect.
    """
    from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner

    at_once, turn = SimulatorClientRunner.do_one_task, threading.Lock()

    def one_after_the_other(*args: Any, **kwargs: Any) -> Any:
        with turn:
            while not events_of(folder):
                time.sleep(0.1)
            time.sleep(0.4)
        return at_once(*args, **kwargs)

    SimulatorClientRunner.do_one_task = one_after_the_other  # type: ignore[method-assign]
    names = ",".join(f"site-{number + 1}" for number in range(sites))
    SimulatorRunner(str(folder / "job"), str(folder / "workspace"), names, threads=sites).run()


def events_of(folder: Path) -> list[dict[str, Any]]:
    """What the probe has written."""
    file = folder / EVENTS
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measure(settings: str, sites: int) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        payload = payload_bytes()
        write_job(folder, sites)
        events, samples = simulate(folder, sites, settings)
        received = folder / "workspace" / "server" / "simulate_job" / "pfedsam_received.jsonl"
        records = [json.loads(line) for line in received.read_text().splitlines()] if received.exists() else []
        accepted = [one for one in records if one["accepted"] and one["bytes"] == payload]
        starts = [one for one in events if one["event"] == AppEventType.ROUND_STARTED]
        ends = [one for one in events if one["event"] == AppEventType.ROUND_DONE]
        if len(ends) != ROUNDS or len(accepted) != ROUNDS * sites:
            print((folder / "output.txt").read_text(errors="replace")[-4000:], file=sys.stderr)
            raise SystemExit(
                f"{settings}, {sites} sites: {len(ends)} of {ROUNDS} rounds, {len(accepted)} accepted results."
            )
    base = events[0]
    during = [one for one in samples if base["time"] <= one[0] <= ends[-1]["time"]]
    seconds = [end["time"] - start["time"] for start, end in zip(starts, ends, strict=True)]
    high_water = max(one["high_water"] for one in ends)
    return {
        "settings": settings,
        "sites": sites,
        "payload_bytes": payload,
        "baseline_rss": base["rss"],
        "baseline_uss": base["uss"],
        "high_water": high_water,
        "peak_rss_sampled": max(one[1] for one in during),
        "peak_uss_sampled": max(one[2] for one in during),
        "end_of_round_uss": [one["uss"] for one in ends],
        "end_of_round_threads": [one["threads"] for one in ends],
        "kept_rss": events[-1]["rss"],
        "growth_payloads": (high_water - base["rss"]) / payload,
        "seconds_first_round": seconds[0],
        "seconds_later_rounds": sum(seconds[1:]) / len(seconds[1:]),
    }


def slope(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Payloads for each further site, from one row to another."""
    return (last["growth_payloads"] - first["growth_payloads"]) / (last["sites"] - first["sites"])


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What is above the bar, in words; nothing if all is well."""
    if len(rows) < 2:
        return []
    found, all_in_all = [], slope(rows[0], rows[-1])
    if all_in_all > BAR:
        found.append(f"{all_in_all:.2f} payloads for each further site, the bar is {BAR:g}")
    if (last := slope(*rows[-2:])) > STEEPER * all_in_all:
        found.append(f"faster than linear: {last:.2f} payloads at the end, {all_in_all:.2f} all in all")
    return [f"{rows[0]['settings']}: the server's peak grows by {one}." for one in found]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of one setting."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        *("sites", "before", "peak", "kept", "growth, payloads", "a further site", "s a round"),
        title=f"server, {rows[0]['settings']} (MiB; a payload is {rows[0]['payload_bytes']:,} bytes)",
    )
    steps = ["", *(f"{slope(*pair):.2f}" for pair in itertools.pairwise(rows))]
    for row, step in zip(rows, steps, strict=True):
        memory = (f"{row[key] / 2**20:.0f}" for key in ("baseline_rss", "high_water", "kept_rss"))
        growth = f"{row['growth_payloads']:.1f}"
        table.add_row(str(row["sites"]), *memory, growth, step, f"{row['seconds_later_rounds']:.2f}")
    if len(rows) > 1:
        table.caption = f"{slope(rows[0], rows[-1]):.2f} payloads for each further site, all in all"
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", help="instead of those of each setting")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--again", action="store_true", help="repeat rows that are there")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.run:
        run_simulator(options.run, *options.sites)
        return
    found = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    rows = {(row["settings"], row["sites"]): row for row in found if row["payload_bytes"] == payload_bytes()}
    for one in [(setting, sites) for setting in options.settings for sites in options.sites or SITES[setting]]:
        if one in rows and not options.again:
            continue
        rows[one] = measure(*one)
        machine = {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            **{name: version(name) for name in ("nvflare", "torch", "numpy")},
        }
        content = {"machine": machine, "rounds": ROUNDS, "bar": BAR, MEANT: environment(MEANT)}
        content["rows"] = [rows[key] for key in sorted(rows)]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    above: list[str] = []
    for settings in SETTINGS:
        if ordered := [rows[key] for key in sorted(rows) if key[0] == settings]:
            show(ordered)
            above += verdict(ordered) if settings == MEANT else []
    if above:
        raise SystemExit("\n".join(above))


if __name__ == "__main__":
    main()
