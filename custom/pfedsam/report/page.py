"""One page about a run that a person can look at and keep: no script, no link to another file, no network.

The page names sites, never cases. It shows slices of patients' images and the Dice of single cases: to be shown outside
the hospitals it is written without them (`pictures=False`). A mean over fewer than `FEW_CASES` cases is then left out,
too: of one case it is that case's value, of two the other's for whoever knows one.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pfedsam
from pfedsam.bundle_tools.describe import describe
from pfedsam.bundles import class_names, find_bundle, settings_of
from pfedsam.comparison.records import problem_of_results
from pfedsam.errors import ErrorCode, PFedSAMError
from pfedsam.evaluation.site import MODELS
from pfedsam.files import write_atomically
from pfedsam.parameters import Roles
from pfedsam.report.plots import plots
from pfedsam.report.serving import SiteServing, advice, servings
from pfedsam.report.similar import similar_sites
from pfedsam.report.warnings import FEW_CASES, gain_of, warnings_of, worse_than_alone
from pfedsam.storage.job_plan import SERVER, plan_arguments
from pfedsam.storage.run_folder import RUN, SENT_FILE, bytes_by_round, starts
from pfedsam.training.strategy import Strategy
from pfedsam.training.workflow import SPLIT_FILE

#: Values of a site that are of its test cases.
_OF_CASES = tuple(f"{kind}_{model}" for kind in ("dice", "failures") for model in MODELS)
EXAMPLES = ("best", "median", "worst")


def write_report(run: Path, out: Path | None = None, compare: Path | None = None, *, pictures: bool = True) -> Path:
    """Write the page about a run of `pfedsam demo` or `pfedsam simulate`.

    Args:
        run: the run folder; `results.json` must be in it, curves and settings are used where they are there.
        out: HTML file to write; `report.html` in the run folder by default.
        compare: records of `pfedsam compare`; those of `local_only` tell where a site does better alone.
        pictures: with images of patients and results of single cases; False leaves means and curves of sites with at
            least `FEW_CASES` cases (test, validation or training cases, whichever a value is of), and the mean of
            those sites.

    Returns:
        The file written.

    Raises:
        PFedSAMError: E02 if the folder holds no finished run or no sound results, E33 if its job is none, or `compare`
            holds no record of `local_only` with test cases of this run.
    """
    path = run / "results.json"
    if not path.is_file():
        raise PFedSAMError(
            ErrorCode.SITE_FOLDER,
            f"{run} holds no results.json.",
            "Give the run folder of a finished demo or simulate.",
        )
    results = _read_results(path)
    alone = worse_than_alone(results, compare, 1 if pictures else FEW_CASES) if compare else []
    plan, rounds = _plan(run)
    curves = read_curves(run)
    served = servings(run, results, plan, 1 if pictures else FEW_CASES)
    pays = advice(served, results)
    if not pictures:
        results, curves = _without_few(results), _of_many(curves, run)
    about = results.get("about", {})
    bundle, settings = plan.get("bundle") or about.get("bundle"), _settings(plan, about)
    classes = class_names(find_bundle(bundle)) if bundle else []
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pfedsam.report", "templates"), autoescape=True, trim_blocks=True
    )
    environment.filters |= {"code": _code, "number": _number}
    page = environment.get_template("report.html.j2").render(
        version=pfedsam.__version__,
        title=plan.get("federation", run.name),
        results=results,
        models=MODELS,
        rounds=rounds,
        strategy=plan.get("strategy", {}),
        settings=settings,
        groups=_groups(plan),
        plots=plots(curves, results, _sent(run, results["sites"]), cases=pictures),
        pictures=_pictures(run, results) if pictures else {},
        warnings=[*warnings_of(results, curves, classes, settings, rounds), *alone],
        served=served,
        pays=pays,
        similar=similar_sites(run),
        compared=compare is not None,
        shown=pictures,
        gain=gain_of,
        few=FEW_CASES,
    )
    out = out or run / "report.html"
    write_atomically(out, page.encode())
    return out


def served_lines(run: Path) -> list[str]:
    """What each site serves, and whether personalisation pays, for the terminal; see `pfedsam.report.serving`."""
    results, (plan, _) = _read_results(run / "results.json"), _plan(run)
    told: list[SiteServing] = servings(run, results, plan)
    return [*(one.line for one in told), *advice(told, results)]


def _read_results(path: Path) -> dict[str, Any]:
    remedy = "Evaluate the run again: call the command that made it once more."
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"{path} is not readable: {error}.", remedy) from None
    problem = problem_of_results(results)
    if problem:
        raise PFedSAMError(ErrorCode.SITE_FOLDER, f"{path} holds no results: {problem}.", remedy)
    return results


def _code(text: str) -> Markup:
    """Escaped text in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _number(value: float | None, form: str = "%.3f") -> str:
    return "-" if value is None else form % value


