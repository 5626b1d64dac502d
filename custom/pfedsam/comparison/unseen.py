"""An unseen hospital: what a site that took no part in the training gets, by the kind of the strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pfedsam.comparison.run import Run
from pfedsam.evaluation.site import CaseScore, evaluate_site
from pfedsam.storage.site_model import write
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.site import SiteTrainer

#: Numbers of labelled cases with which an unseen hospital makes a model of its own.
UNSEEN_CASES = (5, 10, 20)
Notes = list[dict[str, Any]]


def case_counts(available: int) -> list[int]:
    """The numbers of cases to try at a site with so many training cases; all that it has where 5 are too many."""
    return [n for n in UNSEEN_CASES if n <= available] or [available]


def unseen(run: Run, federation: Federation, tell: Callable[[str], None]) -> tuple[list[CaseScore], Notes]:
    """Scores of the held-out site on its test cases, and the notes of what was trained for it alone.

    Models by the kind of the strategy: `federated`: `global`, to which nothing of this site is fitted (what it would
    keep personal is as at its start), and, with a final phase, `personal_<n>` fitted beside it to n cases;
    `pooled`: `global`, the model of the other sites' pooled data; `local`: `alone_<n>`, trained on n cases through all
    rounds and the final phase, without any other site.

    Args:
        run: with a `held_out` site.
        federation: of the other sites; trained, but for the kind `local`.
        tell: called with a line for each model.

    Raises:
        PFedSAMError: of the training or the evaluation.
    """
    ways = {"federated": _personal, "pooled": _pooled, "local": _alone}
    return ways[run.file.kind](run, federation, tell)


def _personal(run: Run, federation: Federation, tell: Callable[[str], None]) -> tuple[list[CaseScore], Notes]:
    site, path = _held_out(run)
    theta, _ = federation.global_model()
    scores: list[CaseScore] = []
    for cases in _counts(run):
        output = federation.out / "sites" / f"{site}-{cases}"
        local = SiteTrainer(
            run.bundle, path, federation.strategy, run.settings, output, cases=cases, **federation.settings
        )
        local.open()
        local.receive(theta, local.fingerprint)
        file = federation.out / "models" / f"{site}-{cases}.safetensors"
        if not scores:
            write(file, local.model(round=run.rounds, final=False))
            scores += _scores(run, federation, file, output, {"global": "global"}, tell)
        if not federation.strategy.final:
            break  # there is nothing that more cases would change
        local.finish(run.rounds)
        write(file, local.model(round=run.rounds, final=True))
        scores += _scores(run, federation, file, output, {"personal": f"personal_{cases}"}, tell)
    return scores, []


def _pooled(run: Run, federation: Federation, tell: Callable[[str], None]) -> tuple[list[CaseScore], Notes]:
    output = federation.out / "evaluation"
    # the pooled site calls all of its model personal
    return _scores(run, federation, federation.model_of("pooled"), output, {"personal": "global"}, tell), []


def _alone(run: Run, federation: Federation, tell: Callable[[str], None]) -> tuple[list[CaseScore], Notes]:
    site, path = _held_out(run)
    scores: list[CaseScore] = []
    notes: Notes = []
    for cases in _counts(run):
        out, settings = federation.out / f"alone-{cases}", {**federation.settings, "cases": cases}
        alone = Federation(run.bundle, {site: path}, federation.strategy, out, run.rounds, run.settings, settings)
        run_federation(alone, tell, aggregated=False)
        scores += _scores(run, alone, alone.model_of(site), out / "evaluation", {"personal": f"alone_{cases}"}, tell)
        notes += [{**note, "cases": cases} for note in alone.history()]
    return scores, notes


def _held_out(run: Run) -> tuple[str, Path]:
    assert run.held_out is not None
    return run.held_out, run.folders()[run.held_out]


def _counts(run: Run) -> Sequence[int]:
    site, _ = _held_out(run)
    return case_counts(len(run.splits()[site]["training"]))


def _scores(
    run: Run, federation: Federation, file: Path, output: Path, names: dict[str, str], tell: Callable[[str], None]
) -> list[CaseScore]:
    """Scores of some of the two models in a file, under other names."""
    site, path = _held_out(run)
    evaluation = evaluate_site(
        run.bundle,
        path,
        file,
        overrides=run.settings,
        site=site,
        models=tuple(names),
        feature_store=federation.settings["feature_store"],
        output_dir=output,
        refuse_seen=True,
    )
    means = ", ".join(f"{name} {evaluation.mean(model):.3f}" for model, name in names.items())
    tell(f"{run.name}: {site} unseen, Dice {means}")
    return [replace(score, model=names[score.model]) for score in evaluation.scores]
