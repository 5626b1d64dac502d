"""What a federation costs beside its training: start, rounds, the whole job, the server's memory.

    make bench-framework                all builds, about 5 minutes on two free cores
    python tests/benchmarks/bench_framework.py --before none --repeats 1

A job of 4 sites with one tiny step each a round, run as `pfedsam simulate` runs it; the same job in the commit of
`--before`; and a job of NVFlare's own in which sites only add one to an array, by `nvflare simulator`. They take
turns. Seconds are of the clock, on a machine that should have nothing else to do; `processor` are the seconds of
processor time of the command with all that it starts, which other work disturbs less. Writes results/framework.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import psutil
from bench_speed import BEFORE, HERE, ROOT, _checked_out, _environment, _machine

SITES = 4
TINY = {"backbone": "vit_test", "image_size": 64, "batch_size": 1, "augmentations": 1}
#: One slice of the only training case: one step.
ONE_STEP = {"positives_per_case": 1, "negatives_per_case": 0}
ONE_EPOCH = {"epochs": 1}
NO_OP = "nvflare, no-op"
_STAMP = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}).*"
_MEGABYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with; 'none' for no other build")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each build")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "framework.json")
    options = parser.parse_args()
    measured: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch, _checked_out(options.before) as before:
        data, folder = Path(scratch) / "data", Path(scratch)
        words = ["phantom", str(data), "--cases", "3", "--slices", "4", "--size", "48", "--sites", str(SITES)]
        subprocess.run([sys.executable, "-m", "pfedsam.cli", *words], env=_environment(ROOT), check=True)
        builds = {"now": ROOT, **({"before": before} if before else {})}
        for turn in range(options.repeats):
            for name, root in builds.items():
                found = _measured(
                    _ours(root, data, folder, options.rounds),
                    root,
                    folder / "ours",
                    folder / "ours" / "run" / "workspace",
                )
                measured.setdefault(name, []).append(found)
            found = _measured(_no_op(folder, options.rounds), ROOT, folder / "theirs", folder / "theirs" / "run")
            measured.setdefault(NO_OP, []).append(found)
            print(f"turn {turn + 1} of {options.repeats}", file=sys.stderr, flush=True)
    found_ = {"machine": _machine(), "before": options.before, "sites": SITES, "rounds": options.rounds}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps({**found_, "runs": measured}, indent=1) + "\n")
    _print(measured)


def _ours(root: Path, data: Path, folder: Path, rounds: int) -> list[str]:
    """The command of a tiny federation of ours."""
    strategy = json.loads((root / "jobs" / "strategies" / "pfedsam.json").read_text())
    for phase in (*strategy["strategy"]["phases"], *strategy["strategy"]["final"]):
        phase.update(ONE_EPOCH)
    strategy["strategy"]["name"] = "one_step"
    (folder / "one_step.json").write_text(json.dumps(strategy))
    command = [
        sys.executable,
        "-m",
        "pfedsam.cli",
        "simulate",
        str(data),
        "--out",
        str(folder / "ours" / "run"),
        "--fresh",
    ]
    command += ["--strategy", str(folder / "one_step.json"), "--rounds", str(rounds)]
    return command + [word for key, value in {**TINY, **ONE_STEP}.items() for word in ("--set", f"{key}={value}")]


def _no_op(folder: Path, rounds: int) -> list[str]:
    """The command of NVFlare's own workflow with a site that does nothing, polling as often as our jobs do."""
    config, own = folder / "no-op" / "app" / "config", "nvflare.app_common"
    config.mkdir(parents=True, exist_ok=True)
    workflow = {
        "min_clients": SITES,
        "num_rounds": rounds,
        "wait_time_after_min_received": 10,
        "task_check_period": 0.2,
        "aggregator_id": "aggregator",
        "persistor_id": "persistor",
        "shareable_generator_id": "generator",
    }
    server = {
        "format_version": 2,
        "server": {"task_request_interval": 0.2},
        "workflows": [
            {"id": "rounds", "path": f"{own}.workflows.scatter_and_gather.ScatterAndGather", "args": workflow}
        ],
        "components": [
            {"id": "persistor", "path": f"{own}.np.np_model_persistor.NPModelPersistor"},
            {
                "id": "generator",
                "path": f"{own}.shareablegenerators.full_model_shareable_generator.FullModelShareableGenerator",
            },
            {
                "id": "aggregator",
                "path": f"{own}.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
                "args": {"expected_data_kind": "WEIGHTS"},
            },
        ],
    }
    trainer = {"path": f"{own}.np.np_trainer.NPTrainer", "args": {"sleep_time": 0}}
    client = {
        "format_version": 2,
        "default_task_fetch_interval": 0.2,
        "executors": [{"tasks": ["train"], "executor": trainer}],
        "components": [],
    }
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))
    meta = {"name": "no-op", "min_clients": SITES, "deploy_map": {"app": ["@ALL"]}}
    (folder / "no-op" / "meta.json").write_text(json.dumps(meta))
    words = [str(folder / "no-op"), "-w", str(folder / "theirs" / "run"), "-n", str(SITES), "-t", str(SITES)]
    return [sys.executable, "-m", "nvflare.cli", "simulator", *words]


