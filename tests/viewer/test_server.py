"""Who may ask the viewer's server, for what, and what it answers."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfedsam.errors import PFedSAMError
from pfedsam.viewer.niivue import niivue_module
from pfedsam.viewer.server import ViewerServer
from pfedsam.viewer.session import LAYERS, Session
from pfedsam.viewer.subjects import subjects_of

Serve = Callable[[Session], ViewerServer]
#: `Session`s of these tests show images without a model.
OWN = "__own__"


def ask(
    server: ViewerServer, path: str, method: str = "GET", body: bytes | None = None, token: bool = True, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of the answer to a request that is sent exactly so."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    target = f"/{server.token}/{path}" if token else path
    connection.putrequest(method, target, skip_host="Host" in headers, skip_accept_encoding=True)
    sent = {name.replace("_", "-"): own(server, value) for name, value in headers.items()}
    if body is not None:
        sent.setdefault("Content-Length", str(len(body)))
    for name, value in sent.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    found = reply.status, reply.read(), {name.lower(): value for name, value in reply.getheaders()}
    connection.close()
    return found


def own(server: ViewerServer, value: str) -> str:
    return value.replace(OWN, f"127.0.0.1:{server.server_port}")


ORIGIN = f"http://{OWN}"
SAVE = {"method": "POST", "body": b"\0" * (20 * 24 * 8)}


@pytest.fixture
def server(site: Path, serve: Serve) -> ViewerServer:
    return serve(Session(subjects_of(site)))


@pytest.mark.parametrize(
    ("path", "how"),
    [
        ("/", {"token": False}),
        ("/cases", {"token": False}),
        ("/wrong-token/cases", {"token": False}),
        ("/wrong-token/", {"token": False}),
        ("//cases", {"token": False}),
        ("http://127.0.0.1/cases", {"token": False}),
        ("../cases", {}),
        ("case/0/../../cases", {}),
        ("..%2f..%2fetc%2fpasswd", {}),
        ("%2e%2e/cases", {}),
        ("../../../../../../etc/passwd", {}),
        ("/etc/passwd", {}),
        ("viewer.js/../server.py", {}),
        ("cases?", {}),
        ("cases?x=1", {}),
        ("case/00/about", {}),
        ("case/-1/about", {}),
        ("case/2/about", {}),
        ("case/0/labels", {}),
        ("case/0/", {}),
        ("index.html", {}),
        ("cases", {"Origin": "http://evil.example"}),
        ("cases", {"Origin": "null"}),
        ("cases", {"Origin": f"https://{OWN}"}),
        ("cases", {"Sec_Fetch_Site": "cross-site"}),
        ("cases", {"Sec_Fetch_Site": "same-site"}),
        ("cases", {"Host": "evil.example"}),
        ("cases", {"Host": f"evil.{OWN}"}),
        ("cases", {"Host": "127.0.0.1"}),
        ("cases", {"Host": "localhost:1"}),
        ("cases", {"method": "HEAD"}),
        ("cases", {"method": "PUT", "body": b""}),
        ("cases", {"method": "DELETE"}),
        ("cases", {"method": "OPTIONS", "Origin": ORIGIN}),
        ("cases", {"method": "POST", "body": b"", "Origin": ORIGIN}),
        ("case/1/save-empty", {**SAVE}),
        ("case/1/save-empty", {**SAVE, "Origin": "http://evil.example"}),
        ("case/1/save-empty", {**SAVE, "Origin": ORIGIN, "Sec_Fetch_Site": "cross-site"}),
        ("case/1/save-labels", {**SAVE, "Origin": ORIGIN}),
        ("case/1/save-empty", {**SAVE, "Origin": ORIGIN, "Content_Length": "99999999"}),
        ("case/1/save-empty", {**SAVE, "Origin": ORIGIN, "Content_Length": "-1"}),
        ("case/0/segment", {"method": "POST", "body": b'{"model": "x", "box": [1]}', "Origin": ORIGIN}),
        ("case/0/segment", {"method": "POST", "body": b"[]", "Origin": ORIGIN}),
        ("case/0/segment", {"method": "POST", "body": b"no json", "Origin": ORIGIN}),
    ],
)
def test_what_is_not_the_pages_own_gets_403_and_nothing_else(
    server: ViewerServer, site: Path, path: str, how: dict[str, Any]
) -> None:
    status, body, headers = ask(server, path, **how)
    assert (status, body) == (403, b"")
    assert "content-type" not in headers and headers["server"] == "pfedsam"
    assert not (site / "labels" / "two.nii.gz").exists()


def test_what_is_no_request_gets_403(server: ViewerServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as one:
        one.sendall(b"nonsense\r\n\r\n")
        told = one.recv(1 << 16)
    assert b"nonsense" not in told and (b" 403 " in told or told == b"")


def test_it_listens_on_loopback_alone(server: ViewerServer) -> None:
    assert server.server_address[0] == "127.0.0.1"


def test_each_viewer_has_a_token_of_its_own(site: Path, serve: Serve) -> None:
    tokens = {serve(Session(subjects_of(site))).token for _ in range(2)}
    assert len(tokens) == 2 and all(len(token) >= 40 for token in tokens)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_the_page_may_have_all_that_it_asks_for(server: ViewerServer, name: str) -> None:
    host = f"{name}:{server.server_port}"
    own_headers = {"Host": host, "Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
    for path in ("", "viewer.css", "viewer.js", "niivue.js", "cases", "case/0/about", "case/0/image", "case/0/truth"):
        status, body, headers = ask(server, path, **own_headers)
        assert status == 200 and body, path
        assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]
    assert [one["case"] for one in json.loads(ask(server, "cases")[1])] == ["one", "two"]


def test_what_goes_wrong_is_a_sentence(server: ViewerServer) -> None:
    for path in ("case/0/personal", "case/1/truth", "case/0/probability-global-1", "case/0/difference-global"):
        status, body, _ = ask(server, path)
        assert status == 409 and json.loads(body)["error"].startswith("E32: "), path


def test_the_page_names_no_other_address(server: ViewerServer) -> None:
    for path in ("", "viewer.css", "viewer.js"):
        text = ask(server, path)[1].decode()
        assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", text), path
        assert "style=" not in text and "onclick" not in text


def test_the_script_asks_for_layers_that_there_are(server: ViewerServer) -> None:
    script = ask(server, "viewer.js")[1].decode()
    for word in ("image", "difference-${model}", "probability-${model}-${n + 1}", "found-${name}", "save-${began}"):
        assert word in script
    assert {"difference-personal", "probability-global-2", "box"} <= set(LAYERS)


def test_niivue_is_one_module_that_exports_its_class() -> None:
    text = niivue_module()[-300:].decode()
    assert re.search(r"export\{[\w$]+ as Niivue\};\n$", text)


def test_another_niivue_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = tmp_path / "ipyniivue" / "static"
    static.mkdir(parents=True)
    (tmp_path / "ipyniivue" / "__init__.py").write_text("raise SystemExit('imported')")
    (static / "widget.js").write_bytes(niivue_module()[: -len("export{xx as Niivue};\n")])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PFedSAMError, match=r"E31: .*widget\.js of ipyniivue 2\.4\.4 is not that of 2\.4\.4"):
        niivue_module()
    (static / "widget.js").unlink()
    with pytest.raises(PFedSAMError, match=r"E31: .*pfedsam\[viewer\]"):
        niivue_module()
