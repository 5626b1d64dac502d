"""What a site keeps after its final phase: the choice, the models that are compared, what a cross-fit leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from pfedsam.data.phantom import write_phantom
from pfedsam.data.seen import patient_of
from pfedsam.errors import PFedSAMError
from pfedsam.parameters import personal_state, shared_state, swapped_parameters
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.choice import GLOBAL, Candidate, choose, standard_error
from pfedsam.training.cross_fit import CrossFit, dice_of, overlap
from pfedsam.training.serving import Serving
from pfedsam.training.site import SiteTrainer
from pfedsam.training.strategy import Strategy
from pfedsam.training.validation import validated_cases

torch.set_num_threads(1)
TINY = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "augmentations": 2, "positives_per_case": 2}
TINY |= {"negatives_per_case": 1}
ALONE = {"name": "alone", "trains": ["copy"], "experts": False, "epochs": 2, "learning_rate": 0.01}
ROLES = find_strategy("fedavg_lora").checked().roles
SERVING = {"folds": 2, "epochs": [1, 2], "alphas": [0.5, 1.0], "margin": 0.0}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross-fit")
    write_phantom(folder, sites=1, cases=8, shape=(32, 32, 6))
    return folder / "site-1"


def opened(site: Path, out: Path, name: str = "pfedsam", **serving: Any) -> SiteTrainer:
    settings = find_strategy(name).checked().model_dump(mode="json")
    settings |= {"interpolation": 1.0, "serving": {**SERVING, **serving}}
    file = find_strategy(name)
    local = SiteTrainer("brain_lesion_mri", site, Strategy.of(settings), {**TINY, **file.overrides}, out)
    local.open()
    local.receive(shared_state(local.network, local.strategy.roles), local.fingerprint)
    return local


# the choice -----------------------------------------------------------------------------------------------------------


def test_the_largest_gain_is_chosen_if_it_stands_out_and_the_global_model_else():
    sure, unsure = [0.04, 0.05, 0.06], [0.3, -0.2, 0.06]
    gains = {Candidate(2, 0.5): sure, Candidate(4, 1.0): [0.01, 0.02, 0.03]}
    assert choose(gains, margin=1).candidate == Candidate(2, 0.5)
    choice = choose({Candidate(2, 0.5): unsure}, margin=1)
    assert choice.candidate == Candidate() and choice.kept.gain == 0 and choice.best.candidate == Candidate(2, 0.5)
    assert choose({Candidate(2, 0.5): unsure}, margin=0).candidate == Candidate(2, 0.5)
    assert choose({Candidate(2, 0.5): [-0.01, -0.02, -0.01]}, margin=0).candidate == Candidate()


def test_of_equal_gains_the_model_nearest_to_the_global_one_is_chosen():
    gains = {Candidate(8, 1.0): [0.1, 0.1], Candidate(2, 0.25): [0.1, 0.1], Candidate(4, 0.25): [0.1, 0.1]}
    assert choose(gains, margin=1).candidate == Candidate(2, 0.25)


def test_the_gain_of_one_patient_stands_out_from_nothing():
    assert choose({Candidate(2, 0.5): [0.4]}, margin=1).candidate == GLOBAL


def test_what_is_expected_of_the_spread_lets_a_site_with_one_patient_choose_and_fades_with_many():
    assert choose({Candidate(2, 0.5): [0.04]}, margin=1, spread=0.03).candidate == Candidate(2, 0.5)
    assert choose({Candidate(2, 0.5): [0.04]}, margin=1, spread=0.05).candidate == GLOBAL
    assert standard_error([0.04], 0.05) == pytest.approx(0.05)
    assert standard_error([0.0, 0.2], 0.1) == pytest.approx((0.03 / 2 / 2) ** 0.5)
    many = [0.0, 0.2] * 500
    assert standard_error(many, 0.05) == pytest.approx(standard_error(many, 0.0), rel=1e-2)


def test_the_state_tells_all_that_was_compared():
    gains = {Candidate(2, 0.5): [0.01, 0.03], Candidate(4, 1.0): [0.05, 0.07]}
    told = choose(gains, margin=0).to_dict()
    assert (told["epochs"], told["gain"], told["patients"]) == (4, 0.06, 2)
    assert [(one["epochs"], one["gain"]) for one in told["compared"]] == [(4, 0.06), (2, 0.02)]


def test_validation_cases_that_say_the_opposite_bring_the_global_model_back():
    choice = choose({Candidate(2, 0.5): [0.04, 0.05, 0.06]}, margin=1)
    assert choice.confirmed(-0.04, 3) is choice
    assert choice.confirmed(-0.06, 3).candidate == Candidate()
    assert "global model" in choice.confirmed(-0.06, 3).sentence and "+0.050" in choice.sentence


def test_dice_is_of_all_slices_together_by_class():
    label = torch.zeros(2, 2, 4, 4)
    label[0, 0, :2] = 1
    logits = torch.where(label > 0, 3.0, -3.0)
    logits[0, 0, 0] = -3.0
    logits[1, 0, 0] = 3.0  # four found, four missed, four right
    counts = overlap(logits, label, exclusive=False)
    assert counts.tolist() == [[8, 0], [16, 0]] and dice_of(counts) == pytest.approx((0.5 + 1) / 2)
    background = torch.cat([1 - label.sum(1, keepdim=True), label], 1)
    exclusive = overlap(torch.cat([torch.zeros(2, 1, 4, 4), logits], 1), background, exclusive=True)
    assert torch.equal(exclusive, counts)


# the models that are compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pfedsam", "fedavg_lora_ft"])
def test_what_is_compared_is_what_would_be_kept(site: Path, tmp_path: Path, name: str):
    local = opened(site, tmp_path, name)
    phase = local.strategy.final[0]
    local._run((phase.model_copy(update={"epochs": 1}),), 0)
    images = torch.rand(2, 3, 32, 32)
    with_copy = "copy" in phase.trains
    received = local.tensors.received
    own = local.tensors.copy if with_copy else received

    def logits(alpha: float, kept: bool) -> torch.Tensor:
        local.network.eval()
        with torch.no_grad(), local.network.experts(True):
            if kept:
                with swapped_parameters(local.network, local.tensors.beside()):
                    return local.network(images)
            with swapped_parameters(local.network, own), local.tensors.nearer(alpha, with_copy):
                return local.network(images)

    whole, half = logits(1.0, kept=False), logits(0.5, kept=False)
    assert torch.allclose(whole, logits(1.0, kept=True), atol=1e-6) and not torch.allclose(whole, half, atol=1e-4)
    local.tensors.interpolate(0.5)
    assert torch.allclose(half, logits(0.5, kept=True), atol=1e-5)


def test_nobody_is_compared_on_what_it_was_fitted_to_and_all_are_compared_once(site, tmp_path, monkeypatch):
    local = opened(site, tmp_path)
    fit = CrossFit(local.trainer, local.tensors, local.cases, seed=0)
    drawn: set[str] = set()
    compared: list[set[str]] = []
    of_item = {number: patient_of(local.cases[volume]) for number, (volume, _) in enumerate(fit.sampler.dataset.slices)}
    real = CrossFit._dice

    def dice(self: CrossFit, slices: Any, alpha: float, phase: Any) -> dict[str, float]:
        patients = {of_item[item // self.sampler.dataset.variants] for items in slices.values() for item in items}
        assert patients == set(slices) and not patients & drawn
        compared.append(patients)
        return real(self, slices, alpha, phase)

    monkeypatch.setattr(CrossFit, "_dice", dice)

    def train(phase: Any) -> None:
        drawn.clear()
        local._run((phase,), 0)
        drawn.clear()

    @local.trainer.on(Events.ITERATION_STARTED)
    def note(engine: Any) -> None:
        drawn.update(of_item[int(item) // fit.sampler.dataset.variants] for item in engine.state.batch["index"])

    before = personal_state(local.network, local.strategy.roles)
    whole = len(local.trainer.data_loader)  # type: ignore[arg-type]
    choice = fit.run(local.strategy.final[0], Serving.of(SERVING), train)
    everybody = {patient_of(case) for case in local.cases}
    assert choice.patients == len(everybody) and set().union(*compared) == everybody
    assert sum(map(len, compared)) == len(everybody) * (1 + 2 * 2)
    after = personal_state(local.network, local.strategy.roles)
    assert all(torch.equal(after[name], one) for name, one in before.items())
    assert len(local.trainer.data_loader) == whole  # type: ignore[arg-type]


def test_a_site_compares_what_it_has_alone_which_owes_the_others_nothing(site, tmp_path):
    local = opened(site, tmp_path, alone=ALONE)
    base = local.tensors.received
    local.receive({name: tensor + 0.1 for name, tensor in base.items()}, local.fingerprint)
    began: list[dict[str, torch.Tensor]] = []

    def train(phase: Any) -> None:
        if phase.name == "alone":
            began.append(local.tensors.copy)
        local._run((phase,), 0)

    fit = CrossFit(local.trainer, local.tensors, local.cases, seed=0)
    choice = fit.run(local.strategy.final[0], Serving.of({**SERVING, "alone": ALONE}), train)
    assert choice.patients == len({patient_of(case) for case in local.cases})
    assert [{name: tensor.tolist() for name, tensor in copy.items()} for copy in began] == [
        {name: tensor.tolist() for name, tensor in base.items()}
    ] * 2
    assert not local.tensors.copy


# what a site keeps ----------------------------------------------------------------------------------------------------


def test_a_site_without_a_gain_keeps_exactly_the_global_model_and_says_so(site, tmp_path, caplog):
    caplog.set_level("INFO")
    local = opened(site, tmp_path, margin=1000.0)
    local.finish(3)
    assert local.served is not None and local.served.candidate == Candidate()
    assert local.model(round=3).info["served"]["epochs"] == 0 and "kept: the global model" in caplog.text
    images = torch.rand(1, 3, 32, 32)
    local.network.eval()
    with torch.no_grad():
        with local.network.experts(True):
            personal = local.network(images)
        with local.network.experts(False):
            assert torch.equal(personal, local.network(images))


def test_a_chosen_model_is_trained_on_all_patients_for_the_chosen_epochs(site, tmp_path, monkeypatch):
    local = opened(site, tmp_path)
    monkeypatch.setattr(CrossFit, "run", lambda *_: choose({Candidate(1, 0.5): [0.1, 0.1]}, 1.0))
    monkeypatch.setattr(local, "validate", lambda experts: {"val_dice": 0.5 if experts else 0.4})
    result = local.finish(3)
    steps = len(local.trainer.data_loader)  # type: ignore[arg-type]
    assert result.phases["final"].steps == steps and local.trainer.state.max_epochs == 2
    assert local.served is not None and local.served.candidate == Candidate(1, 0.5)
    assert any(bool(tensor.any()) for name, tensor in result.personal.items() if name.endswith("up"))


def test_a_model_of_its_own_is_kept_where_it_is_chosen(site, tmp_path, monkeypatch):
    """It is the same as if the site had never heard of the others."""
    kept = []
    for shift in (0.0, 0.1):
        local = opened(site, tmp_path / str(shift), alone=ALONE)
        local.receive({name: tensor + shift for name, tensor in local.tensors.received.items()}, local.fingerprint)
        choice = choose({Candidate(2, 1.0, alone=True): [0.1, 0.1]}, 1.0)
        monkeypatch.setattr(CrossFit, "run", lambda *_, choice=choice: choice)
        monkeypatch.setattr(local, "validate", lambda experts: {"val_dice": 0.5 if experts else 0.4})
        result = local.finish(3)
        assert "the site's own model, trained alone for 2 epoch(s)" in choice.sentence
        assert local.model(round=3).info["served"]["alone"] is True
        kept.append(result.personal)
    assert kept[0].keys() == kept[1].keys() and any(name.startswith("personal.") for name in kept[0])
    assert all(torch.equal(kept[0][name], tensor) for name, tensor in kept[1].items())


def test_a_site_with_few_slices_makes_as_many_steps_as_another_within_its_own_limit():
    serving = Serving.of({**SERVING, "epochs": [2, 4, 8], "least_steps": 100, "alone": {**ALONE, "epochs": 10}})
    assert serving.stretched(13) == serving.model_copy(update={"epochs": (2, 4, 8)})
    short = serving.stretched(2)
    assert short.epochs == (14, 28, 56) and short.alone is not None and short.alone.epochs == 50
    assert sum(serving.runs()) == (8 + 10) * 2 + 10
    limited = serving.stretched(2, most_epochs=100)
    assert limited.epochs == (4, 8, 16) and sum(limited.runs()) <= 100
    assert serving.stretched(2, most_epochs=20).epochs == (2, 4, 8)  # which the site has allowed, or refused before


def test_a_site_stretches_what_it_compares(site, tmp_path, monkeypatch):
    local = opened(site, tmp_path, least_steps=40)
    steps = len(local.trainer.data_loader)  # type: ignore[arg-type]
    compared: list[tuple[int, ...]] = []

    def run(fit: CrossFit, phase: Any, serving: Serving, train: Any) -> Any:
        compared.append(serving.epochs)
        return choose({Candidate(serving.epochs[0], 1.0): [0.0, 0.0]}, 1.0)

    monkeypatch.setattr(CrossFit, "run", run)
    local.finish(3)
    [(first, last)] = compared
    assert last * steps >= 40 > (last - 2) * steps and last == 2 * first


# on the validation cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pfedsam", "fedavg_lora_ft"])
def test_the_validation_cases_choose_among_models_of_one_training(site, tmp_path, monkeypatch, name):
    local = opened(site, tmp_path, name, folds=0, epochs=[1, 2, 3], alphas=[0.5, 1.0], alone=ALONE)
    told = {"base": [0.3, 0.5], (1, 0.5): [0.3, 0.5], (1, 1.0): [0.3, 0.5], (2, 0.5): [0.5, 0.71], (2, 1.0): [0.5, 0.7]}
    answers = [told["base"], *(told.get((epoch, a), [0.2, 0.2]) for epoch in (1, 2, 3) for a in (0.5, 1.0)), [0.4, 0.6]]
    asked: list[dict[str, torch.Tensor]] = []

    def cases(evaluator: Any, exclusive: bool) -> list[float]:
        asked.append({**personal_state(local.network, local.strategy.roles), **shared_state(local.network, ROLES)})
        return answers[len(asked) - 1]

    monkeypatch.setattr("pfedsam.training.site.validated_cases", cases)
    local.validation_cases = [{"case": name, "patient": name} for name in ("a", "b")]
    result = local.finish(3)
    assert len(asked) == len(answers) and local.served is not None
    assert local.served.candidate == Candidate(2, 0.5) and local.served.kept.gain == pytest.approx(0.205)
    assert result.phases["final"].steps == 3 * len(local.trainer.data_loader)  # type: ignore[arg-type]
    # what is kept is what was compared, not what came after it
    with torch.no_grad(), local.network.experts(True), swapped_parameters(local.network, local.tensors.beside()):
        images = torch.rand(2, 3, 32, 32)
        kept = local.network.eval()(images)
        if name == "fedavg_lora_ft":
            with swapped_parameters(local.network, {n: t for n, t in asked[3].items() if n in local.tensors.copy}):
                assert torch.allclose(kept, local.network(images), atol=1e-5)
        else:
            halved = {n: (t * 0.5 if n.endswith(("up", "up_bias")) else t) for n, t in asked[3].items()}
            with swapped_parameters(local.network, halved):
                assert torch.allclose(kept, local.network(images), atol=1e-5)


def test_validation_cases_without_a_gain_bring_the_global_model_back(site, tmp_path):
    local = opened(site, tmp_path, folds=0, margin=1000.0, alone=ALONE)
    local.finish(3)
    assert local.served is not None and local.served.candidate == Candidate()
    images = torch.rand(1, 3, 32, 32)
    local.network.eval()
    with torch.no_grad():
        with local.network.experts(True), swapped_parameters(local.network, local.tensors.beside()):
            personal = local.network(images)
        with local.network.experts(False), swapped_parameters(local.network, local.tensors.received):
            assert torch.equal(personal, local.network(images))


def test_dice_of_validation_cases_is_that_of_the_validation(site, tmp_path):
    local = opened(site, tmp_path, folds=0)
    dice = validated_cases(local.evaluator, local.trainer.exclusive)
    assert len(dice) == len(local.validation_cases)
    assert sum(dice) / len(dice) == pytest.approx(local.validate(experts=False)["val_dice"], abs=1e-6)


def test_a_bundle_that_draws_its_slices_in_its_own_way_is_told_so(site, tmp_path):
    local = opened(site, tmp_path)
    local.trainer.data_loader = torch.utils.data.DataLoader([{"image": 1}])
    with pytest.raises(PFedSAMError, match="E32: the strategy's 'serving' cannot leave patients out"):
        local.finish(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"interpolation": 0.5}, "leave interpolation out"),
        ({"final": []}, "0 final phases"),
        ({"personal": ["decoder_subset"], "shared": ["lora_a", "lora_b"]}, "in no global model"),
        ({"serving": {"folds": 1}}, "folds"),
        ({"serving": {"alphas": [0.0]}}, "alphas"),
        ({"serving": {"alone": {**ALONE, "trains": ["personal"]}}}, "alone"),
        ({"serving": {"alone": {**ALONE, "experts": True}}}, "alone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], words: str):
    settings = find_strategy("pfedsam").checked().model_dump(mode="json")
    with pytest.raises(PFedSAMError, match=f"E16.*{words}"):
        Strategy.of({**settings, "interpolation": 1.0, "serving": SERVING, **change})
