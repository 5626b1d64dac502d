"""`pfedsam site check` tries the server on the way that NVFlare's driver takes: with grpc through the proxy."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pfedsam.deployment.reach import reach

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "poc"))
from connect_proxy import ConnectProxy

#: A name that only the proxy knows.
HOST = "fl.federation.test"
#: `Proxy-Authorization` of user:secret.
BASIC = "Basic dXNlcjpzZWNyZXQ="


@pytest.fixture
def port() -> Iterator[int]:
    """Of a server that answers, on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def content(scheme: str, host: str, port: int) -> Any:
    return {"servers": [{"service": {"scheme": scheme, "target": f"{host}:{port}"}}]}


@pytest.mark.parametrize("password", [None, BASIC])
def test_grpc_goes_through_the_proxy(port: int, password: str | None) -> None:
    proxy = ConnectProxy(port, password)
    url = proxy.url.replace("//", "//user:secret@") if password else proxy.url
    fine, message = reach(content("grpc", HOST, port), {"https_proxy": url})
    assert fine and proxy.asked == [f"{HOST}:{port}"]
    assert message == f"{HOST} port {port} answers through the proxy 127.0.0.1 port {proxy.port} of https_proxy"


def test_a_proxy_that_refuses_is_named_and_no_password_is(port: int) -> None:
    proxy = ConnectProxy(port, BASIC)
    url = proxy.url.replace("//", "//user:wrong@")
    fine, message = reach(content("grpc", HOST, port), {"https_proxy": url})
    assert not fine and "407" in message and "wrong" not in message and proxy.asked == []


def test_a_proxy_that_does_not_answer_or_is_none_is_told(port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    fine, message = reach(content("grpc", HOST, port), {"https_proxy": f"http://127.0.0.1:{closed}"})
    assert not fine and "does not answer" in message and str(closed) in message
    for url in ("proxy.example.org:3128", "http://", "socks5://proxy.example.org:1", "http://proxy:x"):
        fine, message = reach(content("grpc", HOST, port), {"https_proxy": url})
        assert not fine and "is no address of an HTTP proxy" in message


@pytest.mark.parametrize("scheme", ["http", "tcp"])
def test_the_other_schemes_connect_directly_and_it_is_said(scheme: str, port: int) -> None:
    proxy = ConnectProxy(port)
    fine, message = reach(content(scheme, "127.0.0.1", port), {"https_proxy": proxy.url})
    assert fine and proxy.asked == []
    assert message.endswith(f"answers; directly: with the scheme {scheme} NVFlare does not use https_proxy")


def test_without_a_proxy_nothing_is_said_of_one(port: int) -> None:
    assert reach(content("grpc", "127.0.0.1", port), {}) == (True, f"127.0.0.1 port {port} answers")
    fine, message = reach(content("grpc", HOST, port), {})
    assert not fine and "proxy" not in message


WAYS = [
    ({"https_proxy": "PROXY"}, HOST),
    ({"grpc_proxy": "PROXY", "https_proxy": "http://127.0.0.1:1"}, HOST),
    ({"http_proxy": "PROXY"}, HOST),
    ({"HTTPS_PROXY": "PROXY"}, HOST),
    ({"https_proxy": "PROXY", "no_proxy": "other.test, federation.test"}, HOST),
    ({"https_proxy": "PROXY", "no_proxy": "*"}, HOST),
    ({"https_proxy": "PROXY", "NO_PROXY": HOST}, HOST),
    ({"https_proxy": "PROXY", "no_grpc_proxy": "other.test", "no_proxy": HOST}, HOST),
    ({"https_proxy": "PROXY", "no_proxy": "127.0.0.0/8"}, "127.0.0.1"),
    ({"https_proxy": "PROXY"}, "localhost"),
]


@pytest.mark.parametrize(("environment", "host"), WAYS)
def test_the_way_is_grpcs_own(
    environment: dict[str, str], host: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = ConnectProxy(port), ConnectProxy(port)
    reach(content("grpc", host, port), {name: url.replace("PROXY", ours.url) for name, url in environment.items()})
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "no_grpc_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, url in environment.items():
        monkeypatch.setenv(name, url.replace("PROXY", theirs.url))
    with grpc.insecure_channel(f"{host}:{port}") as channel, pytest.raises(grpc.FutureTimeoutError):
        grpc.channel_ready_future(channel).result(timeout=1)
    assert bool(ours.asked) == bool(theirs.asked)
