"""The report: what it says, and (slow) what a real browser makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from torch.utils.tensorboard import SummaryWriter
from typer.testing import CliRunner

from pfedsam.bundles import folder
from pfedsam.cli import app
from pfedsam.comparison.provenance import case_hash
from pfedsam.data.phantom import write_phantom
from pfedsam.data.picture import Picture
from pfedsam.deployment.simulation import Simulation, sent_bytes
from pfedsam.deployment.simulation_starts import keep_start
from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.pictures import case_picture
from pfedsam.evaluation.site import MODELS, CasePrediction, CaseScore, SiteEvaluation
from pfedsam.evaluation.tables import results
from pfedsam.report.page import read_curves, write_report
from pfedsam.report.plots import _smallest, curve_figure, plots, share_figure
from pfedsam.report.warnings import warnings_of
from pfedsam.training.workflow import SPLIT_FILE

SITES = ("site-1", "site-2", "case_western_st_joseph", "thomas_jefferson")
LAYERS = 8
TINY = ("backbone=vit_test", "image_size=32", "batch_size=4", "positives_per_case=2", "negatives_per_case=1")
SECRET = "patient-4711"
NO_CURVES = pd.DataFrame(columns=["site", "tag", "round", "value"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as a simulation leaves it: results, pictures, the job, curves, what the filters let out."""
    out = tmp_path_factory.mktemp("run")
    random = np.random.default_rng(0)
    evaluations = []
    for place, site in enumerate(SITES):
        scores = []
        label = np.zeros((1, 24, 24, 6), bool)
        label[0, 6:14, 6:14, 2:4] = True
        shown = CasePrediction(SECRET, Path("image"), label, {m: np.roll(label, 2, 1) for m in ("global", "personal")})
        for n in range(3 if place else 6):
            for model in ("global", "personal"):
                dice = 0.5 + 0.05 * n - (0.2 if place == 1 and model == "personal" else 0)
                case = SECRET if n == 0 else f"{SECRET}-{n}"
                scores.append(CaseScore(site, case, model, (dice,), (2.0,), (1.0,), (0.5,), (n == 5,)))
        found = SiteEvaluation(site, scores, {"best": shown, "median": shown, "worst": shown})
        evaluations.append(found)
        for example in found.examples:
            image = Picture(random.uniform(size=(24, 24, 6)), "volume", Path("image"))
            case_picture(found, example, image, out / "pictures" / f"{site}-{example}.png")
        events = out / "workspace" / "server" / "simulate_job" / "tb_events" / site
        with SummaryWriter(str(events)) as writer:
            for number in range(4):
                writer.add_scalar("val_dice_global", 0.1 * number, number)
                writer.add_scalar("loss/local", 1 / (number + 1), number)
                for layer in range(LAYERS):
                    writer.add_scalar(f"gate_entropy/layer_{layer}", 1.2 + 0.01 * layer, number)
                    for expert, share in enumerate((0.5, 0.49, 0.01, 0.0) if not layer else (0.25,) * 4):
                        writer.add_scalar(f"expert_share_{expert}/layer_{layer}", share, number)
        sent = out / "workspace" / site / "simulate_job" / "pfedsam_sent.jsonl"
        sent.parent.mkdir(parents=True)
        allowed, left = {"stage": "checked", "by_group": {"lora_a": 1500}}, {"stage": "left"}
        common = {"task": "train", "tensors": 3}
        lines = [
            *(
                {**stage, **common, "round": n, "bytes": b}
                for n in (0, 1)
                for stage, b in ((allowed, 1.5e6), (left, 1e6))
            ),
            {"stage": "scalars", "tags": []},
        ]
        sent.write_text("\n".join(map(json.dumps, lines)) + "\n")
        names = [f"{SECRET}-{n}" for n in range(3 if place else 6)]
        split = sent.parent / "bundle" / SPLIT_FILE
        split.parent.mkdir()
        # the last site trains on many cases and validates on few
        training = names * 2 if site == SITES[-1] else names
        split.write_text(json.dumps({"source": "seed", "seed": 0, "training": training, "validation": names}))
    shutil.copytree(folder("jobs") / "pfedsam", out / "job")
    table = {"about": {"bundle": "brain_lesion_mri", "overrides": {}}, **results(evaluations, {})}
    (out / "results.json").write_text(json.dumps(table))
    return out


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text()


