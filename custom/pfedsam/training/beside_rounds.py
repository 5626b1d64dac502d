"""What a federation in one process keeps beside its global model, for its next round: `<kind>/<rounds done>`."""

from __future__ import annotations

from pathlib import Path


def beside_round(folder: Path, kind: str, done: int) -> Path:
    """The file of a kind, with the number of rounds behind it.

    It is written before the global model, which says that the round is done. So a stop between the two loses nothing:
    the file of the round before is still there.

    Args:
        folder: of the rounds.
        kind: what is kept.
        done: number of rounds that are done.
    """
    return folder / kind / f"{done}.safetensors"


def forget_before(folder: Path, kind: str, done: int) -> None:
    """Remove what is of fewer rounds; once the global model is written."""
    for path in (folder / kind).glob("*.safetensors"):
        if int(path.stem) < done:
            path.unlink()
