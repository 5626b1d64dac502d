"""Weights by name: a download that is resumed, checked and never half there; nothing but https and this machine."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pfedsam.errors import PFedSAMError
from pfedsam.networks import download as module
from pfedsam.networks.backbones import BACKBONES
from pfedsam.networks.download import CHUNK, download
from pfedsam.networks.weights import CHECKPOINTS, Checkpoint, file_of, locate, weights_folder

DATA = bytes(range(256)) * 3000


@dataclass
class Behaviour:
    """What the server does, and what it was asked."""

    ranges: bool = True
    cut: list[int] = field(default_factory=list)
    status: int | None = None
    location: str | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            behaviour.asked.append(asked)
            if behaviour.location:
                self.send_response(302)
                self.send_header("Location", behaviour.location)
                self.end_headers()
                return
            if behaviour.status:
                self.send_error(behaviour.status)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and behaviour.ranges else 0
            if start >= len(DATA):
                self.send_error(416)
                return
            body = DATA[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: behaviour.cut.pop(0)] if behaviour.cut else body)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/weights.pth", behaviour
    http.shutdown()
    http.server_close()


def checkpoint(url: str | None, **settings) -> Checkpoint:
    told = {"bytes": len(DATA), "checksum": f"sha256:{hashlib.sha256(DATA).hexdigest()}", **settings}
    return Checkpoint("vit_b", "weights.pth", licence="none", page="none", url=url, **told)


def refused(call, *args, match: str | None = None, **kwargs) -> str:
    with pytest.raises(PFedSAMError, match=match) as caught:
        call(*args, **kwargs)
    assert caught.value.code == "E10"
    return str(caught.value)


@pytest.mark.parametrize("size", [len(DATA), None])
def test_file_is_complete_and_told_in_bytes(server, tmp_path, size):
    told = []
    path = download(checkpoint(server[0], bytes=size), tmp_path, progress=lambda *bytes_: told.append(bytes_))
    assert path.read_bytes() == DATA and told[-1] == (len(DATA), len(DATA))
    assert not list(tmp_path.glob("*.part"))


def test_md5_is_a_checksum_too(server, tmp_path):
    md5 = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
    assert download(checkpoint(server[0], checksum=f"md5:{md5}"), tmp_path).read_bytes() == DATA


def test_a_part_is_completed_by_asking_for_the_rest_only(server, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(DATA[:1000])
    assert download(checkpoint(server[0]), tmp_path).read_bytes() == DATA
    assert server[1].asked == ["bytes=1000-"]


def test_a_server_without_ranges_is_asked_from_the_start(server, tmp_path):
    server[1].ranges = False
    (tmp_path / "weights.pth.part").write_bytes(b"x" * 1000)
    assert download(checkpoint(server[0]), tmp_path).read_bytes() == DATA


def test_a_cut_connection_is_resumed_in_the_same_call(server, tmp_path):
    server[1].cut = [CHUNK + 5000, 2 * CHUNK + 7000]
    assert download(checkpoint(server[0]), tmp_path, pause=0).read_bytes() == DATA
    assert server[1].asked == [None, f"bytes={CHUNK}-", f"bytes={3 * CHUNK}-"]


def test_a_download_that_stays_cut_is_an_error_that_keeps_the_part_for_the_next_time(server, tmp_path):
    server[1].cut = [CHUNK + 1] * module.TRIES
    message = refused(download, checkpoint(server[0]), tmp_path, pause=0)
    assert server[0] in message and str(tmp_path / "weights.pth") in message
    assert (tmp_path / "weights.pth.part").read_bytes() == DATA[: CHUNK * module.TRIES]
    assert not (tmp_path / "weights.pth").exists()
    assert download(checkpoint(server[0]), tmp_path).read_bytes() == DATA


def test_a_part_as_large_as_the_file_is_only_checked(server, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(DATA)
    assert download(checkpoint(server[0]), tmp_path).read_bytes() == DATA


def test_a_part_larger_than_the_file_is_fetched_anew(server, tmp_path):
    (tmp_path / "weights.pth.part").write_bytes(DATA + b"more")
    assert download(checkpoint(server[0]), tmp_path, pause=0).read_bytes() == DATA


def test_a_wrong_checksum_leaves_no_file_and_no_part(server, tmp_path):
    refused(download, checkpoint(server[0], checksum="sha256:" + "0" * 64), tmp_path, match="expected 0000")
    assert not list(tmp_path.glob("weights*"))


def test_a_wrong_size_is_refused_before_it_is_fetched(server, tmp_path):
    refused(download, checkpoint(server[0], bytes=7), tmp_path, match="expected 7")
    assert not list(tmp_path.glob("weights*"))


def test_a_page_that_is_not_there_is_named(server, tmp_path):
    server[1].status = 404
    refused(download, checkpoint(server[0]), tmp_path, match=f"{re.escape(server[0])} answers 404")
    assert len(server[1].asked) == 1


def test_nothing_is_fetched_when_the_right_file_is_there(server, tmp_path):
    (tmp_path / "weights.pth").write_bytes(DATA)
    assert download(checkpoint(server[0]), tmp_path) == tmp_path / "weights.pth"
    assert server[1].asked == []


def test_a_wrong_file_is_named_and_not_overwritten(server, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"mine")
    refused(download, checkpoint(server[0]), tmp_path, match=re.escape(str(tmp_path / "weights.pth")))
    assert (tmp_path / "weights.pth").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/a.pth", "ftp://127.0.0.1/a.pth", "file:///etc/passwd", "http://a.b/"]
)
def test_other_addresses_than_https_are_refused_before_a_connection(monkeypatch, tmp_path, url):
    monkeypatch.setattr(module.requests, "get", lambda *_, **__: pytest.fail("a connection was made"))
    refused(download, checkpoint(url), tmp_path, match="not an https address")


def test_a_redirect_away_from_https_is_refused(server, tmp_path):
    server[1].location = "http://192.0.2.1/a.pth"
    refused(download, checkpoint(server[0]), tmp_path, match=r"192\.0\.2\.1.*not an https address")


def test_two_downloads_at_once_make_one_good_file(server, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(download(checkpoint(server[0]), tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0].read_bytes() == DATA and len(server[1].asked) == 1


def test_a_full_disk_is_told_before(server, tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    refused(download, checkpoint(server[0]), tmp_path, match="no room")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_catalogue_is_complete(name):
    one = CHECKPOINTS[name]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", one.checksum)
    assert one.backbone in BACKBONES and one.licence
    assert one.package or one.url.startswith("https://")


def test_every_backbone_with_weights_names_one_of_its_own():
    for name, backbone in BACKBONES.items():
        assert (name == "vit_test") == (backbone.checkpoint is None)
        assert backbone.checkpoint is None or CHECKPOINTS[backbone.checkpoint].backbone == name


def test_a_name_is_found_in_the_folder_of_the_environment_and_its_absence_tells_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PFEDSAM_WEIGHTS", str(tmp_path))
    message = refused(locate, "sam_vit_b")
    path = tmp_path / "sam_vit_b_01ec64.pth"
    assert str(path) in message and "pfedsam models download sam_vit_b" in message and "PFEDSAM_CHECKPOINT" in message
    path.write_bytes(b"")
    assert locate("sam_vit_b") == (path, CHECKPOINTS["sam_vit_b"].checksum)
    assert weights_folder() == tmp_path


def test_packaged_weights_are_on_every_machine_and_a_path_is_taken_as_it_is(tmp_path):
    path, checksum = locate("lite_medsam")
    assert path == file_of("lite_medsam") and path.stat().st_size == CHECKPOINTS["lite_medsam"].bytes
    assert checksum.startswith("sha256:")
    assert locate(str(tmp_path / "own.pth")) == (tmp_path / "own.pth", None)


def test_catalogue_and_download_import_no_torch():
    code = "import sys, pfedsam.networks.download; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