def _measured(command: Sequence[str], root: Path, home: Path, workspace: Path) -> dict[str, float]:
    """Run a command of a build, and what its logs and the system tell."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    started = datetime.now()
    with (home / "said.txt").open("w+") as said:
        process = subprocess.Popen(
            command, env={**_environment(root), "HOME": str(home)}, stdout=said, stderr=subprocess.STDOUT
        )
        processor, server, to_first_round = _Processor(process.pid), 0, 0.0
        while process.poll() is None:
            used, server = processor.look(), max(server, _server_memory(process.pid))
            if not to_first_round and _stamps(workspace / "server", "Round 0 started"):
                to_first_round = used
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}: {said.read()[-2000:]}")
    whole = (datetime.now() - started).total_seconds()
    begins = _stamps(workspace / "server", r"Round \d+ started")
    ends = _stamps(workspace / "server", r"Round \d+ finished")
    work = [_work(folder) for folder in sorted(workspace.glob("site-*"))]
    # the first round holds the start of the sites
    beyond = [
        (end - begin).total_seconds() - max((site[number] for site in work if site), default=0.0)
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ][1:]
    return {
        "start to first round": (begins[0] - started).total_seconds(),
        "a round beyond its training": sum(beyond) / len(beyond),
        "whole job": whole,
        "processor to first round": to_first_round,
        "processor": processor.look(),
        "server MiB": server / _MEGABYTE,
    }


def _work(site: Path) -> list[float]:
    """Seconds from a task to its result, of each round of a site; empty for a site that does nothing."""
    begun, done = _stamps(site, "Client trainer got task: train"), _stamps(site, r"task train: \d+ tensors")
    return [(end - begin).total_seconds() for begin, end in zip(begun, done, strict=True)]


def _stamps(folder: Path, pattern: str) -> list[datetime]:
    """When lines of a participant's log were written."""
    log = folder / "log.txt"
    text = log.read_text(errors="replace") if log.exists() else ""
    found = re.findall(_STAMP + pattern, text, re.MULTILINE)
    return [datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f") for stamp in found]


def _server_memory(pid: int) -> int:
    """Bytes of the largest process of the simulator that is no site, nor what sites are forked from."""
    largest = 0
    with contextlib.suppress(psutil.Error):  # one has ended meanwhile
        for process in psutil.Process(pid).children(recursive=True):
            line = " ".join(process.cmdline())
            if "simulator" in line and "simulator_work" not in line + process.name() and process.name() != "nursery":
                largest = max(largest, process.memory_info().rss)
    return largest


class _Processor:
    """Processor seconds of a process and all that it has started; one that nobody waits for counts as well."""

    def __init__(self, pid: int) -> None:
        self._top = psutil.Process(pid)
        self._seconds: dict[psutil.Process, float] = {}

    def look(self) -> float:
        """The seconds up to now; what a process uses after the last look is not counted."""
        with contextlib.suppress(psutil.Error):
            for process in (self._top, *self._top.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self._seconds[process] = times.user + times.system
        return sum(self._seconds.values())


def _print(measured: dict[str, list[dict[str, float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(measured)
    table = Table("the smallest of all runs", *names)
    for quantity in measured[names[0]][0]:
        table.add_row(quantity, *(f"{min(run[quantity] for run in measured[name]):.2f}" for name in names))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
