"""The viewer's server: on this machine's loopback, for the one page that knows its token.

Everything that can be asked for stands in a table. What a request says is looked up there and nowhere else: no path or
name from it ever reaches the disk. A request from another page or under another name of this machine, without the
token, or for anything that is not in the table, is answered by 403 and nothing else.
"""

from __future__ import annotations

import hmac
import json
import secrets
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, NamedTuple, cast

from pfedsam.errors import PFedSAMError
from pfedsam.viewer.niivue import niivue_module
from pfedsam.viewer.session import LAYERS, MODELS, STARTS, Session

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
#: Bytes of random numbers in the address.
_TOKEN = 32
#: Bytes of a question; a drawing has the size of its image.
_QUESTION = 4096
#: The page has only what this server gives it. NiiVue holds its own fonts and textures as data.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_JSON, _VOXELS = "application/json", "application/octet-stream"


class Reply(NamedTuple):
    """What is sent.

    Attributes:
        body: bytes.
        kind: media type.
        status: of the answer.
    """

    body: bytes
    kind: str = _VOXELS
    status: HTTPStatus = HTTPStatus.OK


class ViewerServer(ThreadingHTTPServer):
    """Serves a session until `shutdown`.

    Args:
        session: the images.
        port: 0 for a free one.

    Raises:
        PFedSAMError: E31 if NiiVue is not installed.
        OSError: if the port is taken.
    """

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session, self.token = session, secrets.token_urlsafe(_TOKEN)
        self.static = _static()
        super().__init__((ADDRESS, port), _Handler)

    @property
    def origins(self) -> dict[str, str]:
        """Where the page may come from, by the name in the request."""
        hosts = [f"{name}:{self.server_port}" for name in _NAMES]
        return {host: f"http://{host}" for host in hosts}

    @property
    def address(self) -> str:
        """Of the page, with its token: who knows it sees the images."""
        return f"http://{ADDRESS}:{self.server_port}/{self.token}/"

    def reads(self, path: str) -> Callable[[], Reply] | None:
        """What answers a question for a path below the token; None if it is not in the table."""
        if path in self.static:
            return lambda: self.static[path]
        if path == "cases":
            return lambda: _json(self.session.listed())
        number, name = self._case(path)
        if number is None:
            return None
        if name == "about":
            return lambda: _json(self.session.about(number))
        if name.startswith("found-") and name[6:] in STARTS:
            return lambda: _json(self.session.found(number, name[6:]))
        if name in LAYERS:
            return lambda: Reply(LAYERS[name](self.session, number))
        return None

    def writes(self, path: str) -> tuple[Callable[[bytes], Reply], int] | None:
        """What takes what is sent to a path, and how many bytes it takes at most; None if it is not in the table."""
        number, name = self._case(path)
        if number is None:
            return None
        if name == BOX_PATH:
            return lambda body: self._segment(number, body), _QUESTION
        if name.startswith("save-") and name[5:] in STARTS:
            return lambda body: self._save(number, name[5:], body), self.session.bytes_of_drawing(number)
        return None

    def _case(self, path: str) -> tuple[int | None, str]:
        """The number of an image and what is asked of it, from `case/<number>/<name>`."""
        kind, _, rest = path.partition("/")
        number, _, name = rest.partition("/")
        known = {str(one): one for one in range(len(self.session.subjects))}
        return (known.get(number) if kind == "case" else None), name

    def _segment(self, number: int, body: bytes) -> Reply:
        try:
            question = json.loads(body)
            model, box = question["model"], question["box"]
        except (ValueError, RecursionError, TypeError, KeyError):
            return FORBIDDEN
        whole = isinstance(box, list) and len(box) == 6 and all(type(one) is int for one in box)
        if model not in MODELS or not whole:
            return FORBIDDEN
        return Reply(self.session.segment(number, model, box))

    def _save(self, number: int, start: str, body: bytes) -> Reply:
        path = self.session.save(number, start, body)
        return _json({"saved": str(path), "as": path.parent.name})


BOX_PATH = "segment"
FORBIDDEN = Reply(b"", status=HTTPStatus.FORBIDDEN)


class _Handler(BaseHTTPRequestHandler):
    """One request: checked, looked up, answered."""

    server: ViewerServer
    #: Seconds until a connection that says nothing is closed.
    timeout = 30

    def do_GET(self) -> None:
        path = self._path()
        answer = None if path is None else self.server.reads(path)
        self._send(FORBIDDEN if answer is None else _answered(answer))

    def do_POST(self) -> None:
        path = self._path(writing=True)
        found = None if path is None else _taken(lambda: self.server.writes(path))
        if not isinstance(found, tuple):
            self._send(found or FORBIDDEN)
            return
        answer, most = cast("tuple[Callable[[bytes], Reply], int]", found)
        size = self.headers.get("Content-Length", "")
        if not (size.isascii() and size.isdigit() and len(size) < 12 and int(size) <= most):
            self._send(FORBIDDEN)
            return
        body = self.rfile.read(int(size))
        self._send(_answered(lambda: answer(body)))

    def _path(self, writing: bool = False) -> str | None:
        """The path below the token, as it was sent; None for a request that is not the page's own."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        expected = self.server.origins.get(host)
        if expected is None or origin not in ((expected,) if writing else (expected, None)):
            return None
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return None
        parts = self.path.split("/", 2)
        whole = len(parts) == 3 and hmac.compare_digest(parts[1].encode(), self.server.token.encode())
        return parts[2] if whole else None

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        if reply.status is not HTTPStatus.FORBIDDEN:
            self.send_header("Content-Type", reply.kind)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Whatever is wrong with a request, it gets the same answer."""
        self.close_connection = True
        self._send(FORBIDDEN)

    def version_string(self) -> str:
        """Nothing about the software."""
        return "pfedsam"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a request holds the token."""


def _taken(look: Callable[[], Any]) -> Any:
    """What a look-up gives, or the reply for the error that it raised: an image may not be readable."""
    try:
        return look()
    except PFedSAMError as error:
        return _failed(error)


def _answered(answer: Callable[[], Reply]) -> Reply:
    """The answer, or a sentence about what went wrong."""
    try:
        return answer()
    except PFedSAMError as error:
        return _failed(error)
    # one image must not end the viewer; the terminal has the whole story, the page one line of it
    except Exception as error:
        traceback.print_exc()
        return _json({"error": f"{type(error).__name__}: {error}"}, HTTPStatus.INTERNAL_SERVER_ERROR)


def _failed(error: PFedSAMError) -> Reply:
    return _json({"error": str(error)}, HTTPStatus.CONFLICT)


def _json(content: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    return Reply(json.dumps(content).encode(), _JSON, status)


def _static() -> Mapping[str, Reply]:
    """The files of the page, read once."""
    page = files("pfedsam.viewer") / "page"
    kinds = {"index.html": "text/html", "viewer.css": "text/css", "viewer.js": "text/javascript"}
    found = {name: Reply((page / name).read_bytes(), f"{kind}; charset=utf-8") for name, kind in kinds.items()}
    script = Reply(niivue_module(), "text/javascript; charset=utf-8")
    return {"": found.pop("index.html"), **found, "niivue.js": script}
