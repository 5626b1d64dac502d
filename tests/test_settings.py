"""Settings of a bundle: what is wrong is refused at once, by name, and nothing heavy is loaded for it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pfedsam.bundles import OVERRIDES, checked_overrides, folder, network_of, require_settings
from pfedsam.cli import app
from pfedsam.commands.console import console
from pfedsam.data.slices import Grey
from pfedsam.errors import PFedSAMError
from pfedsam.networks.adaptation import LoRAPlace, Place
from pfedsam.networks.backbones import BACKBONES, SMALLEST_IMAGE
from pfedsam.networks.moe import Gate
from pfedsam.networks.weights import CHECKPOINTS
from pfedsam.settings import BLOCKS, MULTIPLES, Settings, all_settings

BUNDLE = "brain_lesion_mri"
#: A bundle's own folders, which no person sets.
INTERNAL = {"bundle_root", "imports"}


def error_of(overrides: Any) -> PFedSAMError:
    with pytest.raises(PFedSAMError) as caught:
        checked_overrides(overrides)
    assert caught.value.code == "E18" and caught.value.remedy
    return caught.value


#: The least and the most that a job may give, and what lies beyond them.
BOUNDS: list[tuple[str, Any, Any, Any, Any]] = [
    ("image_size", 32, 2048, 28, 2052),
    ("field_of_view_mm", 1, 2000, 0.999, 2000.1),
    ("adapted_blocks", 0, 32, -1, 33),
    ("lora_rank", 0, 256, -1, 257),
    ("decoder_rank", 0, 256, -1, 257),
    ("experts", 0, 64, -1, 65),
    ("bottleneck", 1, 1024, 0, 1025),
    ("expert_scale", 0, 100.0, -0.001, 100.1),
    ("top_k", 0, 64, -1, 65),
    ("seed", 0, 2**32 - 1, -1, 2**32),
    ("folds", 2, 100, 1, 101),
    ("batch_size", 1, 1024, 0, 1025),
    ("val_batch_size", 1, 1024, 0, 1025),
    ("positives_per_case", 1, 1000, 0, 1001),
    ("negatives_per_case", 0, 1000, -1, 1001),
    ("augmentations", 1, 100, 0, 101),
    ("box_probability", 0, 1, -0.001, 1.001),
    ("cache_limit_gb", 0, 1024.0, -0.001, 1024.1),
]
CHOICES: list[tuple[str, list[Any]]] = [
    ("backbone", [*BACKBONES]),
    ("checkpoint", ["default", *CHECKPOINTS]),
    ("adapted_blocks", ["auto", "all"]),
    ("lora_places", [[*get_args(LoRAPlace)], []]),
    ("expert_places", [[*get_args(Place)], []]),
    ("gate", [*get_args(Gate)]),
    ("grey", [*get_args(Grey)]),
    ("cache_dtype", ["float32", "float16", "bfloat16"]),
    ("checkpointing", [True, False]),
    ("amp", [True, False]),
]


@pytest.mark.parametrize(("key", "least", "most", "below", "above"), BOUNDS, ids=[one[0] for one in BOUNDS])
def test_every_number_has_two_ends(key: str, least: Any, most: Any, below: Any, above: Any) -> None:
    for value in (least, most):
        assert checked_overrides({key: value}) == {key: value}
    for value in (below, above, math.nan, math.inf, True, None, str(most), [most], {"a": most}, 10**400):
        message = error_of({key: value}).message
        assert f"'{key}'" in message and str(value)[:20] in message and f"to {most:.0f}" in message


@pytest.mark.parametrize(("key", "values"), CHOICES, ids=[one[0] for one in CHOICES])
def test_every_choice_is_the_one_of_the_code_that_reads_it(key: str, values: list[Any]) -> None:
    for value in values:
        assert checked_overrides({key: value}) == {key: value}
    told = OVERRIDES[key].allowed
    words = [word for value in values for word in (value if isinstance(value, list) else [value])]
    assert all(word in told for word in words if isinstance(word, str))
    for value in ("$import os", "/etc/passwd", "@seed", "", ["../a"], [1], 0.5, None, {"a": 1}):
        assert f"'{key}'" in error_of({key: value}).message
    if isinstance(values[0], list):
        error_of({key: [values[0][0]] * 2})


def test_the_tables_hold_every_setting_of_a_job() -> None:
    assert {one[0] for one in BOUNDS} | {one[0] for one in CHOICES} == set(OVERRIDES)


@pytest.mark.parametrize("path", sorted(folder("bundles").glob("*/configs/train.json")), ids=lambda p: p.parts[-3])
def test_every_literal_of_a_bundle_is_a_setting_with_a_value_that_is_allowed(path: Path) -> None:
    config = json.loads(path.read_text())
    # a bundle of colour pictures has neither grey slices nor millimetres
    assert set(OVERRIDES) - {"field_of_view_mm", "grey"} <= set(config)
    literals = {
        key: value
        for key, value in config.items()
        if key not in INTERNAL and not isinstance(value, dict) and not str(value).lstrip("['").startswith("$")
    }
    assert set(literals) <= set(all_settings())
    Settings.model_validate({key: value for key, value in literals.items() if value is not None})


@pytest.mark.parametrize("name", BACKBONES)
def test_what_is_said_of_backbones_is_what_they_are(name: str) -> None:
    assert MULTIPLES[name] == BACKBONES[name].multiple and set(MULTIPLES) == set(BLOCKS) == set(BACKBONES)
    with torch.device("meta"):
        encoder: Any = BACKBONES[name].encoder(64)
    assert BLOCKS[name] == len(encoder.adaptable_blocks())
    assert BOUNDS[0][1] == SMALLEST_IMAGE


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"image_sise": 96}, "Did you mean 'image_size'"),
        ({"batchsize": 4}, "Did you mean 'batch_size'"),
        ({"qwertz": 4}, "no such setting"),
        ({1: 2}, "no such setting"),
        ({"device": "cuda"}, "only a site sets it"),
        ({"class_names": ["a"]}, "only a bundle sets it"),
        ([1], "expected names with values"),
        ("image_size", "expected names with values"),
    ],
)
def test_what_is_no_setting_of_a_job_is_told(overrides: Any, words: str) -> None:
    assert words in str(error_of(overrides))


#: Right each by itself, wrong together or with the bundle's own values.
TOGETHER = [
    ({"top_k": 5}, "there are 4 experts"),
    ({"experts": 2, "top_k": 3}, "there are 2 experts"),
    ({"adapted_blocks": 11}, "'lite_medsam' has 10"),
    ({"backbone": "vit_test", "adapted_blocks": 4}, "'vit_test' has 3"),
    ({"backbone": "vit_b", "image_size": 100}, "'vit_b' needs a multiple of 16"),
    ({"checkpoint": "medsam_vit_b"}, "of backbone 'vit_b', not of 'lite_medsam'"),
]


@pytest.mark.parametrize(("overrides", "words"), TOGETHER, ids=str)
def test_settings_that_do_not_go_together_are_refused(overrides: dict[str, Any], words: str) -> None:
    for call in (require_settings, network_of):
        with pytest.raises(PFedSAMError, match=rf"E18.*{words}"):
            call(BUNDLE, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"top_k": 4},
        {"top_k": 8, "experts": 8},
        {"experts": 0, "top_k": 2},
        {"adapted_blocks": 10},
        {"backbone": "vit_test", "image_size": 96, "adapted_blocks": 3, "checkpoint": "sam_vit_b"},
        {"image_size": 100},
    ],
    ids=str,
)
def test_settings_that_go_together_make_a_network(overrides: dict[str, Any]) -> None:
    require_settings(BUNDLE, overrides)
    network_of(BUNDLE, overrides, weights=False)


@pytest.mark.parametrize("content", ["[1]", "3", "{", "", '{"a": ', "[" * 100_000])
@pytest.mark.parametrize("name", ["train.json", "metadata.json"])
def test_a_bundle_of_another_shape_is_an_error_that_names_the_file(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pfedsam.bundles import class_names, field_of_view, find_bundle, is_rgb

    monkeypatch.setenv("PFEDSAM_BUNDLES", str(tmp_path))
    configs = tmp_path / "mine" / "configs"
    configs.mkdir(parents=True)
    for one in ("train.json", "metadata.json"):
        (configs / one).write_text(content if one == name else "{}")
    if name == "train.json":
        calls = [lambda: require_settings("mine"), lambda: network_of("mine"), lambda: field_of_view("mine")]
    else:
        calls = [lambda: class_names(find_bundle("mine")), lambda: is_rgb(find_bundle("mine"))]
    for call in calls:
        with pytest.raises(PFedSAMError, match=rf"E29.*{name}"):
            call()


@pytest.mark.parametrize("told", [{}, {"network_data_format": 3}, {"network_data_format": {"outputs": {"pred": []}}}])
def test_metadata_without_classes_are_an_error(told: Any, tmp_path: Path) -> None:
    from pfedsam.bundles import class_names

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps(told))
    with pytest.raises(PFedSAMError, match="E29"):
        class_names(tmp_path)


@pytest.mark.parametrize("bundle", [["brain_lesion_mri"], None, 3, {"a": 1}, "../brain_lesion_mri"])
def test_a_bundle_that_is_no_name_is_not_installed(bundle: Any) -> None:
    with pytest.raises(PFedSAMError, match="E28"):
        require_settings(bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(JSON | st.dictionaries(st.sampled_from([*all_settings(), "other"]), JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_json_is_taken_as_it_is_or_is_an_error_of_ours(value: Any) -> None:
    try:
        assert checked_overrides(value) == (value or {})
    except PFedSAMError as error:
        assert error.code == "E18" and len(error.message) < 500


# the command line ----------------------------------------------------------------------------------------------------

COMMANDS = [
    ("simulate", "{data}", "--out", "{out}"),
    ("compare", "{data}", "--out", "{out}"),
    ("poc", "run", "--runtime", "{out}"),
    ("poc", "submit", "--runtime", "{out}"),
    ("personalize", "{data}", "--global", "{data}/model.safetensors", "--out", "{out}"),
    ("evaluate", "{data}", "{data}/model.safetensors", "--out", "{out}"),
    ("infer", "{data}/image.nii", "--model", "{data}/model.safetensors", "--out", "{out}"),
    ("export-model", "{data}/model.safetensors", "{out}"),
    ("validate", "{data}"),
    ("describe",),
    ("init-global", "{out}"),
]
#: Runs a command and prints which heavy libraries it has imported.
LOOK = """
import sys
from pfedsam.cli import main
try:
    main()
