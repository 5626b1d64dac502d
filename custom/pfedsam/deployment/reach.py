"""Whether the server's port answers from this machine, on the way that NVFlare's driver takes.

The driver of the scheme grpc goes through the HTTP proxy that the environment names, the others connect directly.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

_CONNECT_SECONDS = 5
#: Variables that gRPC reads, in lower case only; the first one that is set counts.
PROXIES, EXCEPTIONS = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")
_MOST_BYTES = 65536


def target(content: Any) -> tuple[str, int]:
    """Host and port of the server, as NVFlare's configuration names them.

    Raises:
        KeyError, IndexError, TypeError, ValueError: if it names none.
    """
    host, _, port = str(content["servers"][0]["service"]["target"]).rpartition(":")
    return host, int(port)


def reach(content: Any, environment: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Try the server's port.

    Args:
        content: of a site's `startup/fed_client.json`.
        environment: variables, as the site's process will have them.

    Returns:
        Whether it answers, and a sentence that names the way. A proxy's password is not in it.

    Raises:
        KeyError, IndexError, TypeError, ValueError: as `target`.
    """
    (host, port), scheme = target(content), content["servers"][0]["service"].get("scheme")
    variable = next((name for name in PROXIES if environment.get(name)), None)
    if variable is None or scheme != "grpc":
        fine, message = _connect(host, port)
        unused = variable and f"; directly: with the scheme {scheme} NVFlare does not use {variable}"
        return fine, message + (unused or "")
    if _excepted(host, environment):
        fine, message = _connect(host, port)
        return fine, f"{message}; directly: {' or '.join(EXCEPTIONS)} names it"
    return _through(environment[variable], variable, host, port)


def _connect(host: str, port: int) -> tuple[bool, str]:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return True, f"{host} port {port} answers"
    except OSError as error:
        why = f"{type(error).__name__}: {error}"
        return False, f"{host} port {port} does not answer ({why}): not running, or a firewall"


def _through(url: str, variable: str, host: str, port: int) -> tuple[bool, str]:
    """Ask a proxy for a connection to the server, as gRPC does."""
    try:
        parts = urlsplit(url)
        proxy, number = parts.hostname, parts.port or 80
    except ValueError:
        proxy, number = None, 0
    if not proxy or parts.scheme != "http":
        return False, f"{variable} is no address of an HTTP proxy, for example http://proxy.example.org:3128"
    way = f"proxy {proxy} port {number} of {variable}"
    request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request += f"Proxy-Authorization: Basic {base64.b64encode(user.encode()).decode()}\r\n"
    try:
        with socket.create_connection((proxy, number), timeout=_CONNECT_SECONDS) as connection:
            connection.sendall(f"{request}\r\n".encode())
            answer = _head(connection)
    except OSError as error:
        return False, f"the {way} does not answer ({type(error).__name__})"
    status = answer.split(" ", 2)
    if len(status) < 2 or not status[0].startswith("HTTP/") or not status[1].startswith("2"):
        return False, f"the {way} does not lead to {host} port {port}: {answer[:80]!r}"
    return True, f"{host} port {port} answers through the {way}"


def _head(connection: socket.socket) -> str:
    """First line of a proxy's answer."""
    received = b""
    while b"\r\n\r\n" not in received and len(received) < _MOST_BYTES and (part := connection.recv(4096)):
        received += part
    return received.split(b"\r\n", 1)[0].decode(errors="replace")


def _excepted(host: str, environment: Mapping[str, str]) -> bool:
    """Whether gRPC goes around the proxy to this host: one of the listed ends of names, addresses or networks."""
    listed = next((environment[name] for name in EXCEPTIONS if environment.get(name)), "")
    return any(_matches(host, entry.strip()) for entry in listed.split(",") if entry.strip())


def _matches(host: str, entry: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return host.lower().endswith(entry.lower())
