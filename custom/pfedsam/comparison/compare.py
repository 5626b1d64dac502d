"""Many runs in several processes: nothing that is done is done again, and what was stopped goes on."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

from pfedsam.children import begin, terminal_signals_held
from pfedsam.comparison.execute import Simulator, execute
from pfedsam.comparison.expected import Expected
from pfedsam.comparison.provenance import bundle_hash, defaults
from pfedsam.comparison.records import problem_of_record, warn_once
from pfedsam.comparison.run import Run
from pfedsam.errors import PFedSAMError, shown
from pfedsam.files import append_line, read_lines

RECORDS = "runs.jsonl"


@dataclass
class Comparison:
    """The runs of a comparison and what came of them.

    Attributes:
        runs: what is to be run.
        out: folder of trainings, features and logs.
        file: of the records, one JSON line each; by default `runs.jsonl` in `out`.
        simulator: a function of a module that trains the runs that ask for NVFlare's simulator.
        fresh: run again what has a record of something else than there is now, see `outdated`.
        failed: error text by the name of the run.
        running: what was told last, by the name of each run that runs now.
    """

    runs: Sequence[Run]
    out: Path
    file: Path | None = None
    simulator: Simulator | None = None
    fresh: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)

    @property
    def record_file(self) -> Path:
        """Where the records are."""
        return self.file or self.out / RECORDS

    def records(self) -> list[dict[str, Any]]:
        """Records of the runs that are done; lines of other runs in the file are left alone."""
        keys = {run.key() for run in self.runs}
        return [record for record in read_records(self.record_file) if record["key"] in keys]

    def missing(self) -> list[Run]:
        """Runs without a record, and with `fresh` those whose record is outdated."""
        done = {record["key"] for record in read_records(self.record_file)}
        again = {name for names in self.outdated().values() for name in names} if self.fresh else ()
        return [run for run in self.runs if run.key() not in done or run.name in again]

    def outdated(self) -> dict[str, list[str]]:
        """Names of the runs whose record is of something else than there is now, by what that is.

        `defaults`: settings of the bundle that the run does not override; `bundle`: what else is in its configuration;
        `inputs`: images, labels or base weights. A record that does not tell them is in none.
        """
        cards = {record["key"]: record["card"] for record in self.records()}
        now: dict[str, Callable[[Run], str]] = {
            "defaults": lambda run: defaults(run.bundle),
            "bundle": lambda run: bundle_hash(run.bundle),
            "inputs": Run.inputs,
        }
        run_names = {
            what: [run.name for run in self.runs if cards.get(run.key(), {}).get(what) not in (None, ask(run))]
            for what, ask in now.items()
        }
        return {what: names for what, names in run_names.items() if names}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file; of two with one key the last counts, what is no record (a line cut off) is left out.

    A record with a value that is none, such as a text as Dice, is left out, too, and a warning names it.
    """
    records: dict[str, dict[str, Any]] = {}
    for record in read_lines(path):
        if "key" not in record:
            continue
        problem = problem_of_record(record, whole=False)
        if problem:
            warn_once(f"{path}: the record {shown(record['key'])} is left out: {problem}")
        else:
            records[record["key"]] = record
    return list(records.values())


def compare(comparison: Comparison, workers: int, event: Callable[[str, int], None] | None = None) -> None:
    """Run what is missing, `workers` runs at a time, with one torch thread each.

    Args:
        comparison: the runs; failures are noted in it, and do not stop the others.
        workers: number of processes.
        event: called with a line and the number of events that it stands for; in all they are as many as
            `pfedsam.comparison.expected.Expected` says before.
    """
    tell = event or (lambda line, count: None)
    waiting = comparison.missing()
    expected = Expected(waiting, comparison.out)
    comparison.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with terminal_signals_held():  # also from the process that counts Python's semaphores
        messages: Any = context.Queue()
    running: dict[int, tuple[Any, Run]] = {}
    number = 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                run = waiting.pop(_next(comparison, waiting, running))
                arguments = (
                    _name(_work),
                    number,
                    asdict(run),
                    str(comparison.out),
                    _name(comparison.simulator),
                    messages,
                )
                # NVFlare's simulator starts processes of its own, which a daemon may not
                process = context.Process(target=begin, args=arguments, daemon=not run.simulator)
                with terminal_signals_held():
                    process.start()
                    running[number] = (process, run)
                comparison.running[run.name] = "starting"
                number += 1
            for index, kind, content in _messages(messages, running):
                process, run = running[index]
                if kind == "event":
                    comparison.running[run.name] = content
                    tell(content, expected.told(run))
                    continue
                del comparison.running[run.name]
                left = expected.ended(run, done=kind == "record")
                if kind == "record":
                    append_line(comparison.record_file, content)
                    tell(f"done: {run.name}", left)
                else:
                    comparison.failed[run.name] = content
                    tell(f"failed: {run.name}: {content}", left)
                process.join()
                del running[index]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _next(comparison: Comparison, waiting: Sequence[Run], running: dict[int, tuple[Any, Run]]) -> int:
    """Place of the first run that need not wait for a training that it shares with one that runs, or 0."""
    busy = {run.shared_folder(comparison.out) for _, run in running.values()}
    return next((place for place, run in enumerate(waiting) if run.shared_folder(comparison.out) not in busy), 0)


def _messages(messages: Any, running: dict[int, tuple[Any, Run]]) -> Iterator[tuple[int, str, Any]]:
    """The next message; a process that died without one is a failure of its run."""
    try:
        yield messages.get(timeout=2.0)
    except Empty:
        for index, (process, _) in list(running.items()):
            if not process.is_alive() and messages.empty():
                yield index, "failure", f"its process ended with exit code {process.exitcode} (memory?)"


def _name(function: Callable[..., Any] | None) -> str | None:
    """A function of a module as `pkgutil.resolve_name` finds it again."""
    return f"{function.__module__}:{function.__qualname__}" if function else None


def _work(index: int, fields: dict[str, Any], out: str, simulator_name: str | None, messages: Any) -> None:
    """A process of its own for one run, see `pfedsam.children.begin`."""
    import logging

    import torch

    run = Run(**fields)
    simulator: Simulator | None = pkgutil.resolve_name(simulator_name) if simulator_name else None
    simulated = run.simulated

    def leave(*_: Any) -> None:
        if not simulated:
            os._exit(1)  # at once, wherever it is
        messages.cancel_join_thread()  # nobody reads them
        sys.exit(1)  # with the processes that it waits for

    signal.signal(signal.SIGTERM, leave)
    torch.set_num_threads(1)
    _keep_freed_memory()
    logging.disable(logging.WARNING)
    log = Path(out) / "logs"
    log.mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(log / f"{run.key()}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), 1)
    os.dup2(1, 2)

    def event(line: str) -> None:
        messages.put((index, "event", line))

    try:
        messages.put((index, "record", execute(run, Path(out), event, simulator)))
    except PFedSAMError as error:
        messages.put((index, "failure", str(error)))
    except Exception as error:
        logging.disable(logging.NOTSET)
        logging.getLogger(__name__).exception("unexpected error")
        messages.put((index, "failure", f"{type(error).__name__}: {error} (see {log / (run.key() + '.log')})"))


def _keep_freed_memory() -> None:
    """Let the C library (glibc) keep what is freed: else each large tensor is new pages from the system."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # of <malloc.h>
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
