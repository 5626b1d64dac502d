"""`pfedsam label-server` with a real MONAI Label, asked by the client that MONAI Label's Slicer module uses."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel
import numpy as np
import psutil
import pytest
import requests
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.data.phantom import write_phantom

PYTHON = os.environ.get("PFEDSAM_MONAILABEL") or (sys.executable if importlib.util.find_spec("monailabel") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="PFEDSAM_MONAILABEL names no Python with MONAI Label (clinicians.md)"),
]
#: Calls methods of the client one after the other: JSON in, JSON out; an error is its text.
CLIENT = """
import json, sys
from monailabel.client.client import MONAILabelClient
client = MONAILabelClient(sys.argv[1], tmpdir=sys.argv[2])
said = []
for method, arguments in json.load(sys.stdin):
    try:
        said.append(getattr(client, method)(*arguments))
    except Exception as error:
        said.append({"error": f"{error} {getattr(error, 'msg', '')}"})
json.dump(said, sys.stdout)
"""
MODEL = "brain_lesion_mri-round3-research-only"


@dataclass
class Running:
    """A server that runs.

    Attributes:
        address: with the token.
        process: of the command.
        site, model: that it serves.
        slicer: where the client puts what it gets.
        temporary: where the command's folder for what is received lies.
    """

    address: str
    process: subprocess.Popen[str]
    site: Path
    model: Path
    slicer: Path
    temporary: Path

    def call(self, *calls: tuple[str, list[Any]]) -> list[Any]:
        """Results of calls of MONAI Label's client, in its own environment."""
        command = [str(PYTHON), "-c", CLIENT, self.address, str(self.slicer)]
        done = subprocess.run(command, input=json.dumps(calls), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @property
    def cases(self) -> list[str]:
        return sorted(path.name.removesuffix(".nii.gz") for path in (self.site / "images").iterdir())

    def image(self, case: str) -> Path:
        return self.site / "images" / f"{case}.nii.gz"

    def infer(self, case: str, *more: str) -> np.ndarray:
        """What `pfedsam infer` finds."""
        out = self.temporary / f"infer-{len(list(self.temporary.iterdir()))}"
        words = ["infer", str(self.image(case)), "--model", str(self.model), "--out", str(out), *more]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return values(next(out.glob("*.nii.gz")))


def values(path: Path | str) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(site: Path, model: Path, temporary: Path, *more: str) -> subprocess.Popen[str]:
    home = temporary / "home"
    home.mkdir(exist_ok=True)
    # a page's name in the environment must not open the server
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary), "MONAI_LABEL_TASKS_TRAIN": "true"}
    command = [sys.executable, "-m", "pfedsam.cli", "label-server", str(site), "--model", str(model)]
    return subprocess.Popen(
        [*command, "--monailabel", str(PYTHON), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("label")
    site = write_phantom(folder / "data", sites=1, cases=3, shape=(48, 44, 8))[0]
    sorted((site / "labels").iterdir())[0].unlink()
    temporary, slicer = folder / "tmp", folder / "slicer"
    temporary.mkdir()
    slicer.mkdir()
    process = start(site, model_file, temporary, "--port", "0")
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if line.startswith("http://"):
            break
    try:
        assert said and said[-1].startswith("http://127.0.0.1:"), "".join(said)
        assert "Research only" in "".join(said) and "0.744" in "".join(said)
        yield Running(said[-1].strip(), process, site, model_file, slicer, temporary)
    finally:
        process.terminate()
        process.wait()


def test_slicer_learns_that_it_is_research_only_which_model_and_what_dice(running: Running) -> None:
    (info,) = running.call(("info", []))
    assert "research only" in info["name"] and "round 3 (final), validation Dice 0.744" in info["name"]
    assert set(info["models"]) == {MODEL, f"box-{MODEL}"} and info["labels"] == ["lesion"]
    assert info["models"][MODEL]["description"].startswith("Research only, not for diagnostic use. Personal model of ")
    assert [info["models"][name]["type"] for name in (MODEL, f"box-{MODEL}")] == ["segmentation", "deepedit"]
    assert info["trainers"] == {} and info["datastore"]["total"] == 3 and info["datastore"]["completed"] == 2


def test_a_case_comes_back_as_infer_segments_it_voxel_for_voxel(running: Running) -> None:
    (sample,) = running.call(("next_sample", ["without-label", {}]))
    case = sample["id"]
    assert case == running.cases[0] and Path(sample["path"]) == running.image(case)
    ((file, told),) = running.call(("infer", [MODEL, case, {}]))
    expected = running.infer(case)
    assert expected.any() and (values(file) == expected).all()
    assert (nibabel.load(file).affine == nibabel.load(running.image(case)).affine).all()
    assert told["label_names"] == ["lesion"] and "Research only" in told["about"]
    assert b"Research only. pFedSAM" in bytes(nibabel.load(file).header["descrip"])
    assert (expected != running.infer(case, "--global")).any(), "the experts must matter"


def test_an_roi_is_a_box_of_infer_and_points_are_refused(running: Running) -> None:
    case = running.cases[1]
    roi = {"label": "lesion", "lesion": [], "roi": [40, 8, 10, 30, 6, 2]}
    (found, points, whole) = running.call(
        ("infer", [f"box-{MODEL}", case, roi]),
        ("infer", [f"box-{MODEL}", case, {**roi, "lesion": [[1, 2, 3]]}]),
        ("infer", [f"box-{MODEL}", case, {"label": "lesion", "lesion": []}]),
    )
    expected = running.infer(case, "--box", "8,40,10,30,2,6")
    assert (values(found[0]) == expected).all()
    assert (expected != running.infer(case)).any(), "the box must matter"
    assert "409" in points["error"] and "takes a box, no points" in points["error"]
    assert whole[1]["label_names"] == ["lesion"]


def test_all_cases_come_in_order_and_again(running: Running) -> None:
    samples = running.call(*[("next_sample", ["all", {}])] * 4)
    assert [sample["id"] for sample in samples] == [*running.cases, running.cases[0]]


def test_what_is_submitted_becomes_a_label_and_replaces_nothing(running: Running) -> None:
    before, case = snapshot(running.site), running.cases[0]
    image = nibabel.load(running.image(case))
    label = np.zeros(image.shape, np.int16)
    label[10:20, 12:18, 3:5] = 1
    file = running.slicer / "drawn.nii.gz"
    nibabel.save(nibabel.Nifti1Image(label, image.affine), file)
    told = {"label_info": [{"name": "lesion", "idx": 1}], "model": MODEL}
    first, second, wrong, nowhere = running.call(
        ("save_label", [case, str(file), "final", told]),
        ("save_label", [case, str(file), "final", told]),
        ("save_label", [case, str(file), "final", {"label_info": [{"name": "mine", "idx": 1}]}]),
        ("save_label", ["../other", str(file), "../../final", told]),
    )
    assert [first["saved as"], second["saved as"]] == [f"labels/{case}.nii.gz", f"corrections/{case}.nii.gz"]
    assert "E07" in wrong["error"] and "E02" in nowhere["error"]
    after = snapshot(running.site)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {first["saved as"], second["saved as"]}
    for name in (first["saved as"], second["saved as"]):
        assert (values(running.site / name) == label).all() and (running.site / name).stat().st_mode & 0o777 == 0o600


def test_a_volume_of_ones_own_is_segmented_and_kept_nowhere(running: Running) -> None:
    before, case = snapshot(running.site), running.cases[2]
    copy = running.slicer / "tmpabc.nii.gz"
    copy.write_bytes(running.image(case).read_bytes())
    added, found, saved, taken = running.call(
        ("upload_image", [str(copy), "PACS 7: head"]),
        ("infer", [MODEL, "PACS 7: head", {}]),
        ("save_label", ["PACS 7: head", str(copy), "final", {}]),
        ("upload_image", [str(copy), case]),
    )
    assert added == {"image": "PACS 7: head"}
    assert (values(found[0]) == running.infer(case)).all()
    assert "E02" in saved["error"] and "E09" in taken["error"]
    assert snapshot(running.site) == before


def test_paths_in_a_request_are_not_followed(running: Running) -> None:
    other = running.temporary / "other.nii.gz"
    other.write_bytes(running.image(running.cases[0]).read_bytes())
    asked = running.call(
        ("infer", [MODEL, str(other), {}]),
        ("infer", [MODEL, running.cases[0], {"image": str(other)}]),
        ("infer", [MODEL, "", {}, None, str(other)]),
        ("infer", ["another", running.cases[0], {}]),
    )
    assert all("error" in one for one in asked), asked
    assert all("409" in one["error"] for one in asked), asked


def test_only_slicer_is_answered_and_only_on_loopback(running: Running) -> None:
    parts = urlsplit(running.address)
    bare = f"http://{parts.netloc}"
    image = f"/datastore/image?image={running.cases[0]}"
    assert requests.get(running.address + image).content == running.image(running.cases[0]).read_bytes()
    refused = [
        requests.get(f"{bare}/info/"),
        requests.get(f"{bare}{image}"),
        requests.get(running.address + "/info/", headers={"Origin": bare}),
        requests.get(running.address + "/info/", headers={"Host": "evil.example"}),
        requests.delete(running.address + image),
        requests.delete(f"{running.address}/datastore/label?id={running.cases[1]}&tag=final"),
        requests.get(f"{running.address}/logs/"),
        requests.post(f"{running.address}/train/x"),
        requests.get(f"{running.address}/datastore/dataset"),
        requests.get(running.address + "/"),
    ]
    assert [reply.status_code for reply in refused] == [403] * len(refused)
    assert "Access-Control-Allow-Origin" not in requests.get(running.address + "/info/").headers
    ours = [psutil.Process(running.process.pid), *psutil.Process(running.process.pid).children(recursive=True)]
    ends = [one.laddr.ip for process in ours for one in process.net_connections("tcp") if one.laddr]
    assert set(ends) == {"127.0.0.1"}
    remote = {one.raddr.ip for process in ours for one in process.net_connections("inet") if one.raddr}
    assert remote <= {"127.0.0.1"}


def test_nothing_is_logged_and_what_was_received_is_the_owners_alone(running: Running) -> None:
    (scratch,) = running.temporary.glob("pfedsam-label-*")
    assert scratch.stat().st_mode & 0o777 == 0o700
    log = (scratch / "server.log").read_text()
    assert not any(case in log for case in running.cases) and urlsplit(running.address).path[1:] not in log


def test_a_port_that_is_taken_is_said_and_leaves_no_process(running: Running) -> None:
    port = urlsplit(running.address).port
    second = start(running.site, running.model, running.temporary, "--port", str(port))
    said, _ = second.communicate()
    assert second.returncode == 1 and "E22" in said and f"port {port} cannot be used" in said


def test_a_python_without_monailabel_is_refused(running: Running) -> None:
    words = ["label-server", str(running.site), "--model", str(running.model), "--monailabel", str(running.site)]
    assert "E31" in str(CliRunner().invoke(app, words).exception)


def test_at_the_end_nothing_is_left(running: Running) -> None:
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert children
    running.process.send_signal(signal.SIGINT)
    assert running.process.stdout is not None
    rest = running.process.stdout.read()
    assert running.process.wait() == 128 + signal.SIGINT
    assert "The server is closed" in rest and "Traceback" not in rest
    assert not any(child.is_running() for child in children)
    assert not list(running.temporary.glob("pfedsam-label-*"))


def test_a_command_that_is_killed_takes_the_server_with_it(running: Running) -> None:
    process = start(running.site, running.model, running.temporary, "--port", "0")
    assert process.stdout is not None
    assert any(line.startswith("http://") for line in iter(process.stdout.readline, ""))
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    # it holds what was sent, and nobody was left to delete it: the next start does
    (left,) = running.temporary.glob("pfedsam-label-*")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        again = start(running.site, running.model, running.temporary, "--port", str(taken.getsockname()[1]))
        again.communicate()
    assert again.returncode == 1 and not left.exists()
