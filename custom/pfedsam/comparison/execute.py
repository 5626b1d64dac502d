"""Does one run of a comparison: trains it, evaluates it on the test cases, and makes its record.

A record is one JSON line and holds all that the tables need. Cases and patients are named by a hash, the same in every
run: a pseudonym, so that a record of public data can be kept with the code. Records of a hospital's own patients stay
there: with the names at hand, or guessed, a hash is found again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

import pfedsam
from pfedsam.comparison.provenance import bundle_hash, case_hash, commit, defaults, machine
from pfedsam.comparison.run import Run
from pfedsam.comparison.unseen import unseen
from pfedsam.evaluation.site import CaseScore, evaluate_site
from pfedsam.training.federation import run_federation

#: Trains a run in a folder by other means than this process: the model file of each site, and a note a round and site.
Simulator = Callable[[Run, Path, Callable[[str], None]], tuple[dict[str, Path], list[dict[str, Any]]]]


def execute(
    run: Run, out: Path, event: Callable[[str], None] | None = None, simulator: Simulator | None = None
) -> dict[str, Any]:
    """Train what is not trained yet, evaluate, and give the record.

    Args:
        run: what to run.
        out: folder of the comparison; trainings go to `out/trainings`, rounds that several share to `out/rounds`,
            features of the frozen trunk to `out/features`.
        event: called with a line for each thing that a person waits for.
        simulator: trains the runs that ask for NVFlare's simulator.

    Raises:
        PFedSAMError: E32 if the run makes no sense, see `Run.check`; else of the first site that fails.
        ValueError: if the run asks for a simulator and none is given.
    """
    run.check()
    if run.simulator and simulator is None:
        raise ValueError(f"{run.name}: no simulator was given")
    tell = event or (lambda line: None)
    card = run_card(run)  # of the code that trains, whatever is edited meanwhile
    folder_ = run.training_folder(out)
    folder_.mkdir(parents=True, exist_ok=True)
    (folder_ / "training.json").write_text(json.dumps({**asdict(run), "strategy": run.label}, indent=1) + "\n")
    started = time.monotonic()
    with FileLock(folder_ / "lock"):
        federation = run.federation(out)
        models: dict[str, Path] = {}
        history: list[dict[str, Any]] = []
        if run.simulated and simulator is not None:
            models, history = simulator(run, folder_, tell)
        elif not (run.held_out and run.file.kind == "local"):  # others alone are nothing to an unseen site
            run_federation(federation, tell, aggregated=run.file.kind == "federated")
            models, history = {site: federation.model_of(site) for site in federation.sites}, federation.history()
        trained = time.monotonic()
        if run.held_out:
            scores, notes = unseen(run, federation, tell)
            history += notes
        else:
            scores = _test(run, models, out / "features", folder_, tell)
    # of all sites and rounds, also those that another run or an earlier start has done
    training = trained - started if run.simulated else sum(note["seconds"] for note in history)
    patients = {(site, c.name): c.patient for site, split in run.splits().items() for c in split["test"]}
    return {
        "key": run.key(),
        "strategy": run.label,
        "kind": run.file.kind,
        "seed": run.seed,
        "held_out": run.held_out,
        "simulator": run.simulated,
        "rounds": run.rounds,
        "settings": run.settings,
        "cases": [_case_row(score, patients[score.site, score.case]) for score in scores],
        "history": history,
        "steps": _counted(history, "steps"),
        "teacher_passes": _counted(history, "teacher_passes"),
        "bytes_per_round": max((note["bytes"] for note in history), default=0),
        "seconds": {"training": training, "evaluation": time.monotonic() - trained},
        "card": card,
    }


def run_card(run: Run) -> dict[str, str]:
    """What a reader needs to run it again: code, configuration, bundle and its defaults, inputs, split, machine."""
    return {
        "code": f"{pfedsam.__version__} {commit()}".strip(),
        "configuration": run.training_key(),
        "defaults": defaults(run.bundle),
        "bundle": bundle_hash(run.bundle),
        "inputs": run.inputs(),
        "split": run.split_hash(),
        "machine": machine(),
    }


def _test(run: Run, models: Mapping[str, Path], store: Path, out: Path, tell: Callable[[str], None]) -> list[CaseScore]:
    """Both models of every site on its test cases; without a personal part they are one."""
    kind, strategy = run.file.kind, run.file.checked()
    # trained alone, a site has one model; so has a federation that keeps nothing personal
    single_model = kind != "federated" or not strategy.keeps
    scores: list[CaseScore] = []
    for site, path in run.folders().items():
        own = models["pooled" if kind == "pooled" else site]
        others = [model for name, model in models.items() if name != site] if kind == "ensemble" else []
        evaluation = evaluate_site(
            run.bundle,
            path,
            own,
            overrides=run.settings,
            site=site,
            models=("personal",) if single_model else ("global", "personal"),
            ensemble=others,
            feature_store=store,
            output_dir=out / "evaluation",
            refuse_seen=True,
        )
        scores += evaluation.scores
        tell(f"{run.name}: tested on {site}, Dice {evaluation.mean('personal'):.3f}")
    return scores


def _counted(history: Sequence[Mapping[str, Any]], what: str) -> int | None:
    """Sum over all phases, None if they were not noted."""
    if any(note["phases"] is None for note in history):
        return None
    return sum(phase[what] for note in history for phase in note["phases"].values())


def _case_row(score: CaseScore, patient: str) -> dict[str, Any]:
    return {
        **score.to_dict(),
        "case": case_hash(score.site, score.case),
        "patient": case_hash(score.site, patient),
    }
