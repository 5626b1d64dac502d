"""The report: what it says, and (slow) what a real browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from pfedsam.bundles import folder
from pfedsam.errors import PFedSAMError
from pfedsam.evaluation.pictures import case_picture
from pfedsam.evaluation.report import read_curves, write_report
from pfedsam.evaluation.site import CasePrediction, CaseScore, SiteEvaluation
from pfedsam.evaluation.tables import results

SITES = ("site-1", "site-2")
SECRET = "patient-4711"


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
        shown = CasePrediction(SECRET, "image", label, {m: np.roll(label, 2, 1) for m in ("global", "personal")})
        for n in range(6 - 3 * place):
            for model in ("global", "personal"):
                dice = 0.5 + 0.05 * n - (0.2 * place if model == "personal" else 0)
                case = SECRET if n == 0 else f"{SECRET}-{n}"
                scores.append(CaseScore(site, case, model, (dice,), (2.0,), (1.0,), (0.5,), (n == 5,)))
        found = SiteEvaluation(site, scores, {"best": shown, "median": shown, "worst": shown})
        evaluations.append(found)
        for example in found.examples:
            case_picture(found, example, random.uniform(size=(24, 24, 6)), out / "pictures" / f"{site}-{example}.png")
        events = out / "workspace" / "server" / "simulate_job" / "tb_events" / site
        with SummaryWriter(str(events)) as writer:
            for number in range(4):
                writer.add_scalar("val_dice_global", 0.1 * number, number)
                writer.add_scalar("loss/local", 1 / (number + 1), number)
                writer.add_scalar("gate_entropy/layer_0", 1.2, number)
                for expert, share in enumerate((0.5, 0.49, 0.01, 0.0)):
                    writer.add_scalar(f"expert_share_{expert}/layer_0", share, number)
        sent = out / "workspace" / site / "simulate_job" / "pfedsam_sent.jsonl"
        sent.parent.mkdir(parents=True)
        lines = [
            {"task": "train", "round": n, "bytes": 1000, "tensors": 3, "by_group": {"lora_a": 1000}} for n in (0, 1)
        ]
        sent.write_text("\n".join(map(json.dumps, lines)) + "\n")
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
    assert len(pictures) == 6
    assert pictures[0].startswith("site-1, best test case")


def test_warnings(page: str) -> None:
    assert "At site-2 the personal model is worse than the global one by 0.200" in page
    assert "At site-1 expert 3 of layer 0 is dead" in page
    assert "site-2 has 3 test case(s)" in page
    assert "At site-1 the global model missed a class in 1 of 6 cases" in page


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


def test_ids_of_the_figures_do_not_meet(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"results\.json"):
        write_report(tmp_path)


def test_a_run_without_curves_or_job_has_a_page(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "results.json", tmp_path)
    assert "site-1" in write_report(tmp_path).read_text()


@pytest.mark.slow
def test_in_a_real_browser(run: Path, tmp_path: Path) -> None:
    """Needs Debian's chromium, node and npm (`apt install chromium nodejs npm`)."""
    browser = shutil.which("chromium")
    if not (browser and shutil.which("npm")):
        pytest.skip("chromium or npm is not installed: apt install chromium nodejs npm")
    subprocess.run(["npm", "install", "--silent", "axe-core@4", "puppeteer-core@24"], cwd=tmp_path, check=True)
    script = Path(__file__).with_name("browser.js")
    shutil.copy(script, tmp_path)
    done = subprocess.run(
        ["node", "browser.js", browser, write_report(run)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["errors"] == found["requests"] == []
    for view in found["views"]:
        assert view["broken"] == 0
        assert not view["wider_than_the_window"], view["name"]
        assert [one for one in view["violations"] if one["impact"] in ("serious", "critical")] == []