def test_it_is_one_file_that_asks_for_nothing(page: str) -> None:
    class Links(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list) -> None:
            assert tag != "script"
            self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]

    links = Links()
    links.found = []
    links.feed(page)
    assert all(one.startswith(("data:", "#")) for one in links.found)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 10_000_000


def test_it_names_sites_and_no_case(page: str) -> None:
    assert all(site in page for site in SITES)
    assert SECRET not in page


def test_the_worst_site_is_marked_in_words(page: str) -> None:
    row = next(line for line in page.splitlines() if '<th scope="row">site-2</th>' in line)
    assert "(worst)" in row


def test_every_site_has_three_pictures_with_words(page: str) -> None:
    pictures = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]+)"', page)
    assert len(pictures) == 3 * len(SITES)
    assert pictures[0].startswith("site-1, best test case")


def test_warnings(page: str) -> None:
    assert "At site-2 the personal model is worse than the global one by 0.200" in page
    assert "At site-1 expert 3 of layer 0 is dead" in page
    assert "Fewer than 5 test cases, so that a mean says little: site-2 (3)" in page
    assert "(<code>pfedsam infer --global</code>)" in page
    assert "At site-1 the global model missed lesion in 1 of 6 cases" in page


def zero(*cases: tuple[str, str, tuple[float, ...]]) -> dict:
    """Results of cases `(site, model, Dice of each class)`; every class with Dice 0 was not found at all."""
    scores = [
        CaseScore(site, SECRET, model, dice, dice, dice, dice, tuple(not one for one in dice))
        for site, model, dice in cases
    ]
    names = dict.fromkeys(site for site, _, _ in cases)
    return results([SiteEvaluation(site, [one for one in scores if one.site == site]) for site in names], {})


def test_a_dice_of_zero_has_advice_with_the_settings_of_the_run() -> None:
    both = [("site-1", model, (0.8, 0.0)) for model in MODELS]
    mixed = [("site-2", "global", (0.0, 0.5)), ("site-2", "personal", (0.6, 0.5))]
    seen = {"image_size": "64", "field_of_view_mm": "256.0"}
    told = warnings_of(zero(*both, *mixed), NO_CURVES, ["disc", "cup"], seen, rounds=2)
    (advice,) = [one for one in told if "0.000" in one]
    assert "cup at site-1 (global, personal); disc at site-2 (global)" in advice
    steps = ["this run had 2", "`image_size` (64 now)", "`field_of_view_mm` (256.0 now)", "1 is disc, 2 is cup"]
    assert [advice.index(step) for step in steps] == sorted(advice.index(step) for step in steps)
    assert not any("missed" in one for one in told)
    photographs = warnings_of(zero(*both), NO_CURVES, ["disc", "cup"], {"image_size": "64"})
    assert not any("field_of_view" in one for one in photographs)
    good = warnings_of(zero(*[("site-1", model, (0.001, 0.5)) for model in MODELS]), NO_CURVES)
    assert not any("0.000" in one for one in good)


def test_a_class_that_was_missed_in_some_cases_is_named_with_how_many() -> None:
    cases = [("site-1", model, (dice, 0.5)) for model in MODELS for dice in (0.0, 0.7, 0.0)]
    told = warnings_of(zero(*cases), NO_CURVES, ["disc", "cup"])
    assert "At site-1 the global model missed disc in 2 of 3 cases." in told


