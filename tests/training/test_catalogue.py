"""Every strategy: its defining property, its checked-in job, and how one is added."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pfedsam import defaults
from pfedsam.bundles import folder, network_of
from pfedsam.cli import app
from pfedsam.deployment.job_files import plan_settings
from pfedsam.deployment.jobs import make_job
from pfedsam.errors import PFedSAMError
from pfedsam.federated.plan import Plan
from pfedsam.ownership import MARKER
from pfedsam.parameters import COPY, group_of
from pfedsam.training.catalogue import StrategyFile, ablation_names, find_strategy, patched, strategy_names

TINY = {"backbone": "vit_test", "image_size": 64}
SERVERLESS = {"centralised", "local_only", "ensemble_local"}
ALL = {
    *SERVERLESS, "fedsam", "fedmsa", "fedavg_lora", "fedavg_lora_ft", "fedprox", "fedln", "fedrep", "ditto", "feddpa",
    "fedsa", "ffa_lora", "pfedsam", "pfedsam_chosen",
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SUBSET = {"lora_a", "lora_b", "decoder_subset"}


def plan_of(name: str, **overrides: Any) -> Plan:
    file = find_strategy(name)
    return Plan("test", "brain_lesion_mri", file.strategy, {**file.overrides, **TINY, **overrides})


def groups(names) -> set[str]:
    return {group_of(name) for name in names}


def test_there_are_sixteen() -> None:
    assert set(strategy_names()) == ALL
    assert {name for name in ALL if find_strategy(name).kind != "federated"} == SERVERLESS


#: strategy, groups that leave, groups that stay; a copy of what is shared is told apart below
TRAVELS = [
    ("fedsam", {"encoder", "decoder_subset", "decoder_rest"}, set()),
    ("fedmsa", SUBSET | {"decoder_rest"}, set()),
    ("fedavg_lora", SUBSET, set()),
    ("fedavg_lora_ft", SUBSET, set()),
    ("fedprox", SUBSET, set()),
    ("fedrep", {"lora_a", "lora_b"}, {"decoder_subset"}),
    ("ditto", SUBSET, set()),
    ("feddpa", SUBSET, {"experts"}),
    ("fedsa", {"lora_a", "decoder_subset"}, {"lora_b"}),
    ("ffa_lora", {"lora_b", "decoder_subset"}, set()),
    ("pfedsam", SUBSET, {"experts"}),
    ("pfedsam_chosen", SUBSET, {"experts"}),
]


@pytest.mark.parametrize(("name", "leaves", "stays"), TRAVELS, ids=[name for name, *_ in TRAVELS])
def test_what_leaves_and_what_stays(name: str, leaves: set[str], stays: set[str]) -> None:
    plan = plan_of(name)
    shared, personal = plan.shared(), plan.personal()
    assert groups(shared) == leaves
    own = {name for name in personal if not name.startswith(COPY)}
    assert groups(own) == stays
    assert not set(shared) & set(personal)
    network = network_of("brain_lesion_mri", plan.overrides, weights=False)
    for group in leaves:  # a group leaves whole
        assert {n for n in network.state_dict() if group_of(n) == group} <= set(shared)


@pytest.mark.parametrize("name", ["fedavg_lora_ft", "ditto"])
def test_a_personal_copy_is_a_copy_of_all_that_is_shared_and_is_never_shared(name: str) -> None:
    plan = plan_of(name)
    copies = {one for one in plan.personal() if one.startswith(COPY)}
    assert copies == {COPY + one for one in plan.shared()}
    strategy = plan.checked()
    assert all(phase.trains == ("copy",) for phase in strategy.final)
    copying = [phase for phase in (*strategy.phases, *strategy.final) if "copy" in phase.trains]
    assert len(copying) == (2 if name == "ditto" else 1)
    assert all((phase.proximal > 0) == (name == "ditto") for phase in copying)


@pytest.mark.parametrize("backbone", ["vit_test", "lite_medsam"])
def test_in_fedln_no_layer_norm_leaves(backbone: str) -> None:
    plan = plan_of("fedln", backbone=backbone)
    shared, personal = plan.shared(), plan.personal()
    network = network_of("brain_lesion_mri", plan.overrides, weights=False)
    from segment_anything.modeling.common import LayerNorm2d
    from torch import nn

    norms = {
        f"{name}.{kind}"
        for name, module in network.named_modules()
        # the encoder of mask prompts is never run
        if isinstance(module, (nn.LayerNorm, LayerNorm2d)) and not name.startswith("prompt_encoder.")
        for kind in ("weight", "bias")
    }
    assert set(personal) == norms
    assert not norms & set(shared)
    assert set(shared) == set(plan_of("fedavg_lora", backbone=backbone).shared()) - norms


def test_fedprox_is_fedavg_with_a_proximal_term() -> None:
    one, other = find_strategy("fedprox").checked(), find_strategy("fedavg_lora").checked()
    assert one.phases[0].proximal > 0
    assert one.phases[0].model_copy(update={"proximal": 0.0}) == other.phases[0]
    assert one.roles == other.roles


@pytest.mark.parametrize("name", ["fedgin", "amplitude_mix", "cpss", "mixup"])
def test_what_restyles_is_fedavg_with_one_setting_more(name: str) -> None:
    one, other = find_strategy(name).checked(), find_strategy("fedavg_lora").checked()
    (phase,) = one.phases
    assert [one.augment, phase.patch_swap, phase.mixup].count(None) == 2
    plain = phase.model_copy(update={"patch_swap": None, "mixup": None})
    assert one.model_copy(update={"name": other.name, "augment": None, "phases": (plain,)}) == other
    assert plan_of(name).shared() == plan_of("fedavg_lora").shared()


def test_in_ffa_lora_the_first_factor_is_frozen() -> None:
    strategy = find_strategy("ffa_lora").checked()
    assert strategy.roles.of("image_encoder.layers.3.blocks.0.attn.qkv.lora_a") == "frozen"


def test_in_fedrep_the_head_is_trained_first() -> None:
    first, second = find_strategy("fedrep").checked().phases
    assert (first.trains, second.trains) == (("personal",), ("shared",))


def test_without_lmoe_is_pfedsam_with_a_copy_instead_of_experts() -> None:
    ours, other = find_strategy("pfedsam").checked(), find_strategy("without_lmoe").checked()
    assert other.interpolation == ours.interpolation
    assert [one.distillation for one in other.final] == [one.distillation for one in ours.final]
    assert other.phases[0].model_copy(update={"name": "global"}) == ours.phases[0]
    assert other.has_copy and not other.personal


def test_the_default_is_a_copy_with_one_expert_of_which_a_site_keeps_what_is_better() -> None:
    assert defaults.STRATEGY == "pfedsam_chosen" and defaults.STRATEGY in defaults.STRATEGIES
    chosen, whole = find_strategy(defaults.STRATEGY), find_strategy("copy_and_experts")
    assert chosen.overrides == {"experts": 1} and not whole.overrides
    serving = chosen.checked().serving
    assert serving is not None and not serving.folds and max(serving.epochs) == chosen.checked().final[0].epochs
    assert serving == find_strategy("longer_ft_chosen").checked().serving
    same = {"name": "", "serving": None}
    assert chosen.checked().model_copy(update=same) == whole.checked().model_copy(update=same)


def test_the_order_of_the_phases_is_that_of_a_strategy_in_which_it_matters() -> None:
    mutual, other = find_strategy("distil_mutual").checked(), find_strategy("global_first").checked()
    assert [phase.name for phase in mutual.phases] == ["local", "global"]
    assert list(other.phases) == list(reversed(mutual.phases))
    # without a personal teacher neither phase depends on what the other has just trained
    assert {phase.name: phase.distillation.teacher for phase in other.phases if phase.distillation} == {
        "local": "global",
        "global": "personal",
    }


@pytest.mark.parametrize(("name", "of"), [("feddpa", "local_phase_each_round"), ("one_adapter", "pfedsam")])
def test_the_control_has_one_expert_and_no_teacher(name: str, of: str) -> None:
    control, ours = find_strategy(name), find_strategy(of)
    assert control.overrides == {"experts": 1}
    # FedDPA serves its personal model whole
    assert control.checked().interpolation == (1 if name == "feddpa" else ours.checked().interpolation)
    assert control.checked().roles == ours.checked().roles
    for a, b in zip(
        (*control.checked().phases, *control.checked().final),
        (*ours.checked().phases, *ours.checked().final),
        strict=True,
    ):
        assert a.distillation is None
        assert a == b.model_copy(update={"distillation": None})


@pytest.mark.parametrize("name", [*sorted(ALL), *ablation_names()])
def test_every_strategy_passes_over_the_images_as_often_in_a_round(name: str) -> None:
    strategy = find_strategy(name).checked()
    assert sum(phase.epochs for phase in strategy.phases) == (6 if name == "twice_the_epochs" else 3)


@pytest.mark.parametrize("name", [*sorted(ALL), *ablation_names()])
def test_what_is_a_sites_own_is_trained_once_more_at_the_end(name: str) -> None:
    strategy = find_strategy(name).checked()
    alone = name in SERVERLESS
    (epochs,) = [phase.epochs for phase in strategy.final] or [0]
    longer = name.startswith(("longer_ft", "longer_local", "copy_and_experts", "pfedsam_chosen", "chosen_by"))
    assert epochs == ((12 if longer else 4) if strategy.keeps or alone else 0)
    assert {phase.anneal for phase in strategy.final} <= {"cosine"}


def test_only_what_shares_everything_has_no_end_of_its_own() -> None:
    shares_all = {"fedsam", "fedmsa", "fedavg_lora", "fedprox", "ffa_lora"}
    assert {name for name in ALL if not find_strategy(name).checked().final} == shares_all


@pytest.mark.parametrize("name", ["fedsa", "fedln"])
def test_the_final_phase_goes_on_at_the_rate_of_the_rounds(name: str) -> None:
    strategy = find_strategy(name).checked()
    (shared,), (final,) = strategy.phases, strategy.final
    assert final.learning_rate == shared.learning_rate and final.trains == ("personal",)


#: teachers by phase; together the three directions of distillation
DIRECTIONS = {
    "local_phase_each_round": {"local": "global", "final": "global"},
    "distil_local_to_global": {"global": "personal"},
    "distil_mutual": {"local": "global", "global": "personal", "final": "global"},
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_of_distillation_are_separate(name: str) -> None:
    strategy = find_strategy(name).checked()
    phases = (*strategy.phases, *strategy.final)
    assert {one.name: one.distillation.teacher for one in phases if one.distillation} == DIRECTIONS[name]


# ---- jobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALL - SERVERLESS))
def test_the_checked_in_job_is_what_job_make_writes(name: str, tmp_path: Path) -> None:
    made, kept = make_job(name, tmp_path / name), folder("jobs") / name
    (made / MARKER).unlink()  # of an exported job: the checked-in ones are written by people
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    for path in files:
        read = json.loads if path.suffix == ".json" else str
        assert read((made / path).read_text()) == read((kept / path).read_text()), path


@pytest.mark.parametrize("name", sorted(SERVERLESS))
def test_a_strategy_without_a_server_has_no_job(name: str, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match="needs no server"):
        make_job(name, tmp_path / name)


@pytest.mark.parametrize("name", ablation_names())
def test_every_ablation_is_a_possible_strategy(name: str) -> None:
    plan = plan_of(name)
    assert plan.checked().name == name
    assert plan.shared() or find_strategy(name).kind == "local"
    assert not {group for group in groups(plan.shared())} & {"experts"}


@pytest.mark.parametrize(
    ("rule", "aggregator"),
    [
        ("svd", "pfedsam.federated.aggregators.RobustAggregator"),
        ("krum", "pfedsam.federated.aggregators.RobustAggregator"),
        (
            "mean",
            "nvflare.app_common.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
        ),
    ],
)
def test_a_rule_gets_its_aggregator(tmp_path: Path, rule: str, aggregator: str) -> None:
    file = tmp_path / "mine.json"
    content = json.loads((folder("jobs") / "strategies" / "fedavg_lora.json").read_text())
    content["strategy"] |= {"name": "mine", "aggregation": rule}
    file.write_text(json.dumps(content))
    job = make_job(str(file), tmp_path / "job")
    config = json.loads((job / "app/config/config_fed_server.json").read_text())
    (found,) = [one for one in config["components"] if one["id"] == "aggregator"]
    assert found["path"] == aggregator
    assert plan_settings(job)["strategy"]["aggregation"] == rule


def test_a_strategy_is_added_with_one_file_and_one_job(tmp_path: Path) -> None:
    """The worked example of jobs/README.md, as it stands there."""
    file = tmp_path / "only_lora.json"
    page = Path(__file__).parents[2] / "jobs" / "README.md"
    (example,) = re.findall(r"cat > only_lora.json <<END\n(.*?)\nEND\n", page.read_text(), re.DOTALL)
    file.write_text(example)
    result = CliRunner().invoke(app, ["job", "make", str(file), str(tmp_path / "job")])
    assert result.exit_code == 0, result.output
    assert plan_settings(tmp_path / "job")["strategy"]["shared"] == ["lora_a", "lora_b"]
    assert find_strategy(str(file)).checked().name == "only_lora"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no strategy"),
        ("[1]", r"is no strategy: it is \[1\]"),
        ('"pfedsam"', "is no strategy"),
        ('{"description": "x", "strategy": [1]}', "'strategy'"),
        ('{"description": "x", "strategy": {"phases": 3}}', "'phases' = 3"),
        ('{"description": "x", "strategy": {}, "overrides": 3}', "'overrides'"),
        ('{"description": "x", "strategy": {}, "overrides": {"seed": [1]}}', "E18.*'seed'"),
        ("[" * 100_000, "is no strategy"),
        ('{"description": "x", "strategy": {}, "kind": "other"}', "'kind'"),
        ('{"description": "x", "strategy": {"shared": ["experts"]}}', "may never be shared"),
        ('{"description": "x", "strategy": {}, "overrides": {"checkpoint": "/etc/passwd"}}', "checkpoint"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(PFedSAMError, match=words):
        find_strategy(str(file))


@pytest.mark.parametrize(
    "patch",
    [
        {"phases": {"train": {"epochs": 1}, "final": {"epochs": 1}}},
        {"order": ["train", "global"]},
        {"order": ["global", "final"]},  # it comes after the rounds
    ],
)
def test_a_patch_of_a_phase_that_is_not_there_is_refused(patch: dict[str, Any]) -> None:
    with pytest.raises(PFedSAMError) as caught:
        patched("mine", {"base": "pfedsam", **patch})
    named = "final" if patch.get("order") == ["global", "final"] else "train"
    assert caught.value.code == "E28" and f"['{named}']" in caught.value.message and "global" in caught.value.remedy


@pytest.mark.parametrize(
    "patch",
    [
        [1],
        {},
        {"base": 3},
        {"base": "pfedsam", "phases": [1]},
        {"base": "pfedsam", "phases": {"global": 3}},
        {"base": "pfedsam", "strategy": 3},
        {"base": "pfedsam", "strategy": {"phases": 3}},
        {"base": "pfedsam", "strategy": {"phases": [3]}},
        {"base": "pfedsam", "strategy": {"phases": [{"name": [1]}]}},
        {"base": "pfedsam", "overrides": [1]},
        {"base": "pfedsam", "order": 3},
        {"base": "pfedsam", "order": [[1]]},
        {"base": "pfedsam", "other": 3},
    ],
    ids=str,
)
def test_a_patch_of_another_shape_is_refused(patch: Any) -> None:
    with pytest.raises(PFedSAMError, match=r"E(16|28|29)"):
        patched("mine", patch)


def test_a_phase_that_a_patch_renames_keeps_its_place() -> None:
    patch = {"base": "distil_mutual", "order": ["global", "local"], "phases": {"local": {"name": "own"}}}
    assert [phase.name for phase in patched("mine", patch).checked().phases] == ["global", "own"]


@given(JSON | st.dictionaries(st.sampled_from(["description", "kind", "strategy", "overrides"]), JSON))
@settings(max_examples=200, deadline=None)
def test_any_json_is_a_strategy_file_or_an_error_of_ours(content: Any) -> None:
    try:
        StrategyFile.of(content, "file.json")
    except PFedSAMError as error:
        assert error.code in ("E16", "E18", "E28", "E29")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PFedSAMError) as caught:
        find_strategy("fedbest")
    assert "fedavg_lora" in str(caught.value)
