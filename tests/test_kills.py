"""A process is killed (SIGKILL) while it writes: what it acknowledged is whole, and the next one starts as ever."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from killed import Deaths, Writer
from torch import Tensor

from pfedsam.bundles import network_of
from pfedsam.data.phantom import write_phantom
from pfedsam.files import append_line, read_lines
from pfedsam.inference.export import export_model, export_torchscript
from pfedsam.networks.download import download
from pfedsam.networks.weights import Checkpoint, check_file
from pfedsam.parameters import Roles
from pfedsam.report.page import write_report
from pfedsam.storage.site_model import SiteModel, read, write
from pfedsam.storage.state import SiteState
from pfedsam.storage.state_files import PREVIOUS
from pfedsam.storage.state_list import list_states
from pfedsam.training.feature_store import FeatureStore

#: How many of what was acknowledged before the last are looked at after each kill.
LAST = 20
TINY = {"backbone": "vit_test", "image_size": 64}


class States:
    """`SiteState.save`, round after round."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, acknowledged: list[int]) -> None:
        self.state = SiteState(self.root, "federation", "site-1", "brain", "ab" * 32)
        self.state.open()
        found = self.state.load()
        names = {path.name for path in self.state.folder.iterdir()}
        assert not [name for name in names if name.endswith(".tmp")]
        assert found is not None or not acknowledged
        if found is not None:
            self._check(found)
            # the one behind the last acknowledged may have come to its place, too
            last = acknowledged[-1] if acknowledged else 0
            assert found.info["round"] in (last, last + 1)
            assert [one.problem for one in list_states(self.root)] == [""]
        if PREVIOUS in names:
            self._check(read(self.state.folder / PREVIOUS))

    def write(self, number: int) -> None:
        tensors = {"a": torch.full((50_000,), float(number))}
        info = {"fingerprint": "ab" * 32, "roles": {"shared": [], "personal": []}, "round": number}
        info["val_dice_personal"] = number / (number + 1)
        self.state.save(SiteModel(tensors, {"b": torch.ones(3)}, {}, info))

    @staticmethod
    def _check(found: SiteModel) -> None:
        assert torch.equal(found.shared["a"], torch.full((50_000,), float(found.info["round"])))


class Features:
    """`FeatureStore.features` of one new image after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, 0

    def trunk_fingerprint(self) -> str:
        return "ab" * 32

    def trunk(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return 2 * images

    def start(self, acknowledged: list[int]) -> None:
        last = acknowledged[-LAST:]
        if last:
            images = torch.cat([self._image(number) for number in last])
            assert torch.equal(FeatureStore(str(self.folder)).features(self.trunk, images, last), 2 * images)
            assert self.seen == 0
            more = self._image(last[-1] + 1)  # which may be half there
            assert torch.equal(FeatureStore(str(self.folder)).features(self.trunk, more, [0]), 2 * more)

    def write(self, number: int) -> None:
        FeatureStore(str(self.folder)).features(self.trunk, self._image(number), [number])

    @staticmethod
    def _image(number: int) -> Tensor:
        return torch.full((1, 3, 64, 64), float(number))


class Records:
    """`append_line`, with lines that are longer than a buffer, too."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "lines.jsonl"

    def start(self, acknowledged: list[int]) -> None:
        found = read_lines(self.file)
        assert all(len(one["text"]) == self._length(one["key"]) for one in found)
        keys = [one["key"] for one in found]
        assert keys == sorted(keys) and set(acknowledged) <= set(keys)

    def write(self, number: int) -> None:
        append_line(self.file, {"key": number, "text": "x" * self._length(number)})

    @staticmethod
    def _length(number: int) -> int:
        return number * 7919 % 200_000 if number % 3 == 0 else number % 50


class Downloads:
    """`download` from a server on this machine, which sends what is left of a file, slowly."""

    def __init__(self, folder: Path, url: str, content: bytes) -> None:
        self.folder, self.url, self.content = folder, url, content
        self.checksum = f"sha256:{hashlib.sha256(content).hexdigest()}"

    def start(self, acknowledged: list[int]) -> None:
        for number in acknowledged[-LAST:]:
            check_file(self.folder / f"{number}.pth", self.checksum)

    def write(self, number: int) -> None:
        checkpoint = Checkpoint("vit_b", f"{number}.pth", len(self.content), self.checksum, "", "", self.url)
        download(checkpoint, self.folder, pause=0.01)


