"""How fast a training step, a prediction and a start are: beside peers' ways of working, and beside an earlier commit.

    make bench-speed                    all rows, about 10 minutes on two cores
    python tests/benchmarks/bench_speed.py --rows step --repeats 5

Every row is measured with one thread, in seconds of processor time of one image (of one process, for the starts).
Builds and peers take turns, one step each, so that all see the same load of the machine; what counts is the ratio of
the smallest values. `before` is the commit of `--before`, which is checked out into a temporary folder.

The peers are `peers.py`: our own plain form of FedMSA and FedSAM. Weights are random, which costs the same. A step is
forward, loss, backward and AdamW; "cached" steps start from stored features of the frozen trunk, as from the second
epoch on. A build without ONNX Runtime computes its rows by torch. `graph` is what the engine costs once, `volume` the
whole command `pfedsam infer` on a volume of 256 x 256 x 150, whose graph a call before has made. `trim` is a step in an
environment that gives freed memory back at once. Writes results/speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: The last commit before the shortcuts of `pfedsam.networks.arithmetic`.
BEFORE = "3e0e81c"
#: Steps: backbone, side in pixels, adapted blocks, images of a batch.
STEPS: dict[str, tuple[str, int, int | str, int]] = {
    "vit_b 256 px, last 4 blocks, cached": ("vit_b", 256, 4, 4),
    "vit_b 256 px, last 2 blocks, cached (the default)": ("vit_b", 256, 2, 4),
    "vit_b 256 px, all 12 blocks": ("vit_b", 256, "all", 2),
    "lite_medsam 128 px, 8 blocks, cached (the default)": ("lite_medsam", 128, 8, 4),
}
PEERS = {"FedMSA, vit_b 256 px": "fedmsa", "FedSAM, vit_b 256 px": "fedsam"}
#: Slices: experts and LoRA, or none; the engine.
SLICES = {
    "lite_medsam 128 px, bare backbone": (False, "torch"),
    "lite_medsam 128 px, personal model": (True, "torch"),
    "lite_medsam 128 px, bare backbone, ONNX Runtime": (False, "onnx"),
    "lite_medsam 128 px, personal model, ONNX Runtime": (True, "onnx"),
}
GRAPHS = {"lite_medsam 128 px, a graph is made": "make", "lite_medsam 128 px, a graph is opened": "open"}
VOLUME, SHAPE = "pfedsam infer, 256 x 256 x 150, lite_medsam 128 px", (256, 256, 150)
STARTS = {"pfedsam --help": ["--help"], "pfedsam validate --quick, 6 cases": ["validate", "--quick"]}
ROWS: dict[str, Any] = {"step": STEPS, "peer": PEERS, "slice": SLICES, "graph": GRAPHS, "trim": list(STEPS)[-1:]}
TRIMMED = f"{list(STEPS)[-1]}, freed memory given back at once"
KINDS = ("step", "peer", "slice", "graph", "start", "trim", "volume")
TRIM = {"MALLOC_TRIM_THRESHOLD_": "131072"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with; 'none' for no other build")
    parser.add_argument("--rows", default=",".join(KINDS), help=f"kinds of rows, some of {','.join(KINDS)}")
    parser.add_argument("--only", default="", help="rows with these words in their name")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each row in each build")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "speed.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work()
        return
    kinds = options.rows.split(",")
    with _checked_out(options.before) as before:
        measured = _measure(kinds, before, options.repeats, options.only)
    found = {"machine": _machine(), "before": options.before, "repeats": options.repeats, "seconds": measured}
    _print(measured)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


# ---- the worker: one build, asked for one step at a time


def _work() -> None:
    """Answer each line, a kind and a name, with seconds of processor time of one image."""
    import torch

    torch.set_num_threads(1)
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    for line in sys.stdin:
        kind, name = line.strip().split("|")
        if name not in ready:
            torch.manual_seed(0)
            ready[name] = {"step": _step, "trim": _step, "peer": _peer, "slice": _slice, "graph": _graph}[kind](name)
            if kind != "graph":  # which is measured as it is for a process: cold
                ready[name][0]()  # allocations and choices of kernels
        run, images = ready[name]
        started = time.process_time()
        run()
        print(json.dumps((time.process_time() - started) / images), flush=True)


def _network(backbone: str, side: int, blocks: int | str | None) -> Any:
    from pfedsam.networks.adaptation import adapt
    from pfedsam.networks.backbones import get_backbone
    from pfedsam.networks.model import SegmentAnything
    from pfedsam.parameters import Roles, set_trainable

    network = SegmentAnything(backbone, side, 1)
    if blocks is not None:
        places = ("qv", "projection", "mlp")
        adapt(network, get_backbone(backbone).layout, adapted_blocks=blocks, lora_rank=16, lora_places=places)
        set_trainable(network, Roles(), {"shared"})
        network.set_experts(False)
    return network


def _step(name: str) -> tuple[Callable[[], Any], int]:
    import torch

    backbone, side, blocks, batch = STEPS[name]
    network = _network(backbone, side, blocks).train()
    images = torch.rand(batch, 3, side, side)
    cached = blocks != "all"
    given = network.trunk(images) if cached else images
    return _trained(network, network.head if cached else network, given, side), batch


def _peer(name: str) -> tuple[Callable[[], Any], int]:
    import torch
    from peers import Peer

    network, side, batch = Peer("vit_b", 256, PEERS[name]).train(), 256, 2
    return _trained(network, network, torch.rand(batch, 3, side, side), side), batch


def _trained(network: Any, forward: Callable[[Any], Any], given: Any, side: int) -> Callable[[], Any]:
    import torch
    from monai.losses import DiceCELoss

    loss = DiceCELoss(sigmoid=True, batch=True)
    optimizer = torch.optim.AdamW([one for one in network.parameters() if one.requires_grad], 1e-4)
    label = (torch.rand(len(given), 1, side, side) > 0.9).float()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(forward(given), label).backward()
        optimizer.step()

    return step


def _slice(name: str) -> tuple[Callable[[], Any], int]:
    import torch

    personal, engine = SLICES[name]
    network = _predictor(personal)
    images = torch.rand(4, 3, 128, 128)
    compute = network if engine == "torch" else _by_graph(network)

    def predict() -> None:
        with torch.no_grad():
            compute(images)

    return predict, len(images)


def _predictor(personal: bool) -> Any:
    network = _network("lite_medsam", 128, 8 if personal else None).eval()
    if personal:
        network.set_experts(True)
    return network


def _by_graph(network: Any) -> Callable[[Any], Any]:
    """A network as `pfedsam infer` computes it by ONNX Runtime; the network itself in a build that cannot."""
    try:
        from pfedsam.inference.export import export_onnx, open_onnx
    except ImportError:
        return network  # type: ignore[no-any-return]
    with tempfile.TemporaryDirectory() as scratch:
        export_onnx(network, Path(scratch) / "graph.onnx")
        session = open_onnx(Path(scratch) / "graph.onnx")
    return lambda images: session.run(None, {"image": images.numpy()})


def _graph(name: str) -> tuple[Callable[[], Any], int]:
    from pfedsam.inference.export import difference_of_onnx, export_onnx, open_onnx

    network, folder = _predictor(True), tempfile.TemporaryDirectory()
    file = Path(folder.name) / "graph.onnx"
    if GRAPHS[name] == "make":
        return lambda: export_onnx(network, file), 1
    export_onnx(network, file)
    # the folder lives as long as what reads it
    return lambda: (folder, difference_of_onnx(open_onnx(file), network, batch=1)), 1


# ---- the parent: builds take turns


def _measure(kinds: list[str], before: Path | None, repeats: int, only: str) -> dict[str, dict[str, list[float]]]:
    """Seconds by row and build: `now`, `before`, and `trim` for the step in that environment."""
    builds = {"now": ROOT, **({"before": before} if before else {})}
    measured: dict[str, dict[str, list[float]]] = {}
    rows = [(kind, name) for kind in kinds for name in ROWS.get(kind, ()) if only in name]
    with tempfile.TemporaryDirectory() as scratch:
        workers = {build: _worker(root, {}) for build, root in builds.items()}
        workers["trim"] = _worker(ROOT, TRIM)
        try:
            for number in range(repeats):
                for kind, name in rows:
                    asked = {"peer": ["now"], "graph": ["now"], "trim": ["now", "trim"]}.get(kind, list(builds))
                    row = measured.setdefault(name if kind != "trim" else TRIMMED, {})
                    for build in asked:
                        row.setdefault(build, []).append(_asked(workers[build], kind, name))
                print(f"turn {number + 1} of {repeats}", file=sys.stderr, flush=True)
        finally:
            for worker in workers.values():
                worker.stdin.close()
                worker.wait()
        if "start" in kinds:
            _make_site(Path(scratch))
            for name, words in STARTS.items():
                site = [str(Path(scratch) / "site-1")] if "validate" in words else []
                measured[name] = {build: [] for build in builds}
                for _ in range(repeats):
                    for build, root in builds.items():
                        measured[name][build].append(_started(root, [*words, *site]))
        if "volume" in kinds:
            words = _make_volume(Path(scratch))
            _started(ROOT, words)
            measured[VOLUME] = {build: [_started(root, words)] for build, root in builds.items()}
    return measured


def _asked(worker: Any, kind: str, name: str) -> float:
    worker.stdin.write(f"{kind}|{name}\n")
    worker.stdin.flush()
    return float(json.loads(worker.stdout.readline()))


def _environment(root: Path) -> dict[str, str]:
    """The package of a build, before the installed one."""
    return {**os.environ, "PYTHONPATH": f"{root / 'custom'}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}


def _worker(root: Path, variables: dict[str, str]) -> Any:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**_environment(root), **variables}, **pipes)


def _started(root: Path, words: list[str]) -> float:
    """Processor seconds of a command from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pfedsam.cli", *words]
    subprocess.run(command, env=_environment(root), check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _make_site(folder: Path) -> None:
    words = ["phantom", str(folder), "--cases", "6", "--slices", "6", "--sites", "2", "--force"]
    command = [sys.executable, "-m", "pfedsam.cli", *words]
    subprocess.run(command, env=_environment(ROOT), check=True, capture_output=True)


def _make_volume(folder: Path) -> list[str]:
    """The words of a command that segments a volume with a personal model."""
    import nibabel
    import numpy as np

    from pfedsam.bundles import network_of
    from pfedsam.parameters import Roles
    from pfedsam.storage.site_model import SiteModel, write

    values = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "volume.nii.gz")
    told = {"bundle": "brain_lesion_mri", "overrides": {}, "round": 0, "final": True}
    write(folder / "model.safetensors", SiteModel.of(network_of("brain_lesion_mri"), Roles(), **told))
    words = ["infer", str(folder / "volume.nii.gz"), "--model", str(folder / "model.safetensors"), "--force"]
    return [*words, "--out", str(folder / "out")]


@contextmanager
def _checked_out(commit: str) -> Iterator[Path | None]:
    """A working tree of another commit; None where there is none to be had."""
    if commit == "none":
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        made = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(tree), commit], capture_output=True, text=True
        )
        if made.returncode:
            print(f"no build of {commit}: {made.stderr.strip()}", file=sys.stderr)
            yield None
            return
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=False)


def _machine() -> dict[str, Any]:
    import torch

    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bfloat16 units": bool(flags & {"avx512_bf16", "amx_bf16"}),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _print(measured: dict[str, dict[str, list[float]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    best = {name: {build: min(values) for build, values in row.items()} for name, row in measured.items()}
    table = Table("quantity", "now (s)", "before (s)", "faster", *(f"{peer} / now" for peer in PEERS.values()))
    for name, row in best.items():
        # what costs time, not a build: shown as if it had been so before
        now, before = row["now"], row.get("before", row.get("trim"))
        with_peers = name in STEPS and name.startswith("vit_b")
        peers = [f"{best[peer]['now'] / now:.1f}" if with_peers and peer in best else "" for peer in PEERS]
        faster = "" if before is None else f"{before / now:.2f}"
        table.add_row(name, f"{now:.3f}", "" if before is None else f"{before:.3f}", faster, *peers)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
