"""What the report says that each site serves, and whether personalisation pays there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from pfedsam.bundles import network_of
from pfedsam.cli import app
from pfedsam.evaluation.site import MODELS, CaseScore, SiteEvaluation
from pfedsam.evaluation.tables import results
from pfedsam.parameters import Roles
from pfedsam.report.page import write_report
from pfedsam.report.serving import HIDDEN, UNKNOWN, Gain, advice, servings
from pfedsam.storage.site_model import SiteModel, write
from pfedsam.training.catalogue import find_strategy

BUNDLE, OVERRIDES = "brain_lesion_mri", {"backbone": "vit_test", "image_size": 32}
GAINS = {
    "gains": (0.10, 0.12, 0.11, 0.13, 0.09, 0.12),
    "loses": (-0.10, -0.12, -0.11),
    "unclear": (0.10, -0.10, 0.05, 0.02, -0.04),
    "single": (0.3,),
    "same": (0.0, 0.0, 0.0, 0.0, 0.0),
}
CHOSEN = {"epochs": 8, "alpha": 0.5, "alone": False, "gain": 0.021, "error": 0.008, "patients": 6, "compared": []}


def table(gains: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Results of sites whose personal model has so much more than the global one in each case."""
    evaluations = []
    for site, values in gains.items():
        scores = [
            CaseScore(site, f"patient-{n}", model, *[(0.5 + gain * (model == "personal"),)] * 4, (False,))
            for n, gain in enumerate(values)
            for model in MODELS
        ]
        evaluations.append(SiteEvaluation(site, scores))
    return results(evaluations, {})


def plan(strategy: str, **changed: Any) -> dict[str, Any]:
    told = json.loads(find_strategy(strategy).checked().model_dump_json())
    return {"federation": "f", "bundle": BUNDLE, "strategy": told | changed, "overrides": OVERRIDES}


@pytest.fixture(scope="module")
def network() -> Any:
    return network_of(BUNDLE, OVERRIDES)


def keep(run: Path, network: Any, site: str, **info: Any) -> None:
    """The state of a site as a simulation leaves it."""
    roles = Roles(("lora_a", "lora_b", "decoder_subset"), ("experts",))
    folder = run / "state" / "f" / site / f"{BUNDLE}-0123"
    folder.mkdir(parents=True)
    write(folder / "state.safetensors", SiteModel.of(network, roles, bundle=BUNDLE, round=2, final=True, **info))


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    for values in (GAINS["gains"], GAINS["unclear"]):
        found, expected = Gain.of(values), ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (Gain.of((0.3,)).low, Gain.of((0.3,)).cases) == (None, 1)
    # no Dice is farther from another than 1
    assert Gain.of((1.0, -1.0)).high == 1


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("gains", "it pays"),
        ("loses", "it costs"),
        ("unclear", "cannot be told from chance with 5 cases"),
        ("single", "one case says nothing"),
        ("same", "the same as the global model"),
    ],
)
def test_whether_it_pays_is_said_only_where_the_interval_leaves_out_zero(site: str, words: str) -> None:
    assert Gain.of(GAINS[site]).verdict == words


@pytest.mark.parametrize(
    ("served", "words"),
    [
        (CHOSEN, "the personal model after 8 epoch(s), at 0.5 of the way from the global one, by its own choice on 6"),
        (CHOSEN | {"alone": True, "alpha": 1.0}, "its own model, trained alone for 8 epoch(s), by its own choice on 6"),
        (CHOSEN | {"epochs": 0, "alpha": 0.0}, "the global model, by its own choice on 6 patient(s)"),
    ],
)
def test_a_site_that_chose_for_itself_is_told_with_its_choice(
    tmp_path: Path, network: Any, served: dict[str, Any], words: str
) -> None:
    keep(tmp_path, network, "gains", served=served)
    (one,) = servings(tmp_path, table({"gains": GAINS["gains"]}), plan("longer_ft_chosen"))
    assert one.serves.startswith(words)
    assert ("gain there +0.021, standard error 0.008" in one.serves) == bool(served["epochs"])
    # outside, few patients are not told of
    (hidden,) = servings(tmp_path, table({"gains": GAINS["gains"]}), plan("longer_ft_chosen"), least=7)
    assert hidden.serves == HIDDEN and hidden.gain is None


def test_a_strategy_says_what_its_sites_serve(tmp_path: Path, network: Any) -> None:
    keep(tmp_path, network, "gains")
    found = table({"gains": GAINS["gains"], "gone": GAINS["same"]})

    def told(strategy: str, **changed: Any) -> list[str]:
        return [one.serves for one in servings(tmp_path, found, plan(strategy, **changed))]

    assert told("pfedsam") == ["the personal model, at 0.5 of the way from the global one", UNKNOWN]
    assert told("pfedsam", interpolation=1.0)[0] == "the personal model"
    assert told("fedavg_lora")[0] == "the global model: its strategy keeps nothing personal"
    assert [one.serves for one in servings(tmp_path, found, {})] == [UNKNOWN, UNKNOWN]


def test_advice_names_the_sites_and_says_what_to_do(tmp_path: Path) -> None:
    found = table(GAINS)
    text = " ".join(advice(servings(tmp_path, found, {}), found))
    assert "it pays at gains" in text and "it costs at loses" in text
    assert "it cannot be told from chance at unclear, single, same" in text
    assert "At loses use the global model: `pfedsam infer --global`" in text and "more test cases" in text
    sure = table({"gains": GAINS["gains"]})
    text = " ".join(advice(servings(tmp_path, sure, {}), sure))
    assert "infer --global" not in text and "more test cases" not in text and "Expect none where" in text


def test_page_and_terminal_tell_it_and_outside_only_of_many_cases(tmp_path: Path) -> None:
    content = {"about": {"bundle": BUNDLE, "overrides": OVERRIDES}, **table(GAINS)}
    (tmp_path / "results.json").write_text(json.dumps(content))
    done = CliRunner().invoke(app, ["report", str(tmp_path)], env={"COLUMNS": "500"})
    assert done.exit_code == 0, done.output
    assert "gains serves not known" in done.output and "Does personalisation pay here?" in done.output
    page = (tmp_path / "report.html").read_text()
    row = next(line for line in page.splitlines() if ">gains</th>" in line and "it pays" in line)
    assert "+0.112" in row and "<td>6</td>" in row
    outside = write_report(tmp_path, tmp_path / "outside.html", pictures=False).read_text()
    section = outside.split('id="serving"')[1].split("</section>")[0]
    rows = {site: next(line for line in section.splitlines() if f">{site}</th>" in line) for site in GAINS}
    assert "it pays" in rows["gains"] and "it costs" not in section and "one case says nothing" not in section
    assert all(rows[site].count("<td>-</td>") == 4 for site in ("loses", "single"))
    # nor does the sum tell them
    assert "Over all 16 cases" in section
    assert "patient-" not in page + outside
