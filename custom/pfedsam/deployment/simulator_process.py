"""NVFlare's simulator, as `nvflare simulator` runs it, with sites that are forked instead of started.

    python -m pfedsam.deployment.simulator_process <<< '{"arguments": ["<job>", "-w", "<workspace>", ...]}'

A site begins with importing torch, MONAI, NVFlare and this package: most of the time of a small run, and most of the
memory of a small site. Here one process, the nursery, imports them once, while the server starts, and never does
anything else: it has one thread, no GPU and no open connection. Each site is a copy of it, in a session of its own,
and runs the module that NVFlare would have started. Where there is no such copy to be had, NVFlare starts the site.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil

from pfedsam.children import end, supervised

#: Of the server, imported while the caller still checks what is to run.
SERVER_LIBRARIES = (
    "nvflare.private.fed.app.simulator.simulator",
    "pfedsam.federated.aggregators",
    "pfedsam.federated.filters",
    "pfedsam.federated.persistor",
)
#: Imported before sites are forked: what a site needs in a job of ours. More of it makes a site start sooner.
LIBRARIES = (
    "nvflare.private.fed.app.deployer.base_client_deployer",
    "nvflare.private.fed.simulator.simulator_app_runner",
    "nvflare.app_common.executors.model_learner_executor",
    "pfedsam.federated.learner",
    "pfedsam.networks.sam",
    "pfedsam.data.formats.nifti",
)


@contextmanager
def begun() -> Iterator[subprocess.Popen[str]]:
    """A simulator that has begun to import, for `tell`; it ends with the block, and with all that it has started."""
    with subprocess.Popen(
        supervised([sys.executable, "-m", "pfedsam.deployment.simulator_process"]),
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # a session of its own: Ctrl-C in the terminal is for us, who then end it with all that it has started
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            end(process)


def tell(process: subprocess.Popen[str], arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Let a simulator that has begun run a job.

    Args:
        process: of `begun`.
        arguments: of `nvflare simulator`.
        environment: further variables, for server and sites.

    Returns:
        The lines that it writes, until its end.
    """
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it has failed to start: its lines say why
        process.stdin.write(json.dumps({"arguments": list(arguments), "environment": dict(environment)}) + "\n")
        process.stdin.flush()
    yield from process.stdout


class Nursery:
    """A process that forks sites. Make it before this process has threads or has imported anything large."""

    def __init__(self) -> None:
        self._link, its_end = socket.socketpair()
        self._one_at_a_time = threading.Lock()
        if os.fork() == 0:
            self._link.close()
            _tend(its_end)
        its_end.close()
        self._answers = self._link.makefile("r")

    def start(self, command: Sequence[str], env: Mapping[str, str], **how: Any) -> Any:
        """As `subprocess.Popen(command, env=env, **how)`, with a fork in place of a new interpreter.

        Args:
            command: python, -m, a module and its arguments.
            env: environment of the site.
            how: of `Popen`, where nothing can be forked.
        """
        with self._one_at_a_time:
            try:
                self._link.sendall(json.dumps([list(command), dict(env)]).encode() + b"\n")
                pid = int(self._answers.readline() or 0)
            except (OSError, ValueError):
                pid = 0
        return Forked(pid) if pid else subprocess.Popen(command, env=env, **how)


class Forked:
    """A forked site, with what NVFlare asks of a `subprocess.Popen`. Its exit code is not known."""

    returncode: int | None = None

    def __init__(self, pid: int) -> None:
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def poll(self) -> int | None:
        """None while it runs."""
        if self._process is None or not self._process.is_running():
            self.returncode = -1
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: if it has not come after so many seconds.
        """
        try:
            if self._process is not None:
                self._process.wait(timeout)
        except psutil.TimeoutExpired:
            raise subprocess.TimeoutExpired("site", timeout or 0) from None
        self.returncode = -1
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)


def _tend(link: socket.socket) -> NoReturn:
    """Import, then fork a site for each line that comes, until the simulator is gone."""
    _be_called("nursery")
    # asks whether there is a GPU without opening it: a process that has opened one cannot be forked
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in LIBRARIES:
        importlib.import_module(name)
    from pfedsam.federated.collection import leave_out_what_is_there

    leave_out_what_is_there()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a site has ended
    usable = threading.active_count() == 1 and not _has_opened_a_gpu()
    for line in link.makefile("r"):
        pid = os.fork() if usable else 0
        if usable and pid == 0:
            link.close()
            _become(*json.loads(line))
        link.sendall(b"%d\n" % pid)
    os._exit(0)


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Be the process that a command line would have started."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.path += [one for one in environment.get("PYTHONPATH", "").split(os.pathsep) if one and one not in sys.path]
    import numpy as np

    np.random.seed()  # the other sites are copies of the same process
    _, _, module, *arguments = command
    _be_called(module.rpartition(".")[2])
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


def _be_called(name: str) -> None:
    """Set what a list of processes shows."""
    Path("/proc/self/comm").write_text(name)


def _has_opened_a_gpu() -> bool:
    with open("/proc/self/maps") as maps:
        return any("libcuda.so" in line for line in maps)


def main() -> None:
    """Run the simulator as a line of standard input says; the exit code is NVFlare's."""
    nursery = Nursery() if sys.platform == "linux" else None
    for name in SERVER_LIBRARIES:
        importlib.import_module(name)
    if not (line := sys.stdin.readline()):
        return
    asked = json.loads(line)
    os.environ.update(asked["environment"])
    from nvflare.private.fed.app.simulator import simulator, simulator_runner

    parser = argparse.ArgumentParser()
    simulator.define_simulator_parser(parser)
    if nursery is not None:
        # all that the module uses of `subprocess`
        simulator_runner.subprocess = SimpleNamespace(Popen=nursery.start, TimeoutExpired=subprocess.TimeoutExpired)
    sys.exit(simulator.run_simulator(parser.parse_args(asked["arguments"])))


if __name__ == "__main__":
    main()
