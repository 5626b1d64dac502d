"""What of MONAI Label's server may be asked for, and by whom.

MONAI Label answers any page of any site, under any name of this machine, and has routes that read logs, delete images,
train, and fetch from other addresses. Here a request needs the token in its path, comes from no web page, and is in a
short list; anything else is answered by 403 and never reaches MONAI Label.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

#: What 3D Slicer asks for, below the token.
ALLOWED = (
    ("GET", re.compile(r"/info/")),
    ("GET", re.compile(r"/datastore/")),
    ("GET", re.compile(r"/datastore/image")),
    ("HEAD", re.compile(r"/datastore/image")),
    ("PUT", re.compile(r"/datastore/")),
    ("PUT", re.compile(r"/datastore/label")),
    ("POST", re.compile(r"/activelearning/[^/]+")),
    ("POST", re.compile(r"/infer/[^/]+")),
)
_REFUSAL = json.dumps({"detail": "pFedSAM answers 3D Slicer under the address that it printed, and nothing else."})

Scope = dict[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


class Guard:
    """An ASGI application around another.

    Args:
        app: MONAI Label's.
        token: first part of the path.
        hosts: names and ports under which this server is asked.
    """

    def __init__(self, app: App, token: str, hosts: Collection[str]) -> None:
        self._app, self._token, self._hosts = app, token.encode(), {host.encode() for host in hosts}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Hand a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = self._path(scope) if scope["type"] == "http" else None
        if path is not None and any(scope["method"] == how and what.fullmatch(path) for how, what in ALLOWED):
            await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSAL.encode()})

    def _path(self, scope: Scope) -> str | None:
        """The path below the token; None for a request that is not Slicer's own."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        # a browser names the page that asks; Slicer's client is no page
        of_a_page = any(name in (b"origin", b"sec-fetch-site", b"sec-fetch-mode") for name, _ in scope["headers"])
        if len(hosts) != 1 or hosts[0] not in self._hosts or of_a_page:
            return None
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        return f"/{rest}" if hmac.compare_digest(first.encode(), self._token) else None
