"""What reaches MONAI Label: Slicer's own requests, and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pfedsam.clinic.front.guard import Guard

TOKEN, HOST = "a-token", "127.0.0.1:8000"


def asked(method: str, path: str, kind: str = "http", **headers: str) -> str | None:
    """The path that reaches the application behind, or None; what is refused gets 403 and nothing of it."""
    reached: list[str] = []
    replies: list[dict[str, Any]] = []

    async def behind(scope: dict[str, Any], receive: Any, send: Any) -> None:
        reached.append(scope["path"])

    async def send(message: dict[str, Any]) -> None:
        replies.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": HOST, **headers}.items()]
    scope = {"type": kind, "method": method, "path": path, "headers": named}
    asyncio.run(Guard(behind, TOKEN, [HOST])(scope, None, send))
    if reached:
        return reached[0]
    if kind == "http":
        assert [replies[0]["status"], replies[1]["type"]] == [403, "http.response.body"]
        assert TOKEN not in str(replies)
    return None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/info/"),
        ("GET", "/datastore/"),
        ("GET", "/datastore/image"),
        ("PUT", "/datastore/"),
        ("PUT", "/datastore/label"),
        ("POST", "/activelearning/without-label"),
        ("POST", "/infer/brain-round3-research-only"),
    ],
)
def test_what_slicer_asks_for_passes(method: str, path: str) -> None:
    assert asked(method, f"/{TOKEN}{path}") == path
    assert asked(method, path) is None, "without the token"
    assert asked(method, f"/other{path}") is None
    assert asked(method, f"/{TOKEN}x{path}") is None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", "/datastore/image"),
        ("DELETE", "/datastore/"),
        ("DELETE", "/datastore/label"),
        ("GET", "/datastore/dataset"),
        ("PUT", "/datastore/image"),
        ("GET", "/logs/"),
        ("GET", "/proxy/dicom/wado/x"),
        ("GET", "/model/brain"),
        ("PUT", "/model/brain"),
        ("POST", "/train/brain"),
        ("POST", "/batch/infer/brain"),
        ("POST", "/infer/wsi/brain"),
        ("POST", "/reload"),
        ("PUT", "/session/"),
        ("GET", "/openapi.json"),
        ("GET", "/"),
        ("GET", ""),
        ("POST", "/info/"),
        ("GET", "/info/\n"),
    ],
)
def test_every_other_route_of_monailabel_is_closed(method: str, path: str) -> None:
    assert asked(method, f"/{TOKEN}{path}") is None


def test_a_web_page_and_another_name_of_this_machine_are_refused() -> None:
    path = f"/{TOKEN}/info/"
    assert asked("GET", path) == "/info/"
    assert asked("GET", path, origin="http://127.0.0.1:8000") is None
    assert asked("GET", path, origin="https://evil.example") is None
    assert asked("GET", path, sec_fetch_site="none") is None
    assert asked("GET", path, host="evil.example:8000") is None
    assert asked("GET", path, host="127.0.0.1:8001") is None
    assert asked("GET", path, kind="websocket") is None
