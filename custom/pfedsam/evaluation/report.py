"""One page about a run that a person can look at, keep and send: no script, no link to another file, no network.

The page names sites, never cases: it may be shown outside the hospitals.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pfedsam
from pfedsam.describe import describe
from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.site import MODELS
from pfedsam.parameters import Roles

#: Ink of the figures; it becomes the page's own text colour.
_INK = "#010203"
#: Colours (Okabe and Ito), each with a dash and a marker of its own, so that no line is told by colour alone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
FEW_CASES = 5
DEAD_SHARE = 0.02
EXAMPLES = ("best", "median", "worst")


@dataclass(frozen=True)
class Plot:
    """An inline figure with its words: `title` for all, `alt` for those who do not see it."""

    title: str
    alt: str
    svg: Markup


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about a run of `pfedsam demo` or `pfedsam simulate`.

    Args:
        run: the run folder; `results.json` must be in it, curves and settings are used where they are there.
        out: HTML file to write; `report.html` in the run folder by default.

    Returns:
        The file written.

    Raises:
        PFedSAMError: E02 if the folder holds no finished run.
    """
    path = run / "results.json"
    if not path.is_file():
        raise PFedSAMError(
            "E02", f"{run} holds no results.json.", "Give the run folder of a finished demo or simulate."
        )
    results = json.loads(path.read_text())
    plan, rounds = _plan(run)
    curves = read_curves(run)
    sent = _sent(run)
    about = results.get("about", {})
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pfedsam.evaluation", "templates"), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        version=pfedsam.__version__,
        title=plan.get("federation", run.name),
        results=results,
        models=MODELS,
        rounds=rounds,
        strategy=plan.get("strategy", {}),
        settings=_settings(plan, about),
        groups=_groups(plan),
        payload=sent,
        plots=_plots(curves, results, sent),
        pictures=_pictures(run, results),
        warnings=_warnings(results, curves),
    )
    out = out or run / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def read_curves(run: Path) -> pd.DataFrame:
    """The scalars that the sites sent, from TensorBoard's files: columns `site`, `tag`, `round`, `value`."""
    rows = []
    for folder in sorted(path for path in run.glob("workspace/server/*/tb_events/*") if path.is_dir()):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            rows += [(folder.name, tag, event.step, event.value) for event in events.Scalars(tag)]
    return pd.DataFrame(rows, columns=["site", "tag", "round", "value"])


def _plan(run: Path) -> tuple[dict[str, Any], int | None]:
    """The plan of the job that was run, and its number of rounds."""
    path = run / "job" / "app" / "config" / "config_fed_server.json"
    if not path.is_file():
        return {}, None
    config = json.loads(path.read_text())
    plan = next(one["args"] for one in config["components"] if one["id"] == "plan")
    return plan, config["start_round"] + config["num_rounds"]


def _sent(run: Path) -> pd.DataFrame:
    """What each site's filter let out: columns `site`, `round`, `bytes`, and one for each parameter group."""
    rows = []
    for path in sorted(run.glob("workspace/*/*/pfedsam_sent.jsonl")):
        for note in map(json.loads, path.read_text().splitlines()):
            if note["task"] == "train" and note.get("tensors"):
                groups = {f"group {name}": size for name, size in note.get("by_group", {}).items()}
                rows.append({"site": path.parents[1].name, "round": note["round"], "bytes": note["bytes"], **groups})
    return pd.DataFrame(rows)


def _settings(plan: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, str]:
    """What was set, in words."""
    from pfedsam.bundles import settings_of

    bundle = plan.get("bundle") or about.get("bundle")
    if not bundle:
        return {}
    told = settings_of(bundle, plan.get("overrides") or about.get("overrides"))
    return {"bundle": bundle, **{key: json.dumps(value) for key, value in told.items()}}


def _groups(plan: Mapping[str, Any]) -> list[Any]:
    """Parameter groups with their roles and sizes."""
    if not plan:
        return []
    strategy = plan["strategy"]
    roles = Roles(tuple(strategy["shared"]), tuple(strategy["personal"]))
    return list(describe(plan["bundle"], roles, plan.get("overrides")).groups)


# ---- warnings -----------------------------------------------------------------------------------------------------