finally:
    print("imported:", sorted({"torch", "monai", "nvflare", "segment_anything"} & set(sys.modules)))
"""


def filled(command: tuple[str, ...], root: Path) -> list[str]:
    return [word.format(data=root / "data", out=root / "out") for word in command]


def test_a_misspelt_setting_fails_before_anything_is_loaded_or_written(tmp_path: Path) -> None:
    words = [*filled(COMMANDS[0], tmp_path), "--set", "image_sise=96"]
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 1
    assert "E18: override 'image_sise' is not allowed" in done.stderr and "Did you mean 'image_size'" in done.stderr
    assert "imported: []" in done.stdout and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:2]))
@pytest.mark.parametrize(
    "pair", ["image_sise=96", "batch_size=0", 'lora_places={"a":1}', "seed=[1]", "seed=" + "[" * 10_000]
)
def test_every_command_refuses_a_wrong_setting_first(command: tuple[str, ...], pair: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*filled(command, tmp_path), "--set", pair])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E18"
    assert pair.partition("=")[0] in str(done.exception)
    assert list(tmp_path.iterdir()) == []


# `personalize` learns from the global model which bundle the settings are of, and here is none
@pytest.mark.parametrize("command", [one for one in COMMANDS if one[0] in ("simulate", "poc", "validate")], ids=str)
def test_settings_that_do_not_go_together_are_refused_before_a_folder_is_made(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, [*filled(command, tmp_path), "--set", "top_k=7"])
    assert isinstance(done.exception, PFedSAMError) and "top_k is 7" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_checks_its_image_size(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), "--image-size", "30"])
    assert isinstance(done.exception, PFedSAMError) and done.exception.code == "E18"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ("simulate", "x", "--rounds", "10001"),
        ("simulate", "x", "--seed", "-1"),
        ("simulate", "x", "--validate-every", "0"),
        ("compare", "x", "--rounds", "0"),
        ("compare", "x", "--workers", "257"),
        ("poc", "run", "--rounds", "10001"),
        ("poc", "up", "--port", "65536"),
        ("job", "export", "pfedsam", "out", "--rounds", "10001"),
        ("job", "export", "pfedsam", "out", "--min-clients", "1001"),
        ("phantom", "out", "--sites", "1001"),
        ("phantom", "out", "--size", "2049"),
        ("personalize", "x", "--global", "y", "--cases", "0"),
    ],
    ids=" ".join,
)
def test_numbers_of_commands_have_ends(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and re.search("range|(less|greater) than or equal", done.output)


def test_settings_are_listed_with_meaning_unit_range_and_who_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    told = {one["name"]: one for one in json.loads(CliRunner().invoke(app, ["settings", "--json"]).output)}
    assert set(told) == set(Settings.model_fields) and all(one["meaning"] for one in told.values())
    assert told["image_size"]["unit"] == "pixels" and told["image_size"]["by"] == "job"
    shown = CliRunner().invoke(app, ["settings"]).output
    assert all(name in shown for name in told) and "a multiple of 4 (pixels)" in shown


@pytest.mark.parametrize(("other", "ours", "value"), [("num_experts", "experts", 2), ("router", "gate", "token")])
def test_a_setting_may_have_the_name_that_other_tools_give_it(other: str, ours: str, value: Any) -> None:
    assert checked_overrides({other: value, "seed": 3}) == {ours: value, "seed": 3}
    with pytest.raises(PFedSAMError, match=rf"E32: '{other}' and '{ours}' are one setting"):
        checked_overrides({other: value, ours: value})


def test_a_phase_may_have_the_names_that_other_tools_give_its_keys() -> None:
    from pfedsam.training.phase import Phase

    given = {"name": "local", "trains": ["shared"], "experts": False}
    other = Phase.of({**given, "lr_multipliers": {"lora_b": 4}, "proximal_mu": 0.1})
    assert other == Phase.of({**given, "rates": {"lora_b": 4}, "proximal": 0.1})
    with pytest.raises(PFedSAMError, match="E32"):
        Phase.of({**given, "proximal": 0.1, "proximal_mu": 0.1})
