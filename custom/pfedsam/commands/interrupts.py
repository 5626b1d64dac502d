"""What ends a long command from outside: Ctrl-C, SIGTERM, a terminal that closes. All end it in order."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from pfedsam.commands.console import console

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal that ends a command as Ctrl-C does."""


@contextlib.contextmanager
def ends_in_order(last_line: str) -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into what Ctrl-C raises, so that the block ends what it has started.

    While it does, further signals are ignored. A signal that was ignored before (SIGHUP below `nohup`) stays ignored.

    Args:
        last_line: what is printed in the end, after the name of the signal.

    Raises:
        SystemExit: with 128 and the number of the signal.
    """
    came: list[signal.Signals] = []
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def act(number: int, frame: FrameType | None) -> None:
        if came:
            return
        came.append(signal.Signals(number))
        if number == signal.SIGHUP:
            _leave(terminals)
        raise Interrupted(number)

    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    for signum, how in before.items():
        if how != signal.SIG_IGN:
            signal.signal(signum, act)
    try:
        yield
    except BaseException:
        if not came:
            raise
        # whatever it became on its way: a bar, for example, cannot be drawn any more
        with contextlib.suppress(OSError, SystemExit):
            console.print(f"stopped by {came[0].name}. {last_line}", highlight=False, soft_wrap=True)
        raise SystemExit(128 + came[0]) from None
    finally:
        for signum, how in before.items():
            signal.signal(signum, how)


def command_again(out: Path | None = None, without: Sequence[str] = ("--fresh",)) -> str:
    """This command line as a person types it.

    Args:
        out: the folder that was chosen for `--out`, where the line does not say it.
        without: words to leave out.
    """
    words = [word for word in sys.argv[1:] if word not in without]
    if out is not None and not any(word == "--out" or word.startswith("--out=") for word in words):
        words += ["--out", str(out)]
    return shlex.join(["pfedsam", *words])


def _leave(terminals: Sequence[int]) -> None:
    """Write to nowhere what would go to a terminal that is gone: an error there would stop the cleaning up."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)