def _warnings(results: Mapping[str, Any], curves: pd.DataFrame) -> list[str]:
    """What a careful reader would ask about."""
    found = []
    for name, site in results["sites"].items():
        if site["cases"] < FEW_CASES:
            found.append(f"{name} has {site['cases']} test case(s), so its mean says little: test all folds.")
        gain = site["dice_personal"] - site["dice_global"]
        if gain < 0:
            found.append(
                f"At {name} the personal model is worse than the global one by {-gain:.3f}. Serve the global model "
                f"there (`pfedsam infer --global`), or fit fewer epochs or a stronger teacher in the final phase."
            )
        for model in MODELS:
            missed = site[f"failures_{model}"]
            if missed:
                found.append(f"At {name} the {model} model missed a class in {missed} of {site['cases']} cases.")
    shares = curves[curves["tag"].str.startswith("expert_share_")] if len(curves) else curves
    for (site, tag), values in shares.groupby(["site", "tag"]):
        last = values.sort_values("round").iloc[-1].value
        if last < DEAD_SHARE:
            expert, layer = re.findall(r"\d+", str(tag))
            found.append(
                f"At {site} expert {expert} of layer {layer} is dead (share of the gate {last:.1%}): try fewer experts."
            )
    if results["mean_personal"] < results["mean_global"]:
        found.append(
            "Over all sites the personal models are no better than the global one: compare with fedavg_lora "
            "(`pfedsam compare`) before you use them."
        )
    return found


# ---- figures ------------------------------------------------------------------------------------------------------


def _plots(curves: pd.DataFrame, results: Mapping[str, Any], sent: pd.DataFrame) -> list[Plot]:
    plots = [_cases(results)]
    for tags, title, label in (
        (("val_dice_global", "val_dice_personal"), "Validation Dice over rounds", "Dice"),
        (tuple(sorted({t for t in curves["tag"] if t.startswith("loss/")})), "Training loss over rounds", "loss"),
        (tuple(sorted({t for t in curves["tag"] if t.startswith("gate_entropy/")})), "Gate entropy", "nat"),
    ):
        chosen = curves[curves["tag"].isin(tags)]
        if len(chosen):
            plots.append(_lines(chosen, title, label))
    shares = curves[curves["tag"].str.startswith("expert_share_")] if len(curves) else curves
    if len(shares):
        plots.append(_shares(shares))
    if len(sent):
        total = sent.groupby("round")["bytes"].sum().cumsum() / 1e6
        rows = pd.DataFrame({"site": "all sites", "tag": "sent", "round": total.index, "value": total.values})
        plots.append(_lines(rows, "Megabytes sent by all sites up to each round", "MB"))
    return plots


def _cases(results: Mapping[str, Any]) -> Plot:
    """Dice of each case of each site, both models."""
    figure, (axes,) = _figure(1)
    sites = list(results["sites"])
    for number, model in enumerate(MODELS):
        for place, site in enumerate(sites):
            values = [np.mean(c["dice"]) for c in results["cases"] if c["site"] == site and c["model"] == model]
            offset = -0.15 + 0.3 * number + np.linspace(-0.08, 0.08, max(len(values), 1))[: len(values)]
            axes.plot(
                place + offset, values, _MARKERS[number], color=_COLOURS[number], label=model if not place else None,
                fillstyle="none" if number else "full",
            )  # fmt: skip
    axes.set_xticks(range(len(sites)), [name.replace("_", " ") for name in sites], rotation=15)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("Dice of a case")
    _legend(axes)
    means = "; ".join(
        f"{site}: global {one['dice_global']:.2f}, personal {one['dice_personal']:.2f}"
        for site, one in results["sites"].items()
    )
    return Plot("Dice of every test case", f"Points for each site. Means: {means}.", _svg(figure))