class Reports:
    """`write_report` onto the same page, with and without pictures."""

    def __init__(self, folder: Path, run: Path) -> None:
        self.page, self.run = folder / "page.html", run

    def start(self, acknowledged: list[int]) -> None:
        assert self.page.exists() or not acknowledged
        if self.page.exists():
            text = self.page.read_text()
            assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>") and "site-2" in text

    def write(self, number: int) -> None:
        write_report(self.run, self.page, pictures=bool(number % 2))


class Exports:
    """`export_model` and `export_torchscript` onto the same files."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.out, self.script = model, folder / "model.safetensors", folder / "model.pt"
        self.network = network_of("brain_lesion_mri", TINY).eval()

    def start(self, acknowledged: list[int]) -> None:
        for path, first in ((self.out, 1), (self.script, 2)):
            assert path.exists() or not acknowledged or acknowledged[-1] < first
        if self.out.exists():
            assert read(self.out).info["labels"] == ["lesion"]
        if self.script.exists():
            assert torch.jit.load(self.script)(torch.rand(1, 3, 64, 64)).shape == (1, 1, 64, 64)

    def write(self, number: int) -> None:
        if number % 2:
            export_model(self.model, self.out)
        else:
            export_torchscript(self.network, self.script)


@contextmanager
def served(content: bytes) -> Iterator[str]:
    """The address of a file on this machine; a client may ask for the rest of it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range", "bytes=0-")
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            try:
                self.wfile.write(content[first:])
            except ConnectionError:  # killed
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/weights.pth"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A forked child has none of its parent's threads."""
    torch.set_num_threads(1)


def killed(writer: Writer, folder: Path, times: int) -> Deaths:
    """Kill a writer so often, and show that the kills have hit it."""
    deaths = Deaths(writer, folder)
    deaths.kill(times)
    found = f"{times} kills, {deaths.where['call']} in a write, {deaths.where['file']} while a file was being written"
    print(f"{type(writer).__name__}: {found}, {len(deaths.acknowledged)} acknowledged")
    assert deaths.where["call"] >= times // 2 and deaths.where["file"] >= times // 4, found
    return deaths


CHEAP = [States, Features, Records]


@pytest.mark.parametrize("kind", CHEAP)
def test_what_was_acknowledged_is_whole_after_a_few_kills(kind: type, tmp_path: Path) -> None:
    assert killed(kind(tmp_path), tmp_path, 8).acknowledged


def test_the_kills_find_a_write_that_is_not_whole(tmp_path: Path) -> None:
    """They would be no proof if they found nothing here: the file is written where it is read."""

    class Plain(Records):
        def start(self, acknowledged: list[int]) -> None:
            path = self.file.with_suffix(".json")
            assert not path.exists() or json.loads(path.read_text())

        def write(self, number: int) -> None:
            with self.file.with_suffix(".json").open("w") as file:
                file.write(f"[{number}]")

    with pytest.raises(AssertionError, match="JSONDecodeError"):
        killed(Plain(tmp_path), tmp_path, 100)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of `pfedsam simulate`."""
    folder = tmp_path_factory.mktemp("simulated")
    write_phantom(folder / "data", sites=2, cases=4, shape=(32, 32, 6))
    options = ("backbone=vit_test", "image_size=32", "batch_size=4", "positives_per_case=2", "negatives_per_case=1")
    words = [word for option in options for word in ("--set", option)]
    line = [sys.executable, "-m", "pfedsam.cli", "simulate", folder / "data", "--out", folder / "run", "--rounds", "1"]
    subprocess.run([*line, *words], check=True, cwd=folder)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "times"), [(States, 50), (Features, 40), (Records, 40)])
def test_what_was_acknowledged_is_whole_after_many_kills(kind: type, times: int, tmp_path: Path) -> None:
    killed(kind(tmp_path), tmp_path, times)


@pytest.mark.slow
def test_downloads_that_were_acknowledged_are_whole(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(8 << 20)
    with served(content) as url:
        killed(Downloads(tmp_path, url, content), tmp_path, 30)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".pth", ".part", ".lock"}


@pytest.mark.slow
def test_reports_that_were_acknowledged_are_whole(run: Path, tmp_path: Path) -> None:
    killed(Reports(tmp_path, run), tmp_path, 20)


@pytest.mark.slow
def test_exports_that_were_acknowledged_are_whole(tmp_path: Path) -> None:
    model = tmp_path / "state.safetensors"
    write(model, SiteModel.of(network_of("brain_lesion_mri", TINY), Roles(), bundle="brain_lesion_mri", overrides=TINY))
    killed(Exports(tmp_path, model), tmp_path, 20)
