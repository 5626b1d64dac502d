"""Runs MONAI Label's server on this machine's loopback, for the process at the other end of standard input."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from .guard import Guard
from .line import Line, Refused

ADDRESS = "127.0.0.1"
#: Nothing runs beside the requests, and nothing is kept of them.
SETTINGS = {
    "MONAI_LABEL_TASKS_TRAIN": "false",
    "MONAI_LABEL_TASKS_SCORING": "false",
    "MONAI_LABEL_TASKS_BATCH_INFER": "false",
    "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
    "MONAI_LABEL_SESSIONS": "false",
    "MONAI_LABEL_TRACKING_ENABLED": "false",
    "MONAI_LABEL_AUTH_ENABLE": "false",
}


def main() -> None:
    """Take the start from the line, bind the port, then serve until the process ends."""
    line = Line(socket.socket(fileno=0))
    try:
        listening = socket.create_server((ADDRESS, line.told["port"]))
    except OSError as error:
        line.ask("failed", why=f"port {line.told['port']} cannot be used: {error.strerror}")
        return
    asyncio.run(_serve(line, listening))


async def _serve(line: Line, listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    app = _monailabel(line)
    import uvicorn

    hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]
    how: Any = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "on"}
    server = uvicorn.Server(uvicorn.Config(Guard(app, line.told["token"], hosts), **how))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.05)
    if server.started:
        line.ask("ready", port=port)
    await serving


def _monailabel(line: Line) -> Any:
    """MONAI Label's own application, which reads its settings from the environment when it is imported."""
    scratch = line.told["scratch"]
    for name in [name for name in os.environ if name.startswith(("MONAI_LABEL_", "MONAI_ZOO_"))]:
        del os.environ[name]
    here = str(Path(__file__).parent)
    os.environ.update(SETTINGS, MONAI_LABEL_APP_DIR=here, MONAI_LABEL_STUDIES=line.told["site"])
    # what is received goes where it is deleted, and `.env` files of other folders are not read
    tempfile.tempdir = scratch
    os.chdir(scratch)
    from front import app as ours
    from monailabel.app import app

    ours.line = line
    app.add_exception_handler(Refused, _told)
    return app


async def _told(request: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"detail": str(error)}, status_code=409)
