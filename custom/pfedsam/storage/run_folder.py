"""The folder of a simulated federation: where NVFlare's simulator leaves what, and what was sent in each round.

<run>/run.json       what decides the result, see `pfedsam.deployment.run_terms`
<run>/workspace      of the last start; the simulator empties it when it starts again
<run>/earlier/<n>    what the starts before it told of their rounds: TensorBoard's files, what was sent
<run>/progress.json  where its command is, see `pfedsam.storage.progress`; <run>/live.html, the page about it
<run>/before-<time>  a run that was moved aside for another one
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from pfedsam.files import read_lines
from pfedsam.ownership import claim, marker

WORKSPACE, EARLIER = "workspace", "earlier"
#: The simulator's name of every run, in the folder of each site and of the server.
RUN = "simulate_job"
#: What a site's filter wrote down of all that left it, in the folder of the site's run; see `federated.records`.
SENT_FILE = "pfedsam_sent.jsonl"
#: What the server wrote down of each round: what became of each site's update; see `federated.records`.
ROUNDS_FILE = "pfedsam_rounds.jsonl"
#: Stage of a record in `SENT_FILE`: a result as it left, after all filters.
LEFT = "left"
#: What a run leaves in its folder, beside data and jobs that somebody may have put there.
RESULTS = (
    *("run.json", "job", WORKSPACE, EARLIER, "state", "states", "global_model.safetensors", "simulator.log"),
    *("results", "results.json", "report.html", "pictures", "split.json", "progress.json", "live.html"),
)


def starts(run: Path) -> list[Path]:
    """Folders laid out as NVFlare's workspace, one for each start of a run, oldest first."""
    kept = [path for path in (run / EARLIER).glob("*") if path.name.isdigit()]
    return [*sorted(kept, key=lambda path: int(path.name)), run / WORKSPACE]


def global_models(run: Path) -> tuple[Path, Path]:
    """The global model that is kept in a run folder, and the one of each round, which the simulator writes."""
    name = "global_model.safetensors"
    return run / name, run / WORKSPACE / "server" / RUN / "app_server" / name


def bytes_by_round(paths: Iterable[Path]) -> dict[int, int]:
    """Bytes of the tensors that left a site in each round, from its records; of a round done twice the last counts."""
    left = (
        record for path in paths for record in read_lines(path) if record["stage"] == LEFT and record["task"] == "train"
    )
    return dict(sorted({record["round"]: record["bytes"] for record in left if record["tensors"]}.items()))


def claim_run(folder: Path, what: str, laid_out: Callable[[Path], bool], force: bool = False) -> bool:
    """Mark a folder as ours, also one that an earlier version made, which knew no marker.

    Args:
        folder: may be missing.
        what: see `pfedsam.ownership.claim`.
        laid_out: whether a folder without a marker is laid out as only this software does it.
        force: whether a folder of somebody else may be used, too.

    Returns:
        Whether it was such a folder of an earlier version.

    Raises:
        PFedSAMError: E24 if it is somebody else's.
    """
    adopted = folder.is_dir() and marker(folder) is None and laid_out(folder)
    claim(folder, what, force or adopted)
    return adopted


def is_simulation(folder: Path) -> bool:
    """Whether a folder is laid out as that of a simulation."""
    return _has(folder, files=("simulator.log",), folders=("state", f"{WORKSPACE}/server"))


def is_comparison(folder: Path) -> bool:
    """Whether a folder is laid out as that of a comparison."""
    return _has(folder, files=(), folders=("trainings", "logs")) and any(folder.glob("trainings/*/lock"))


def is_deployment(folder: Path) -> bool:
    """Whether a folder is laid out as the runtime folder of `pfedsam poc`."""
    return _has(folder, files=("project.yml",), folders=("home", "logs")) and any(folder.glob("kits/*/prod_00"))


def move_aside(run: Path, names: Iterable[str] = RESULTS) -> Path | None:
    """Move what a run has left in its folder into another one in it, so that a new run begins without it.

    Returns:
        The other folder, None if there was nothing.
    """
    paths = [run / name for name in names if (run / name).exists()]
    if not paths:
        return None
    target = run / f"before-{time.strftime('%Y%m%d-%H%M%S')}"
    target.mkdir(parents=True)
    for path in paths:
        path.rename(target / path.name)
    return target


def _has(folder: Path, files: Iterable[str], folders: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in files) and all((folder / name).is_dir() for name in folders)
