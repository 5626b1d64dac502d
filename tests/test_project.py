"""Properties of the project as a whole: imports run one way, the command starts fast, the wheel is complete."""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "custom" / "pfedsam"


#: Rooms that a room's modules never import, beside those that lie above both.
BELOW = {
    "networks": ("data", "training", "storage", "evaluation", "inference"),
    "parameters.py": ("networks", "data", "training", "storage", "evaluation", "inference"),
    "data": ("networks", "training", "storage", "evaluation", "inference"),
    "training": ("evaluation", "inference"),
    "storage": ("evaluation", "inference"),
    "evaluation": ("comparison", "report", "inference"),
    "comparison": ("report", "inference"),
    "inference": ("comparison", "report"),
    "federated": ("deployment", "comparison", "report"),
}
TOP = ("federated", "deployment", "api", "commands", "cli")


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, whether at once, in a function or for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from pfedsam.room import module` names a module, too
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = {path.relative_to(PACKAGE): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path: Path):
    room, imported = path.parts[0], _imports(FILES[path])
    if room not in ("federated", "deployment"):
        assert not any(name.split(".")[0] == "nvflare" for name in imported), "only these two import nvflare"
    above = () if room in ("deployment", "federated", "api", "commands", "cli.py", "__init__.py") else TOP
    for other in (*above, *BELOW.get(room, ())):
        assert not any(f"{name}.".startswith(f"pfedsam.{other}.") for name in imported), f"{room} knows {other}"


def test_no_modules_import_each_other():
    names = {".".join(("pfedsam", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES}
    graph = {name: {one for one in _imports(FILES[path]) if one in names} - {name} for name, path in names.items()}
    # `from pfedsam.room import module` imports the module; the room's own file is empty
    rooms = {name for name, path in names.items() if path.name == "__init__.py"}
    list(TopologicalSorter({name: found - rooms for name, found in graph.items()}).static_order())


def test_help_imports_no_heavy_library():
    code = "import sys, pfedsam.cli; print([m for m in ('torch', 'monai', 'nvflare', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_job_says_its_plan_once():
    for job in (ROOT / "jobs").glob("*/app/config"):
        assert json.loads((job / "plan.json").read_text())["strategy"]["name"] == job.parents[1].name
        for side in ("server", "client"):
            components = json.loads((job / f"config_fed_{side}.json").read_text())["components"]
            (plan,) = [one for one in components if one["id"] == "plan"]
            assert "args" not in plan


def test_a_wheel_holds_bundles_and_jobs_and_finds_them_from_another_directory(tmp_path: Path):
    source = tmp_path / "source"
    for part in ("custom", "bundles", "jobs"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    # a bundle that was run leaves results of patients and a model in its folder, which are nobody else's
    left = ("eval/patient.nii.gz", "eval/model.safetensors", "models/model.pt")
    for name in left:
        file = source / "bundles" / "prostate_mri" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"left")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    wheel = next(tmp_path.glob("pfedsam-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert not [name for name in names if name.endswith(left)]
    assert "pfedsam/bundles/prostate_mri/configs/train.json" in names
    # isolated from the source tree: -S leaves out the editable install, the libraries are added by hand
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}]; "
        "from pfedsam.bundles import find_bundle; from pfedsam.deployment.job_files import find_job; "
        "print(find_bundle('brain_lesion_mri')); print(find_job('pfedsam'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert all(str(tmp_path / "site") in line for line in done.stdout.splitlines()[-2:])


def test_the_service_files_have_the_environment_that_the_processes_of_this_machine_get():
    from pfedsam.deployment.processes import MEMORY, SERVER_MEMORY

    for side, variables in (("server", SERVER_MEMORY), ("site", MEMORY)):
        text = (ROOT / "poc_workspace" / side / f"pfedsam-{side}.service").read_text()
        assert all(f"Environment={name}={value}\n" in text for name, value in variables.items()), side
    for path in (ROOT / "poc_workspace" / "site").iterdir():
        assert "MALLOC_TRIM_THRESHOLD_" not in path.read_text(), f"{path.name}: a site would train slowly"
