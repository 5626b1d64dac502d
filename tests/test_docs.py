"""The pages tell the truth: links, commands, settings, paths. `python tests/test_docs.py` writes the generated parts.

Text checks only: nothing is trained and no page is rendered.
"""

import ast
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from nvflare.apis.dxo import MetaKey

import pfedsam
from pfedsam.bundles import folder
from pfedsam.cli import app
from pfedsam.errors import ErrorCode
from pfedsam.federated.boundary import MEANINGS, METADATA, METADATA_BY_WEIGHTS, METRICS
from pfedsam.settings import all_settings
from pfedsam.training.alignment_settings import Adversary, Episode, WarmUp
from pfedsam.training.catalogue import ablation_names, find_strategy, strategy_names
from pfedsam.training.download_settings import Downloads
from pfedsam.training.extra_losses import Distillation, PseudoLabels, Smoothness
from pfedsam.training.load_settings import Load
from pfedsam.training.phase import Phase
from pfedsam.training.serving import Serving
from pfedsam.training.strategy import Strategy
from pfedsam.training.style_settings import GIN, Amplitude, Augment, Mixup, PatchSwap

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "custom" / "pfedsam"
#: Not ours: what commands write, and what tools leave.
NOT_OURS = ("runs", "build", "dist", "node_modules")
MOST_LINES = 190


def _pages() -> Iterator[Path]:
    for place, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_OURS)
        yield from (Path(place, name).relative_to(ROOT) for name in sorted(files) if name.endswith(".md"))


PAGES = tuple(_pages())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")