def _lines(rows: pd.DataFrame, title: str, label: str) -> Plot:
    """One panel for each tag, one line for each site; a tag of one round, such as the final phase's, has bars."""
    tags = sorted(rows["tag"].unique())
    figure, panels = _figure(len(tags))
    told = []
    for axes, tag in zip(panels, tags, strict=True):
        chosen = rows[rows["tag"] == tag]
        styles = zip(cycle(_COLOURS), cycle(_DASHES), cycle(_MARKERS))
        once = chosen["round"].nunique() == 1
        for (site, values), (colour, dash, marker) in zip(chosen.groupby("site"), styles, strict=False):
            values = values.sort_values("round")
            if once:
                axes.bar(str(site).replace("_", " "), values["value"].iloc[-1], color=colour, width=0.6)
            else:
                axes.plot(values["round"], values["value"], dash, marker=marker, color=colour, label=site, markersize=4)
            told.append(f"{_words(tag)} at {site} ends at {values['value'].iloc[-1]:.2f}")
        axes.set_title(_words(tag), fontsize=10, color=_INK)
        axes.set_xlabel(f"once, at round {chosen['round'].iloc[0]}" if once else "round")
        if once:
            axes.tick_params(axis="x", labelrotation=15)
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel(label)
    for axes in panels:
        if axes.lines:
            _legend(axes)
            break
    return Plot(title, "; ".join(told) + ".", _svg(figure))


def _shares(rows: pd.DataFrame) -> Plot:
    """Share of each expert at the end, by site and layer, as stacked bars with their numbers."""
    last = rows.sort_values("round").groupby(["site", "tag"]).value.last().reset_index()
    last[["expert", "layer"]] = last["tag"].str.extract(r"expert_share_(\d+)/layer_(\d+)")
    sites, layers = sorted(last["site"].unique()), sorted(last["layer"].unique())
    figure, panels = _figure(len(layers))
    for axes, layer in zip(panels, layers, strict=True):
        table = last[last["layer"] == layer].pivot(index="site", columns="expert", values="value").reindex(sites)
        left = np.zeros(len(sites))
        for expert, colour in zip(table.columns, cycle(_COLOURS), strict=False):
            values = table[expert].to_numpy()
            axes.barh(range(len(sites)), values, left=left, color=colour, edgecolor="#ffffff", alpha=0.9)
            for place, (start, value) in enumerate(zip(left, values, strict=True)):
                if value > 0.08:
                    centre = {"ha": "center", "va": "center", "color": "#ffffff", "fontsize": 8}
                    axes.text(start + value / 2, place, f"e{expert}", **centre)  # type: ignore[arg-type]
            left += values
        axes.set_yticks(range(len(sites)), sites if axes is panels[0] else [""] * len(sites))
        axes.set_title(f"layer {layer}", fontsize=10, color=_INK)
        axes.set_xlim(0, 1)
    told = "; ".join(f"{r.site}, layer {r.layer}, expert {r.expert}: {r.value:.2f}" for r in last.itertuples())
    return Plot("Share of each expert at the end", told + ".", _svg(figure))


def _figure(panels: int) -> tuple[Figure, Sequence[Any]]:
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colours: Any = dict.fromkeys(keys, _INK)
    with matplotlib.rc_context(colours | {"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(min(9.0, 4.2 * panels + 2), 3.0), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
    figure.patch.set_alpha(0)
    for one in axes:
        one.patch.set_alpha(0)
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="best")


def _svg(figure: Figure) -> Markup:
    """The figure as SVG text in the page's own ink, hidden from screen readers: the words beside it are theirs."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pfedsam"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # ids of several figures in one page must not meet
    salt = f"f{abs(hash(text)) % 10**8}"
    text = re.sub(r'(id="|#)([\w.-]+)', lambda m: m[0] if _is_colour(m) else f"{m[1]}{salt}{m[2]}", text)
    return Markup(re.sub(r"<svg ", '<svg aria-hidden="true" focusable="false" ', text, count=1))


def _is_colour(found: re.Match[str]) -> bool:
    return found[1] == "#" and re.fullmatch(r"[0-9a-fA-F]{3,8}", found[2]) is not None


def _words(tag: str) -> str:
    return tag.replace("val_dice_", "").replace("loss/", "").replace("gate_entropy/", "").replace("_", " ")


def _pictures(run: Path, results: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Each site's example pictures as data in the page."""
    found: dict[str, list[dict[str, str]]] = {}
    for site in results["sites"]:
        for example in EXAMPLES:
            path = run / "pictures" / f"{site}-{example}.png"
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                found.setdefault(site, []).append({"example": example, "data": f"data:image/png;base64,{data}"})
    return found
