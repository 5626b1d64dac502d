"""The figures of the report: SVG in the page's own ink, each with its words."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pfedsam.evaluation.site import MODELS

#: Ink of the figures; it becomes the page's own text colour.
_INK = "#010203"
#: Colours (Okabe and Ito), each with a dash and a marker of its own, so that no line is told by colour alone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Ink of words on a bar where black is not readable.
_ON = {"#0072B2": "#ffffff"}
#: Panels beside each other; more leave no room for their labels in the width of the page.
_IN_A_ROW = 3


@dataclass(frozen=True)
class Plot:
    """An inline figure with its words: `title` for all, `alt` for those who do not see it."""

    title: str
    alt: str
    svg: Markup


def plots(curves: pd.DataFrame, results: Mapping[str, Any], sent: pd.DataFrame, *, cases: bool = True) -> list[Plot]:
    """All figures that there is something for.

    Args:
        curves: columns `site`, `tag`, `round`, `value`, see `pfedsam.report.page.read_curves`.
        results: of `pfedsam.evaluation.tables.results`.
        sent: columns `site`, `round`, `bytes`.
        cases: with the results of single cases.
    """
    figures = [_cases(results)] if cases else []
    for pattern, title, label in (
        ("val_dice_(global|personal)", "Validation Dice over rounds", "Dice"),
        ("loss/.*", "Training loss over rounds", "loss"),
        ("gate_entropy/.*", "Gate entropy", "nat"),
    ):
        chosen = curves[curves["tag"].str.fullmatch(pattern)] if len(curves) else curves
        if len(chosen):
            figure, words = curve_figure(chosen, label)
            figures.append(Plot(title, words, _svg(figure)))
    shares = curves[curves["tag"].str.startswith("expert_share_")] if len(curves) else curves
    if len(shares):
        if shares["round"].nunique() > 1:
            figure, words = curve_figure(_smallest(shares), "share")
            figures.append(Plot("Smallest share of an expert over rounds", words, _svg(figure)))
        figure, words = share_figure(shares)
        figures.append(Plot("Share of each expert at the end", words, _svg(figure)))
    if len(sent):
        total = sent.groupby("round")["bytes"].sum().cumsum() / 1e6
        rows = pd.DataFrame({"site": "all sites", "tag": "sent", "round": total.index, "value": total.values})
        figure, words = curve_figure(rows, "MB")
        figures.append(Plot("Megabytes sent by all sites up to each round", words, _svg(figure)))
    return figures


def _smallest(shares: pd.DataFrame) -> pd.DataFrame:
    """The share of the expert that the gate likes least, by layer, site and round: near zero it is dead."""
    layers = "smallest share/" + shares["tag"].str.extract(r"(layer_\d+)", expand=False)
    return shares.assign(tag=layers).groupby(["site", "tag", "round"])["value"].min().reset_index()


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
    axes.legend(fontsize=8, frameon=False, labelcolor=_INK, loc="best")
    means = "; ".join(
        f"{site}: global {site_results['dice_global']:.2f}, personal {site_results['dice_personal']:.2f}"
        for site, site_results in results["sites"].items()
    )
    return Plot("Dice of every test case", f"Points for each site. Means: {means}.", _svg(figure))


def curve_figure(rows: pd.DataFrame, label: str) -> tuple[Figure, str]:
    """One panel for each tag, one line for each site; a tag of one round, such as the final phase's, has bars.

    Args:
        rows: columns `site`, `tag`, `round`, `value`.
        label: of the values.

    Returns:
        The figure, and its words.
    """
    tags, sites = sorted(rows["tag"].unique(), key=_by_number), sorted(rows["site"].unique())
    styles = dict(zip(sites, zip(cycle(_COLOURS), cycle(_DASHES), cycle(_MARKERS)), strict=False))
    figure, panels = _figure(len(tags))
    sentences, lines = [], {}
    once = {tag: rows[rows["tag"] == tag]["round"].nunique() == 1 for tag in tags}
    most = rows[rows["tag"].isin([tag for tag in tags if once[tag]])]["value"].max()
    for place, (axes, tag) in enumerate(zip(panels, tags, strict=True)):
        chosen = rows[rows["tag"] == tag]
        for site, values in chosen.sort_values("round").groupby("site"):
            colour, dash, marker = styles[site]
            last = values["value"].iloc[-1]
            if once[tag]:
                axes.barh(sites.index(site), last, color=colour, height=0.6)
            else:
                how = {"marker": marker, "color": colour, "markersize": 4}
                (lines[site],) = axes.plot(values["round"], values["value"], dash, **how)
            sentences.append(f"{_words(tag)} at {site} ends at {last:.2f}")
        when = f", once, at round {chosen['round'].iloc[0]}" if once[tag] else ""
        axes.set_title(f"{_words(tag)}{when}", fontsize=9, color=_INK)
        axes.set_xlabel(label if once[tag] else "round")
        if once[tag]:
            first = place % _IN_A_ROW == 0
            _sites_beside(axes, sites, named=first or not once[tags[place - 1]])
            axes.set_xlim(0, 1.05 * most or 1)
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(bottom=0)  # none of these is ever negative
            if place % _IN_A_ROW == 0:
                axes.set_ylabel(label)
    if lines:
        how = {"loc": "outside upper left", "ncols": _IN_A_ROW, "fontsize": 8, "frameon": False, "labelcolor": _INK}
        figure.legend(lines.values(), [name.replace("_", " ") for name in lines], **how)
    return figure, "; ".join(sentences) + "."


def share_figure(rows: pd.DataFrame) -> tuple[Figure, str]:
    """Share of each expert in the last round, a panel for each layer: stacked bars with the numbers of the experts.

    Args:
        rows: columns `site`, `tag` (`expert_share_<expert>/layer_<layer>`), `round`, `value`.

    Returns:
        The figure, and its words.
    """
    last = rows.sort_values("round").groupby(["site", "tag"]).value.last().reset_index()
    last[["expert", "layer"]] = last["tag"].str.extract(r"expert_share_(\d+)/layer_(\d+)").astype(int)
    last = last.sort_values(["site", "layer", "expert"])
    sites, layers = sorted(last["site"].unique()), sorted(last["layer"].unique())
    figure, panels = _figure(len(layers))
    for place, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        table = last[last["layer"] == layer].pivot(index="site", columns="expert", values="value").reindex(sites)
        left = np.zeros(len(sites))
        for expert, colour in zip(table.columns, cycle(_COLOURS), strict=False):
            values = table[expert].to_numpy()
            axes.barh(range(len(sites)), values, left=left, color=colour, edgecolor="#ffffff", alpha=0.9)
            for row, (start, value) in enumerate(zip(left, values, strict=True)):
                if value > 0.12:  # wide enough for its number
                    centre = {"ha": "center", "va": "center", "color": _ON.get(colour, "#000000"), "fontsize": 8}
                    axes.text(start + value / 2, row, f"e{expert}", **centre)
            left += values
        _sites_beside(axes, sites, named=place % _IN_A_ROW == 0)
        axes.set_title(f"layer {layer}", fontsize=9, color=_INK)
        axes.set_xlim(0, 1)
        axes.set_xticks((0, 0.5, 1))
    words = "; ".join(f"{r.site}, layer {r.layer}, expert {r.expert}: {r.value:.2f}" for r in last.itertuples())
    return figure, words + "."


def _sites_beside(axes: Any, sites: Sequence[str], named: bool) -> None:
    """A row for each site, the first at the top; the panel on its left has the names if it has not."""
    names = [name.replace("_", " ") for name in sites] if named else [""] * len(sites)
    axes.set_yticks(range(len(sites)), names)
    axes.set_ylim(len(sites) - 0.5, -0.5)


def _by_number(tag: str) -> list[tuple[int, str]]:
    """Key of an order in which layer 2 is before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", tag)]