def _text(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def _prose(page: Path) -> str:
    """A page without its code."""
    return SPAN.sub("", FENCE.sub("", _text(page)))


def _code(page: Path) -> list[str]:
    """What a page shows as code: each line of a block without its comment, and each span within a sentence."""
    text = _text(page)
    blocks = [body.replace("\\\n", " ") for _, body in FENCE.findall(text)]
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [*lines, *(" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text)))]


# ---- links --------------------------------------------------------------------------------------------------------


def _anchors(page: Path) -> set[str]:
    """Anchors of a page: headings as GitHub names them, and those that stand in it."""
    found: set[str] = set(re.findall(r'<a id="([^"]+)"', _text(page)))
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", _text(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        found.add(next(name for name in (slug, *(f"{slug}-{n}" for n in range(1, 99))) if name not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", _prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if target.is_dir() and anchor:
            target /= "README.md"
        here = target.exists() and target.resolve().is_relative_to(ROOT)
        if not here or (anchor and anchor not in _anchors(target.resolve().relative_to(ROOT))):
            broken.append(link)
    assert not broken, f"{page}: {broken}"


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        ("README.md", "bundles/README.md#your-own-data"),
        ("README.md", "bundles/README.md#a-task-of-your-own"),
        ("README.md", "bundles/README.md#settings"),
        ("README.md", "jobs/README.md#a-strategy-of-your-own"),
        ("README.md", "jobs/README.md#what-leaves-a-site"),
        ("README.md", "jobs/README.md#one-bad-site"),
        ("README.md", "tests/benchmarks/README.md#what-it-costs"),
        ("README.md", "custom/README.md#commands"),
        ("README.md", "custom/errors.md"),
        ("README.md", "CONTRIBUTING.md"),
        ("README.md", "poc_workspace/README.md"),
    ],
)
def test_a_reader_gets_there_from_the_first_page(start: str, wanted: str) -> None:
    assert f"]({wanted})" in _text(Path(start))


# ---- generated parts ----------------------------------------------------------------------------------------------


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def _shown(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _default(name: str) -> str:
    """The default of a setting in the packaged bundles; each is named where they differ."""
    values: dict[str, list[str]] = {}
    for file in sorted(folder("bundles").glob("*/configs/train.json")):
        content = json.loads(file.read_text())
        values.setdefault(_shown(content[name]) if name in content else "", []).append(file.parents[1].name)
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in values.items() if value)


def settings_table() -> str:
    """Every setting of a bundle."""
    rows = ["| name | meaning | allowed | default | set by |", "|---|---|---|---|---|"]
    for one in all_settings().values():
        allowed = one.allowed + (f" ({one.unit})" if one.unit else "")
        rows.append(f"| `{one.name}` | {_cell(one.meaning)} | {_cell(allowed)} | {_default(one.name)} | {one.by} |")
    return "\n".join(rows)


def strategy_tables() -> str:
    """Every setting of a strategy, of its phases and of what they add to the loss, in the words of the docstrings."""
    parts = []
    kinds = (
        (Strategy, "`strategy`"),
        (Serving, "`serving`"),
        (Augment, "`augment`"),
        (Load, "`load`"),
        (Downloads, "`downloads`"),
    )
    restyled = ((Amplitude, "`amplitude` of `augment`"), (GIN, "`gin` of `augment`"))
    added = ((Distillation, "distillation"), (PseudoLabels, "pseudo"), (Smoothness, "smooth"))
    added += ((PatchSwap, "patch_swap"), (Mixup, "mixup"))
    added += ((WarmUp, "warm_up"), (Adversary, "adversary"), (Episode, "episode"))
    phases = ((Phase, "a phase"), *((kind, f"`{key}` of a phase") for kind, key in added))
    for kind, where in (*kinds, *restyled, *phases):
        told = inspect.getdoc(kind).split("Attributes:\n")[1]  # type: ignore[union-attr]
        found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", told, re.MULTILINE | re.DOTALL)
        words = {name: " ".join(re.sub(r"\s*\[ours\]", "", text).split()) for name, text in found}
        assert list(words) == list(kind.model_fields), f"the docstring of {kind.__name__} tells other settings"
        rows = [f"| key of {where} | meaning | default |", "|---|---|---|"]
        for name, field in kind.model_fields.items():
            default = "must be given" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            rows.append(f"| `{name}` | {_cell(words[name])} | {default} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a tree; typer brings a click of its own, so that no class is asked for."""
    below = getattr(command, "commands", None)
    if below is None or (command.invoke_without_command and name != "pfedsam"):
        yield name, command
    for part, one in (below or {}).items():
        yield from _walk(one, f"{name} {part}")


#: Every command by its name, as `pfedsam job export`.
COMMANDS = dict(_walk(typer.main.get_command(app), "pfedsam"))


def commands_table() -> str:
    """Every command with the first sentence of its help."""
    rows = ["| command | what it does |", "|---|---|"]
    for name, command in sorted(COMMANDS.items()):
        rows.append(f"| `{name}` | {_cell(command.get_short_help_str(limit=400))} |")
    return "\n".join(rows)


def errors_table() -> str:
    """Every error code: its name in the code, what it means, what helps."""
    rows = (f"| {one.value} | `{one.name}` | {_cell(one.meaning)} | {_cell(one.remedy)} |" for one in ErrorCode)
    return "\n".join(("| code | name | what is wrong | what helps |", "|---|---|---|---|", *rows))


#: Variants that are a method of their own, beside the strategies.
METHODS = (
    "iat",
    "weights_dro",
    "server_momentum",
    "weights_gaa",
    "soft_load",
    "soft_load_binary",
    "soft_load_learned",
    "site_groups",
    "site_mixtures",
    "fedgin",
    "amplitude_mix",
    "cpss",
    "mixup",
    "style_adversary",
    "episodic",
    "warm_up",
    "pseudo_labels",
    "pseudo_labels_refined",
    "weak_crf",
    "weak_affinity",
    "weak_pseudo_labels",
)


def leaves_table() -> str:
    """What leaves a site in a round, by strategy and method, from the strategies' own roles and the listed metadata."""
    beside = ", ".join(MEANINGS[name] for name in (*METADATA, *METRICS) if name != MetaKey.NUM_STEPS_CURRENT_ROUND)
    rows = ["| strategy or method | tensors whose change leaves | its number of training cases | what is its own |"]
    rows.append("|---|---|---|---|")
    seen: list[str] = []
    for name in (*strategy_names(), *METHODS):
        file = find_strategy(name)
        if file.kind != "federated":
            continue
        strategy = file.checked()
        if strategy.downloads and strategy.downloads.tells_models:
            seen.append(f"`{name}`")
        own = [*strategy.personal, *(["copy"] if strategy.has_copy else [])]
        told = ["leaves" if strategy.weights == "cases" else "stays", ", ".join(f"`{one}`" for one in own)]
        rows.append(f"| `{name}` | {', '.join(f'`{one}`' for one in strategy.shared)} | {' | '.join(told)} |")
    told = [f"With every update go, in each of them: {beside}."]
    told += ["Of cases without a label nothing goes but their part in the update."]
    for name in METHODS:
        more = METADATA_BY_WEIGHTS.get(find_strategy(name).checked().weights, ())
        told += [f"With an update of `{name}` also goes: {MEANINGS[one]} (`{one}`)." for one in more]
    peers = f"From what a site gets it can read another site's model in {', '.join(seen)}"
    may = f"{peers}: each site's own file must allow it (`peers_see_my_model`)."
    return "\n".join([*rows, "", " ".join(told), "", may])


#: Generated parts: page, name between the markers, content.
GENERATED = (
    (Path("jobs/README.md"), "leaves", leaves_table),
    (Path("bundles/README.md"), "settings", settings_table),
    (Path("jobs/README.md"), "strategy", strategy_tables),
    (Path("custom/README.md"), "commands", commands_table),
    (Path("custom/errors.md"), "errors", errors_table),
)


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: written by a test, see tests/test_docs.py -->\n", f"<!-- end of {name} -->\n"


def _between(page: Path, name: str) -> tuple[str, str, str]:
    """What is before, between and after the markers."""
    begin, end = _markers(name)
    before, rest = _text(page).split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def write_generated() -> None:
    """Write the generated parts of the pages anew."""
    for page, name, content in GENERATED:
        before, _, after = _between(page, name)
        (ROOT / page).write_text(f"{before}\n{content()}\n\n{after}", encoding="utf-8")


@pytest.mark.parametrize(("page", "name", "content"), GENERATED, ids=[name for _, name, _ in GENERATED])
def test_generated_parts_are_those_of_the_code(page, name, content) -> None:
    assert _between(page, name)[1].strip() == content(), "python tests/test_docs.py writes them anew"


# ---- names in code --------------------------------------------------------------------------------------------------


def _called(words: list[str]) -> tuple[Any, str]:
    """The command that words after `pfedsam` name; None with the name for one that is not there."""
    if not words or not re.fullmatch(r"[a-z][a-z-]+", words[0]):
        return None, ""
    group = [f"pfedsam {' '.join(words[:2])}", f"pfedsam {words[0]}"]
    found = next((COMMANDS[name] for name in group if name in COMMANDS), None)
    if found is None and len(words) == 1 and any(name.startswith(f"{group[1]} ") for name in COMMANDS):
        return None, ""  # a group as a whole
    return found, "" if found else group[0]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_and_option_exists(page: Path) -> None:
    wrong = []
    for line in _code(page):
        found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\S*/)?pfedsam (.+)", line)
        if not found:
            continue
        words = found.group(1).split()
        command, unknown = _called(words)
        if unknown:
            wrong.append(unknown)
        if command is None:
            continue
        known = {"--help", *(option for one in command.params for option in (*one.opts, *one.secondary_opts))}
        given = (re.split(r"[=\]|,]", word)[0] for word in words if word.startswith("--"))
        wrong += [f"{line}: {option}" for option in given if option not in known]
    assert not wrong, f"{page}: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {found.group(1) for line in _code(page) if (found := re.match(r"make ([\w-]+)", line))}
    assert named <= targets, f"{page}: {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_script_and_module_exists(page: Path) -> None:
    code = "\n".join(_code(page))
    scripts = set(re.findall(r"\b(?:tests|custom|poc_workspace|findings)/[\w./-]+\.(?:py|json|jsonl|sh|yml)\b", code))
    missing = [name for name in scripts if not (ROOT / name).is_file()]
    missing += [
        name for name in re.findall(r"\bbench_\w+\.py", code) if not (ROOT / "tests/benchmarks" / name).is_file()
    ]
    for name in set(re.findall(r"\bpfedsam(?:\.\w+){2,}", code)):
        path, *rest = PACKAGE, *name.split(".")[1:]
        while rest and (path / rest[0]).is_dir():
            path /= rest.pop(0)
        module = path / f"{rest[0]}.py" if rest else path / "__init__.py"
        if not module.is_file() or not all(re.search(rf"\b{part}\b", module.read_text()) for part in rest[1:]):
            missing.append(name)
    assert not missing, f"{page}: {missing}"


def test_the_layout_names_every_room_and_no_other_file() -> None:
    text = _text(Path("custom/README.md"))
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {room for room in rooms if f"| `{room}/` |" not in text} == set()
    files = {path.name for path in PACKAGE.rglob("*.py")} | {path.name for path in (ROOT / "tests").glob("*.py")}
    assert set(re.findall(r"`(?:[a-z_]+/)*(\w+\.py)`", text)) <= files


def test_python_examples_call_what_the_api_has() -> None:
    """Functions and their arguments, as `pfedsam.load_model(..., site=...)`."""
    files = sorted((PACKAGE / "api").glob("*.py"))
    statements = [one for path in files for one in ast.parse(path.read_text()).body]
    methods = [one for top in statements if isinstance(top, ast.ClassDef) for one in top.body]
    known = {
        one.name: {arg.arg for arg in (*one.args.args, *one.args.kwonlyargs)}
        for one in (*statements, *methods)
        if isinstance(one, ast.FunctionDef)
    }
    seen = set()
    for page in PAGES:
        for language, body in FENCE.findall(_text(page)):
            if language != "python" or "import pfedsam\n" not in body:
                continue
            for call in (node for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Call)):
                if not isinstance(call.func, ast.Attribute):
                    continue
                ours = isinstance(call.func.value, ast.Name) and call.func.value.id in ("pfedsam", "model", "found")
                if ours:
                    seen.add(call.func.attr)
                    assert call.func.attr in known, f"{page}: {call.func.attr}"
                    assert {one.arg for one in call.keywords} <= known[call.func.attr], f"{page}: {call.func.attr}"
    assert {"load_model", "segment"} <= seen