def test_a_dice_of_zero_of_many_cases_has_advice_also_in_the_page_to_show_outside(run: Path, tmp_path: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    found["sites"]["site-1"]["dice_global"] = found["sites"]["site-2"]["dice_global"] = 0.0
    (tmp_path / "results.json").write_text(json.dumps(found))
    text = write_report(tmp_path, pictures=False).read_text()
    assert "all classes at site-1 (global)" in text and "site-2 (global" not in text


def test_a_page_to_show_outside_has_no_image_and_no_single_case(run: Path, page: str, tmp_path: Path) -> None:
    assert "Dice of every test case" in page and "keep it at the sites" in page
    outside = tmp_path / "outside.html"
    done = CliRunner().invoke(app, ["report", str(run), "--no-pictures", "--out", str(outside)])
    assert done.exit_code == 0, done.output
    text = outside.read_text()
    assert "<img" not in text and "Dice of every test case" not in text and "keep it at the sites" not in text
    assert "Validation Dice over rounds" in text and "site-1" in text


def test_a_page_to_show_outside_has_no_value_of_a_site_with_few_cases(run: Path, page: str, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "outside.html", pictures=False).read_text()
    rows = {site: next(line for line in text.splitlines() if f'<th scope="row">{site}</th>' in line) for site in SITES}
    assert "<td>6</td><td>0.625 (worst)</td><td>0.625 (worst)</td><td>+0.000</td><td>1, 1</td>" in rows["site-1"]
    for site in SITES[1:]:
        assert "<td>3</td><td>-</td><td>-</td><td>-</td><td>-</td>" in rows[site]
    # a mean over all sites would tell what is left out
    total = next(line for line in text.splitlines() if "Mean of sites" in line)
    assert re.findall(r"<td>([^<]*)</td>", total) == ["", "0.625", "0.625", "+0.000", "", ""]
    assert "worse than the global one" in page and "worse than the global one" not in text
    assert "Means over fewer than 5 cases are left out" in text and "are left out" not in page
    # curves: of the validation cases, and of the training cases
    words = dict(re.findall(r"<summary>In words: ([^<]*)</summary>([^<]*)<", text))
    assert set(re.findall(r" at (\S+) ends", words["validation dice over rounds"])) == {"site-1"}
    assert set(re.findall(r" at (\S+) ends", words["training loss over rounds"])) == {"site-1", SITES[-1]}
    assert SECRET not in text


def test_curves_of_a_site_whose_number_of_cases_is_not_known_are_not_shown_outside(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for path in copy.glob(f"workspace/*/simulate_job/bundle/{SPLIT_FILE}"):
        path.unlink()
    assert "Dice over rounds" not in write_report(copy, pictures=False).read_text()
    assert "Dice over rounds" in write_report(copy).read_text()


def test_a_run_of_few_cases_at_each_site_has_a_page_to_show_outside(run: Path, tmp_path: Path) -> None:
    few = json.loads((run / "results.json").read_text())
    few["sites"]["site-1"]["cases"] = 4
    (tmp_path / "results.json").write_text(json.dumps(few))
    text = write_report(tmp_path, pictures=False).read_text()
    assert re.findall(r"<td>([^<]*)</td>", next(line for line in text.splitlines() if "Mean of sites" in line)) == [
        *["", "-", "-", "-"],
        *["", ""],
    ]


def test_the_page_says_nothing_of_where_weights_lie(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PFEDSAM_CHECKPOINT", str(tmp_path / "someone" / "weights.pth"))
    text = write_report(run, tmp_path / "page.html").read_text()
    assert "someone" not in text and "a file of this machine" in text


@pytest.mark.slow
def test_the_page_is_the_same_twice(run: Path, page: str) -> None:
    line = [sys.executable, "-m", "pfedsam.cli", "report", str(run)]
    subprocess.run(line, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert (run / "report.html").read_text() == page


def test_a_site_with_markup_in_its_name_is_text(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    results = (run / "results.json").read_text().replace("site-2", "<b>`x`")
    (copy / "results.json").write_text(results)
    page = write_report(copy).read_text()
    assert "<b>" not in page and "At &lt;b&gt;<code>x</code> the personal model is worse" in page


def local_only(site: str, dice: float, case: str = SECRET) -> dict:
    """A record of a comparison in which the site trained alone."""
    row = {"site": site, "case": case_hash(site, case), "model": "personal", "dice": [dice], "failed": [False]}
    cases = [{**row, "hd95": [1.0], "asd": [1.0], "nsd": [1.0]}]
    return {"key": site + case, "strategy": "local_only", "seed": 0, "held_out": None, "cases": cases}


def write_records(path: Path, *records: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return path


def test_sites_that_do_better_alone_are_named_with_what_to_do(run: Path, tmp_path: Path) -> None:
    # the personal models have 0.5 at site-1 and 0.3 at site-2 on this case
    records = [local_only("site-1", 0.4), local_only("site-2", 0.45), local_only(SITES[2], 0.9, "of another fold")]
    other = {**local_only("site-1", 0.99), "key": "other", "strategy": "fedavg_lora"}
    unseen = {**local_only("site-1", 0.99), "key": "unseen", "held_out": "site-1"}
    file = write_records(tmp_path / "runs.jsonl", *records, other, unseen)
    page = write_report(run, tmp_path / "page.html", file).read_text()
    told = "At site-2 the personal model is worse than the site&#39;s own training (local_only) by 0.150 on the same 1"
    assert told in page
    assert "nearer to 1" in page
    assert "At site-1 the personal model is worse" not in page
    for site in SITES[2:]:
        assert f"{site} is in no record of local_only" in page
    assert "Whether a site would do better alone" not in page
    # a difference on one case is that case's
    outside = write_report(run, tmp_path / "outside.html", file, pictures=False).read_text()
    assert "own training (local_only) by" not in outside and "is in no record of local_only" in outside


def test_a_comparison_without_the_sites_alone_is_an_error(run: Path, page: str, tmp_path: Path) -> None:
    assert "Whether a site would do better alone" in page
    files = [
        tmp_path / "none.jsonl",
        write_records(tmp_path / "other.jsonl", {**local_only("site-1", 0.5), "strategy": "pfedsam"}),
        write_records(tmp_path / "elsewhere.jsonl", local_only("hospital", 0.5)),
    ]
    for file in files:
        with pytest.raises(PFedSAMError, match=rf"E33: .*{file.name} holds no record of local_only"):
            write_report(run, tmp_path / "page.html", file)
    assert not (tmp_path / "page.html").exists()


def words_of(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that a figure draws, with its place in pixels."""
    FigureCanvasAgg(figure).draw()
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]


def test_shares_of_several_rounds_have_a_curve_of_the_smallest(run: Path) -> None:
    curves = read_curves(run)
    titles = [plot.title for plot in plots(curves, json.loads((run / "results.json").read_text()), pd.DataFrame())]
    assert "Smallest share of an expert over rounds" in titles
    once = curves[(curves["round"] == curves["round"].max()) | ~curves["tag"].str.startswith("expert_share")]
    titles = [plot.title for plot in plots(once, json.loads((run / "results.json").read_text()), pd.DataFrame())]
    assert "Smallest share of an expert over rounds" not in titles and "Share of each expert at the end" in titles
    least = _smallest(curves[curves["tag"].str.startswith("expert_share_")])
    assert set(least[least["tag"] == "smallest share/layer_0"]["value"]) == {0.0}
    assert set(least[least["tag"] == "smallest share/layer_1"]["value"]) == {0.25}


def test_a_gate_with_one_expert_has_no_curves_as_it_has_nothing_to_choose(run: Path) -> None:
    curves, found = read_curves(run), json.loads((run / "results.json").read_text())
    one = curves[~curves["tag"].str.match("expert_share_[1-9]")]
    titles = [plot.title for plot in plots(one, found, pd.DataFrame())]
    assert titles == ["Dice of every test case", "Validation Dice over rounds", "Training loss over rounds"]
    titles = [plot.title for plot in plots(curves, found, pd.DataFrame())]
    assert "Gate entropy" in titles and "Share of each expert at the end" in titles


def test_effective_settings_name_the_number_of_blocks_not_auto(run: Path) -> None:
    page = write_report(run).read_text()
    (told,) = re.findall(r"adapted_blocks</th>\s*<td>(.*?)</td>", page)
    assert re.sub("<.*?>", "", told).strip().isdigit()


@pytest.mark.parametrize("rounds", [(0, 1, 2, 3), (8,)], ids=["every round", "once"])
@pytest.mark.parametrize("what", ["entropy", "shares"])
def test_no_words_of_a_figure_overprint_at_the_default_depth(what: str, rounds: tuple[int, ...]) -> None:
    tags = {
        "entropy": [f"gate_entropy/layer_{layer}" for layer in range(LAYERS)],
        "shares": [f"expert_share_{expert}/layer_{layer}" for layer in range(LAYERS) for expert in range(4)],
    }[what]
    # as uneven as shares are that still have their number
    values = {"expert_share_0": 0.6}
    lines = [(site, tag, n, values.get(tag.split("/")[0], 0.13)) for site in SITES for tag in tags for n in rounds]
    rows = pd.DataFrame(lines, columns=["site", "tag", "round", "value"])
    figure, told = share_figure(rows) if what == "shares" else curve_figure(rows, "nat")
    words = words_of(figure)
    assert [text.split(",")[0] for text, _ in words if "layer" in text] == [f"layer {n}" for n in range(LAYERS)]
    assert all(site in told for site in SITES)
    wide, high = figure.canvas.get_width_height()
    for text, box in words:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= wide and box.y1 <= high, f"'{text}' is cut off"
    for (one, first), (other, second) in combinations(words, 2):
        assert not first.overlaps(second), f"'{one}' and '{other}' overprint"


@pytest.mark.parametrize("sites", [2, 12, 40])
def test_every_line_or_the_highest_and_the_lowest_has_its_name_beside_it(sites: int) -> None:
    names = [f"site-{n}" for n in range(sites)]
    lines = [(name, "val_dice_global", n, 0.5 + 0.001 * place) for place, name in enumerate(names) for n in (0, 1)]
    figure, _ = curve_figure(pd.DataFrame(lines, columns=["site", "tag", "round", "value"]), "Dice")
    words = words_of(figure)
    beside = [(text.replace("\n", " "), box) for text, box in words if text.startswith("site")]
    expected = names if sites <= 12 else [f"{names[-1]} (highest)", f"{names[0]} (lowest)"]
    assert sorted(text for text, _ in beside) == sorted(expected)
    assert not any(one.overlaps(other) for (_, one), (_, other) in combinations(words, 2))
    heights = [box.y0 for text, box in sorted(beside, key=lambda pair: expected.index(pair[0]))]
    assert heights == sorted(heights, reverse=sites > 12)


def test_words_and_lines_of_the_curves_are_large_and_in_the_colours_of_the_page(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert figures
    for figure in figures:
        width = float(re.search(r'viewBox="0 0 ([\d.]+) ', figure)[1])
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:[a-z0-9]+ )?([\d.]+)px", figure)]
        # at the width of a laptop's window letters have 20 pixels at least
        assert sizes and min(sizes) * 1200 / width >= 20
        assert not set(re.findall(r"#[0-9a-f]{6}\b", figure)), "a colour that is not the page's"


def test_layers_are_in_the_order_of_their_numbers() -> None:
    tags = [f"gate_entropy/layer_{layer}" for layer in (10, 2, 1)]
    rows = pd.DataFrame([("x", tag, n, 1.0) for tag in tags for n in (0, 1)], columns=["site", "tag", "round", "value"])
    figure, _ = curve_figure(rows, "nat")
    assert [axes.get_title() for axes in figure.axes] == ["layer 1", "layer 2", "layer 10"]


def test_curves_groups_settings_and_citation(page: str, run: Path) -> None:
    for words in (
        "Validation Dice over rounds",
        "Gate entropy",
        "Share of each expert",
        "Megabytes sent",
        "2509.15638",
    ):
        assert words in page
    assert re.search(r'<th scope="row">decoder_subset</th><td>shared</td>', page)
    assert re.search(r'<th scope="row">experts</th><td>personal</td>', page)
    assert '<th scope="row">bottleneck</th><td>16</td>' in page
    curves = read_curves(run)
    assert curves[(curves.tag == "val_dice_global") & (curves.site == "site-1")]["round"].tolist() == [0, 1, 2, 3]


def test_megabytes_are_of_what_left_after_all_filters(page: str) -> None:
    assert f"sent at all sites ends at {2 * len(SITES):.2f}" in page


def test_a_run_that_was_started_again_has_the_rounds_of_all_its_starts(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for site in SITES:
        (tmp_path / "data" / site / "images").mkdir(parents=True)
    again = Simulation(tmp_path / "data", copy)
    before = read_curves(copy), sent_bytes(again)
    keep_start(again)
    assert not list((copy / "workspace").rglob("events*"))
    pd.testing.assert_frame_equal(read_curves(copy), before[0])
    assert sent_bytes(again) == before[1] == {site: {0: 1e6, 1: 1e6} for site in SITES}
    # the second start does round 1 again, and round 4
    kept = copy / "earlier" / "0"
    shutil.copytree(kept, copy / "workspace", dirs_exist_ok=True)
    for site in SITES:
        sent = copy / "workspace" / site / "simulate_job" / "pfedsam_sent.jsonl"
        told = [{"stage": "left", "task": "train", "tensors": 3, "round": n, "bytes": 2e6} for n in (1, 4)]
        sent.write_text("\n".join(map(json.dumps, told)) + "\n")
        with SummaryWriter(str(copy / "workspace" / "server" / "simulate_job" / "tb_events" / site)) as writer:
            writer.add_scalar("val_dice_global", 0.7, 4)
    assert sent_bytes(again) == {site: {0: 1e6, 1: 2e6, 4: 2e6} for site in SITES}
    curves = read_curves(copy)
    assert curves[(curves.tag == "val_dice_global") & (curves.site == SITES[0])]["round"].tolist() == [0, 1, 2, 3, 4]
    assert f"sent at all sites ends at {5 * len(SITES):.2f}" in write_report(copy).read_text()
    keep_start(again)
    assert (copy / "earlier" / "1").is_dir() and sent_bytes(again)[SITES[0]] == {0: 1e6, 1: 2e6, 4: 2e6}


def test_ids_of_the_figures_do_not_meet(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"results\.json"):
        write_report(tmp_path)


def test_a_page_takes_the_place_of_another_file_by_force_only(run: Path, tmp_path: Path) -> None:
    there = tmp_path / "thesis.html"
    there.write_text("mine")
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(there)])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24" and there.read_text() == "mine"
    results = run / "results.json"
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(results), "--force"])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E24" and json.loads(results.read_text())
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(there), "--force"])
    assert done.exit_code == 0 and there.read_text().rstrip().endswith("</html>")


def test_a_run_without_curves_or_job_has_a_page(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "results.json", tmp_path)
    assert "site-1" in write_report(tmp_path).read_text()


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of `pfedsam simulate`: two phantom sites, one round of the smallest network, an ablation."""
    folder = tmp_path_factory.mktemp("trained")
    write_phantom(folder / "data", sites=2, cases=6, shape=(32, 32, 6))
    options = [word for pair in TINY for word in ("--set", pair)]
    line = [sys.executable, "-m", "pfedsam.cli", "simulate", folder / "data", "--out", folder / "run", "--rounds", "1"]
    # what it sets in the network must hold in the evaluation, too
    subprocess.run([*line, "--strategy", "experts_2", *options], check=True, cwd=folder)
    return folder / "run"


@pytest.mark.slow
def test_a_run_that_trained_has_all_its_figures_and_pictures(trained_run: Path) -> None:
    page = (trained_run / "report.html").read_text()
    for title in (
        "Dice of every test case",
        "Validation Dice over rounds",
        "Training loss over rounds",
        "Gate entropy",
        "Share of each expert at the end",
        "Megabytes sent by all sites up to each round",
    ):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<img ") >= 2


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "trained_run"])
def test_in_a_real_browser(
    source: str, request: pytest.FixtureRequest, in_browser: Callable[[Path], dict[str, Any]]
) -> None:
    page = write_report(request.getfixturevalue(source))
    assert page.stat().st_size < 10e6
    found = in_browser(page)
    assert found["keys"] == {"in_order": True, "outlined": True, "opened": True, "enlarged": True}


def test_which_sites_are_alike_is_shown_where_the_server_wrote_it_down(run: Path, page: str, tmp_path: Path) -> None:
    assert "Which sites are alike" not in page
    told = {
        "sites": ["a", "<b>", "c"],
        "similarity": [[1.0, 0.251, -0.5], [0.251, 1.0, 0.0], [-0.5, 0.0, 1.0]],
        "shares": [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.333, 0.333, 0.333]],
        "groups": [["a", "<b>"]],
    }
    equal = {**told, "groups": [], "shares": [[0.333] * 3] * 3}
    mixed = {**told, "groups": []}
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    records = copy / "workspace" / "server" / "simulate_job" / "pfedsam_rounds.jsonl"
    lines = [{"round": number, "downloads": one} for number, one in enumerate((equal, mixed, told))]
    records.write_text("".join(json.dumps(line) + "\n" for line in [{"round": 0}, *lines]))
    written = write_report(copy, tmp_path / "page.html").read_text()
    assert "Which sites are alike" in written and "<b>" not in written and "0.25 (0.50)" in written
    assert "After round 0: all sites have the mean of all." in written
    assert "After round 1: each site has a mixture of its own." in written
    assert "After round 2: a, &lt;b&gt;." in written