def _figure(panels: int) -> tuple[Figure, Sequence[Any]]:
    """A figure of so many panels, at most `_IN_A_ROW` beside each other."""
    columns = min(panels, _IN_A_ROW)
    lines = ceil(panels / columns)
    size = (min(9.0, 4.2 * columns + 2), 3.0 if lines == 1 else 2.2 * lines + 0.4)
    keys = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    colours: Any = dict.fromkeys(keys, _INK)
    with matplotlib.rc_context(colours | {"svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    figure.patch.set_alpha(0)
    for panel in axes[:panels]:
        panel.patch.set_alpha(0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, axes[:panels]


def _svg(figure: Figure) -> Markup:
    """The figure as SVG text in the page's own ink, hidden from screen readers: the words beside it are theirs."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pfedsam"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # ids of several figures in one page must not meet
    salt = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    text = re.sub(r'(id="|#)([\w.-]+)', lambda m: m[0] if _is_colour(m) else f"{m[1]}{salt}{m[2]}", text)
    return Markup(re.sub(r"<svg ", '<svg aria-hidden="true" focusable="false" ', text, count=1))


def _is_colour(match: re.Match[str]) -> bool:
    return match[1] == "#" and re.fullmatch(r"[0-9a-fA-F]{3,8}", match[2]) is not None


def _words(tag: str) -> str:
    for part in ("val_dice_", "loss/", "gate_entropy/", "smallest share/"):
        tag = tag.removeprefix(part)
    return tag.replace("_", " ")