def test_the_reference_of_the_api_is_whole() -> None:
    text = _text(Path("custom/README.md"))
    assert [name for name in pfedsam.__all__ if not name.startswith("_") and name not in text] == []
    named = {name for page in PAGES for line in _code(page) for name in re.findall(r"\bpfedsam\.(\w+)\(", line)}
    assert named <= set(pfedsam.__all__)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_error_code_exists(page: Path) -> None:
    assert set(re.findall(r"\bE\d\d\b", _text(page))) <= {code.value for code in ErrorCode}


# ---- pages --------------------------------------------------------------------------------------------------------


def test_the_first_page_is_short() -> None:
    assert len(_text(Path("README.md")).splitlines()) <= MOST_LINES


def test_every_strategy_is_named() -> None:
    text = _text(Path("jobs/README.md"))
    assert [name for name in strategy_names() if f"`{name}`" not in text] == []
    assert f"{len(strategy_names())} strategies" in text
    assert f"{len(ablation_names())} variants" in text


def test_every_bundle_is_named() -> None:
    text = _text(Path("bundles/README.md"))
    assert all(f"[`{path.parents[1].name}`]" in text for path in folder("bundles").glob("*/configs/metadata.json"))


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert str(cited["version"]) == pfedsam.__version__
    assert cited["license"] == "Apache-2.0"
    assert all({"authors", "title", "type"} <= set(one) for one in (cited, *cited["references"]))
    assert any("2509.15638" in one["url"] for one in cited["references"])


if __name__ == "__main__":
    write_generated()
