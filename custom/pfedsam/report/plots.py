"""The figures of the report: SVG in the page's own ink, each with its words."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pfedsam.evaluation.site import MODELS

#: Ink and paper of the figures; they become the page's own.
_INK, _PAPER = "#010203", "#030201"
#: Colours (Okabe and Ito), each with a dash and a marker of its own, so that no line is told by colour alone. In the
#: page they become its `--c0` to `--c5`: darker on white, lighter on black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Panels beside each other; more leave no room for words that are read from afar.
_IN_A_ROW = 2
#: Width of a figure in inches, letters in points: in a page of 1200 pixels they are 30 pixels high.
_WIDTH, _LETTERS = 9.0, 14
#: Height of a line of letters, and of what is above and below a panel, in inches.
_LINE, _AROUND = 0.27, 1.2
#: So many lines of a panel have their site's name beside them; of more the highest and the lowest only.
_NAMED = 12
#: Letters of a line of a site's name.
_NAME = 14


_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
_STYLE: Any = dict.fromkeys(_INKED, _INK) | {
    "font.size": _LETTERS,
    "axes.titlesize": _LETTERS,
    "axes.titleweight": "bold",
    "axes.linewidth": 1.5,
    "svg.fonttype": "none",
}


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
    curves = _of_gates(curves)
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


def _of_gates(curves: pd.DataFrame) -> pd.DataFrame:
    """The curves without those of gates that have one expert, and so nothing to choose."""
    if not len(curves):
        return curves
    share, entropy = curves["tag"].str.startswith("expert_share_"), curves["tag"].str.startswith("gate_entropy/")
    alone = set(curves[share]["tag"].str.extract(r"expert_share_(\d+)/", expand=False)) == {"0"}
    return curves[~share & ~entropy] if alone else curves


def _smallest(shares: pd.DataFrame) -> pd.DataFrame:
    """The share of the expert that the gate likes least, by layer, site and round: near zero it is dead."""
    layers = "smallest share/" + shares["tag"].str.extract(r"(layer_\d+)", expand=False)
    return shares.assign(tag=layers).groupby(["site", "tag", "round"])["value"].min().reset_index()


@matplotlib.rc_context(_STYLE)
def _cases(results: Mapping[str, Any]) -> Plot:
    """Dice of each case of each site, a row for each model, with its mean."""
    rows = [(site, model) for site in results["sites"] for model in MODELS]
    figure, (axes,) = _figure(1, _LINE * 1.35 * len(rows) + 0.9)
    for place, (site, model) in enumerate(rows):
        number = MODELS.index(model)
        values = [np.mean(c["dice"]) for c in results["cases"] if c["site"] == site and c["model"] == model]
        full = {"markerfacecolor": "none"} if number else {}
        axes.plot(values, [place] * len(values), _MARKERS[number], color=_COLOURS[number], ms=11, mew=2.5, **full)
        mean = results["sites"][site][f"dice_{model}"]
        axes.plot([mean, mean], [place - 0.42, place + 0.42], color=_INK, linewidth=3)
        axes.text(
            1.04, place, f"{mean:.2f}", va="center", ha="left", weight="bold", transform=axes.get_yaxis_transform()
        )
        if number == 0 and place:
            axes.axhline(place - 0.5, color=_INK, alpha=0.3, linewidth=1)
    axes.text(1.04, -0.75, "mean", va="bottom", ha="left", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rows)), [f"{_name(site)}, {model}" for site, model in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.03, 1.03), xlabel="Dice of a case; the line is the mean")
    means = "; ".join(
        f"{site}: global {site_results['dice_global']:.2f}, personal {site_results['dice_personal']:.2f}"
        for site, site_results in results["sites"].items()
    )
    return Plot("Dice of every test case", f"Points for each site. Means: {means}.", _svg(figure))


@matplotlib.rc_context(_STYLE)
def curve_figure(rows: pd.DataFrame, label: str) -> tuple[Figure, str]:
    """One panel for each tag, one line for each site; a tag of one round, such as the final phase's, has bars.

    Args:
        rows: columns `site`, `tag`, `round`, `value`.
        label: of the values.

    Returns:
        The figure, and its words.
    """
    tags, sites = sorted(rows["tag"].unique(), key=_by_number), sorted(rows["site"].unique())
    once = {tag: rows[rows["tag"] == tag]["round"].nunique() == 1 for tag in tags}
    most = rows[rows["tag"].isin([tag for tag in tags if once[tag]])]["value"].max()
    shown = len(sites) if any(once.values()) else min(len(sites), _NAMED)
    lines = max(_name(site).count("\n") + 1 for site in sites)
    figure, panels = _figure(len(tags), max(3.2, 1.1 * lines * _LINE * shown + _AROUND))
    sentences = []
    for axes, tag in zip(panels, tags, strict=True):
        chosen = rows[rows["tag"] == tag].sort_values("round")
        when = f", once, at round {chosen['round'].iloc[0]}" if once[tag] else ""
        axes.set_title(f"{_words(tag)}{when}")
        axes.set_xlabel(label if once[tag] else "round")
        if once[tag]:
            _bars(axes, chosen, sites, most)
        else:
            _lines(axes, chosen, sites)
            axes.set_ylabel(label)
        last = chosen.groupby("site")["value"].last()
        sentences += [f"{_words(tag)} at {site} ends at {value:.2f}" for site, value in last.items()]
    return figure, "; ".join(sentences) + "."


def _bars(axes: Any, rows: pd.DataFrame, sites: Sequence[str], most: float) -> None:
    """A bar for each site, with its value at its end."""
    for site, value in zip(rows["site"], rows["value"], strict=True):
        place = sites.index(site)
        axes.barh(place, value, color=_COLOURS[place % len(_COLOURS)], height=0.7)
        axes.annotate(f"{value:.2f}", (value, place), (5, 0), textcoords="offset points", va="center", weight="bold")
    _sites_beside(axes, sites)
    axes.set_xlim(0, 1.25 * most or 1)
    axes.xaxis.get_major_locator().set_params(nbins=4)


def _lines(axes: Any, rows: pd.DataFrame, sites: Sequence[str]) -> None:
    """A line for each site, with its name at its end."""
    styles = dict(zip(sites, zip(cycle(_COLOURS), cycle(_DASHES), cycle(_MARKERS)), strict=False))
    ends: dict[str, tuple[int, float]] = {}
    for site in (one for one in sites if (rows["site"] == one).any()):
        values = rows[rows["site"] == site]
        colour, dash, marker = styles[site]
        axes.plot(values["round"], values["value"], dash, marker=marker, color=colour, linewidth=3, markersize=8)
        ends[site] = values["round"].iloc[-1], values["value"].iloc[-1]
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.yaxis.get_major_locator().set_params(nbins=5)
    axes.set_ylim(0, 1.08 * rows["value"].max() or 1)  # none of these is ever negative
    named = {site: _name(site) for site in ends}
    if len(ends) > _NAMED:
        ordered = sorted(ends, key=lambda site: ends[site][1])
        named = {ordered[-1]: f"{_name(ordered[-1])} (highest)", ordered[0]: f"{_name(ordered[0])} (lowest)"}
    _write_beside(axes, {site: (*ends[site], words, styles[site][0]) for site, words in named.items()})


def _write_beside(axes: Any, words: Mapping[str, tuple[float, float, str, str]]) -> None:
    """Words at the right of a panel, each with a thin line to its point: `(x, y, words, colour)`."""
    high = axes.get_ylim()[1]
    lines = max(text.count("\n") + 1 for _, _, text, _ in words.values())
    step = high * min(1 / len(words), lines * _LINE / _room(axes))
    places = _apart([y for _, y, _, _ in words.values()], step, high)
    beside = axes.get_yaxis_transform()
    for (x, y, text, colour), place in zip(words.values(), places, strict=True):
        axes.text(1.07, place, text, transform=beside, va="center", color=colour, weight="bold")
        line = {"arrowstyle": "-", "color": colour, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 5}
        axes.annotate("", (x, y), (1.06, place), textcoords=beside, annotation_clip=False, arrowprops=line)


def _room(axes: Any) -> float:
    """Height of a panel between its title and its ticks, in inches, about."""
    figure = axes.get_figure()
    return float(figure.get_figheight() / axes.get_subplotspec().get_gridspec().nrows - _AROUND)


def _apart(values: Sequence[float], step: float, high: float) -> list[float]:
    """Places for words beside values from 0 to `high`: in their order, at least `step` from each other."""
    order = np.argsort(values, kind="stable")
    places, lowest = np.array(values, dtype=float), step / 2
    for number in order:
        places[number] = max(places[number], lowest)
        lowest = places[number] + step
    highest = high
    for number in reversed(order):
        places[number] = min(places[number], highest)
        highest = places[number] - step
    return [float(place) for place in places]


@matplotlib.rc_context(_STYLE)
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
    figure, panels = _figure(len(layers), _LINE * 1.4 * len(sites) + 1.0)
    for place, (axes, layer) in enumerate(zip(panels, layers, strict=True)):
        table = last[last["layer"] == layer].pivot(index="site", columns="expert", values="value").reindex(sites)
        left = np.zeros(len(sites))
        for expert, colour in zip(table.columns, cycle(_COLOURS), strict=False):
            values = table[expert].to_numpy()
            axes.barh(range(len(sites)), values, left=left, color=colour, edgecolor=_PAPER, linewidth=1.5)
            for row, (start, value) in enumerate(zip(left, values, strict=True)):
                if value > 0.12:  # wide enough for its number
                    how = {"ha": "center", "va": "center", "color": _PAPER, "weight": "bold"}
                    axes.text(start + value / 2, row, f"{expert}", **how)
            left += values
        _sites_beside(axes, sites, named=place % _IN_A_ROW == 0)
        axes.set_title(f"layer {layer}")
        axes.set_xlim(0, 1)
        axes.set_xticks((0, 0.5, 1))
    words = "; ".join(f"{r.site}, layer {r.layer}, expert {r.expert}: {r.value:.2f}" for r in last.itertuples())
    return figure, words + "."


def _sites_beside(axes: Any, sites: Sequence[str], named: bool = True) -> None:
    """A row for each site, the first at the top; the panel on its left has the names if it has not."""
    axes.set_yticks(range(len(sites)), [_name(site) for site in sites] if named else [""] * len(sites))
    axes.set_ylim(len(sites) - 0.5, -0.5)


def _name(site: str) -> str:
    """A site's name in lines that leave room for the panel."""
    return "\n".join(wrap(site.replace("_", " "), _NAME, break_long_words=False))


def _by_number(tag: str) -> list[tuple[int, str]]:
    """Key of an order in which layer 2 is before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", tag)]


def _figure(panels: int, height: float) -> tuple[Figure, Sequence[Any]]:
    """A figure of so many panels, `height` inches each, at most `_IN_A_ROW` beside each other."""
    columns = min(panels, _IN_A_ROW) if panels > _IN_A_ROW else 1
    lines = ceil(panels / columns)
    figure = Figure(figsize=(_WIDTH, height * lines), layout=ConstrainedLayoutEngine(hspace=0.08, h_pad=0.08))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    figure.patch.set_alpha(0)
    for panel in axes[:panels]:
        panel.patch.set_alpha(0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, color=_INK)
        panel.set_axisbelow(True)
    return figure, axes[:panels]


def _svg(figure: Figure) -> Markup:
    """The figure as SVG text in the page's own ink, hidden from screen readers: the words beside it are theirs."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pfedsam"}):
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_PAPER, "var(--page)")
    for number, colour in enumerate(_COLOURS):
        text = text.replace(colour.lower(), f"var(--c{number})")
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