def read_curves(run: Path) -> pd.DataFrame:
    """The scalars that the sites sent, from TensorBoard's files of all starts: columns `site`, `tag`, `round`, `value`.

    Of a round that was done twice the last value counts.
    """
    values: dict[tuple[str, str, int], float] = {}
    for start in starts(run):
        for folder in sorted(path for path in start.glob(f"server/{RUN}/tb_events/*") if path.is_dir()):
            events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
            for tag in events.Tags()["scalars"]:
                values |= {(folder.name, tag, event.step): event.value for event in events.Scalars(tag)}
    rows = [(*key, value) for key, value in sorted(values.items())]
    return pd.DataFrame(rows, columns=["site", "tag", "round", "value"])


def _plan(run: Path) -> tuple[dict[str, Any], int | None]:
    """The plan of the job that was run, and its number of rounds."""
    app = run / "job" / "app"
    path = app / "config" / SERVER
    if not path.is_file():
        return {}, None
    try:
        config, plan = json.loads(path.read_text(encoding="utf-8")), plan_arguments(app)
        return plan, int(config["start_round"]) + int(config["num_rounds"])
    except (OSError, ValueError, TypeError, KeyError, PFedSAMError) as error:
        problem = f"{path} is no configuration of ours ({type(error).__name__}: {error})"
        raise PFedSAMError(
            ErrorCode.RUN_INCOMPLETE, f"{problem}.", "Bring it back, or take the job's folder away."
        ) from None


def _sent(run: Path, sites: Iterable[str]) -> pd.DataFrame:
    """What left each site after all filters, as its own record has it: columns `site`, `round`, `bytes`."""
    rows = [
        {"site": site, "round": number, "bytes": count}
        for site in sites
        for number, count in bytes_by_round(start / site / RUN / SENT_FILE for start in starts(run)).items()
    ]
    return pd.DataFrame(rows)


def _settings(plan: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """What was set, in words; of the base weights only whether they are a file of this machine, not where it lies."""
    bundle = plan.get("bundle") or about.get("bundle")
    if not bundle:
        return {}
    overrides = plan.get("overrides") or about.get("overrides")
    settings = settings_of(bundle, overrides) | describe(bundle, Roles(), overrides).settings
    if "checkpoint" in settings and not str(settings["checkpoint"]).isidentifier():
        settings["checkpoint"] = "a file of this machine"
    return {"bundle": bundle, **{key: json.dumps(value) for key, value in settings.items()}}


def _groups(plan: Mapping[str, Any]) -> list[Any]:
    """Parameter groups with their roles and sizes."""
    if not plan:
        return []
    strategy = Strategy.of(plan["strategy"])
    return list(describe(plan["bundle"], strategy.roles, plan.get("overrides"), copies=strategy.has_copy).groups)


def _without_few(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results without single cases, and without the values of sites with few of them: None in their place.

    Means and worst are those of the sites that are shown: else they would tell what is left out.
    """
    sites = {
        name: site if site["cases"] >= FEW_CASES else site | dict.fromkeys(_OF_CASES)
        for name, site in results["sites"].items()
    }
    summary: dict[str, Any] = {}
    for model in MODELS:
        values = [site[f"dice_{model}"] for site in sites.values() if site[f"dice_{model}"] is not None]
        summary[f"mean_{model}"] = float(np.mean(values)) if values else None
        summary[f"worst_{model}"] = min(values, default=None)
    return {**results, "sites": sites, **summary, "cases": []}


def _of_many(curves: pd.DataFrame, run: Path) -> pd.DataFrame:
    """The curves of sites whose own record of the split has enough cases of the section that a value is of."""
    counts: dict[tuple[str, str], int] = {}
    for path in (path for start in starts(run) for path in start.glob(f"*/{RUN}/bundle/{SPLIT_FILE}")):
        split = json.loads(path.read_text())
        counts |= {(path.parts[-4], section): len(split[section]) for section in ("training", "validation")}
    sections = ["validation" if tag.startswith("val_") else "training" for tag in curves["tag"]]
    keys = zip(curves["site"], sections, strict=True)
    return curves[np.array([counts.get(key, 0) >= FEW_CASES for key in keys], dtype=bool)]


def _pictures(run: Path, results: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Each site's example pictures as data in the page, with what their files say of them."""
    pictures: dict[str, list[dict[str, str]]] = {}
    for site in results["sites"]:
        for example in EXAMPLES:
            path = run / "pictures" / f"{site}-{example}.png"
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                with Image.open(path) as picture:
                    words = str(picture.info.get("Description") or f"{site}, {example} test case.")
                one = {"example": example, "data": f"data:image/png;base64,{data}", "words": words}
                pictures.setdefault(site, []).append(one)
    return pictures
