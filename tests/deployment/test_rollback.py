"""Back from an upgrade: what a later version has written is refused by the earlier one, by name, and nothing is lost.

States are in tests/storage/test_backup.py; a site and a server of two versions in tests/poc/test_seeing.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pfedsam.cli import app
from pfedsam.deployment.job_files import META, find_job
from pfedsam.deployment.jobs import export_job
from pfedsam.deployment.kits import RESOURCES, init_kit
from pfedsam.deployment.processes import Deployment
from pfedsam.deployment.site_check import check_kit
from pfedsam.errors import PFedSAMError
from pfedsam.federated.plan import Plan
from pfedsam.federated.settings import SITE_SETTINGS, SiteSettings
from pfedsam.parameters import TensorSpec
from pfedsam.storage import global_model
from pfedsam.storage.job_plan import PLAN_FILE, SERVER

PROJECT = Path(__file__).resolve().parents[2] / "poc_workspace" / "project.yml"
LATER = "a_setting_of_a_later_version"


def changed(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


#: What a later version might write into the plan of a job, and the code with which this one answers.
PLANS = {
    "plan": (lambda plan: plan.update({LATER: 1}), "E29"),
    "strategy": (lambda plan: plan["strategy"].update({LATER: 1}), "E16"),
    "rule": (lambda plan: plan["strategy"].update(aggregation=LATER), "E16"),
    "setting": (lambda plan: plan.update(overrides={LATER: 1}), "E18"),
    "bundle": (lambda plan: plan.update(bundle=LATER), "E28"),
}


@pytest.mark.parametrize("what", PLANS)
def test_a_job_of_a_later_version_is_refused_where_it_is_read_and_can_be_exported_anew(
    what: str, tmp_path: Path
) -> None:
    change, code = PLANS[what]
    job = export_job(find_job("pfedsam"), tmp_path / "job", locked=True)
    changed(job / "app" / "config" / PLAN_FILE, change)
    plan = Plan()
    with pytest.raises(PFedSAMError, match=LATER) as refused:  # as server and sites do
        plan.read(job / "app")
        plan.checked()
    assert refused.value.code == code
    done = CliRunner().invoke(app, ["job", "export", "pfedsam", str(job), "--locked", "--force"])
    assert done.exit_code == 0
    plan = Plan()
    plan.read(job / "app")
    assert plan.checked() and (job / META).is_file()


def test_a_class_that_a_later_version_names_is_seen_before_the_job_runs(tmp_path: Path) -> None:
    from pfedsam.deployment.allowed_classes import classes_of, needed_classes

    job = export_job(find_job("pfedsam"), tmp_path / "job", locked=True)
    named = {"id": "later", "path": f"pfedsam.federated.{LATER}.Later"}
    changed(job / "app" / "config" / SERVER, lambda config: config["components"].append(named))
    assert set(classes_of(job)) - set(needed_classes(SERVER)) >= {named["path"]}


def test_the_settings_of_a_kit_that_a_later_version_made_ready_are_named_and_the_copy_is_good(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path / "kits", PROJECT)
    deployment.provision()
    kit = deployment.kit(deployment.sites[0])
    init_kit(kit, SiteSettings(data_root="/data"))
    copy = Path(shutil.copytree(kit / "local", tmp_path / "copy of local"))
    changed(kit / "local" / SITE_SETTINGS, lambda settings: settings.update({LATER: 1}))
    changed(kit / "local" / RESOURCES, lambda resources: resources["class_allow_list"].append(f"pfedsam.{LATER}.Later"))
    found = {one.name: one for one in check_kit(kit) if LATER in one.message}
    assert not found["data"].fine and "E01" in found["data"].message
    assert found["classes"].fine and found["classes"].warning
    with pytest.raises(PFedSAMError, match=rf"E01.*{LATER}"):
        init_kit(kit, SiteSettings())
    shutil.rmtree(kit / "local")
    shutil.copytree(copy, kit / "local")
    assert not [one for one in check_kit(kit) if LATER in one.message]
    assert all(not file.changes for file in init_kit(kit, SiteSettings()))


def test_a_global_model_of_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    path = tmp_path / "global_model.safetensors"
    with monkeypatch.context() as upgraded:
        upgraded.setattr(global_model, "SCHEMA_VERSION", "2")
        global_model.write_global_model(path, {"a": torch.ones(2)}, "ab" * 32, {"a": TensorSpec((2,), "float32")})
    with pytest.raises(PFedSAMError, match=r"E10.*schema is 2, expected 1"):
        export_job(find_job("pfedsam"), tmp_path / "job", theta0=path)
    assert not (tmp_path / "job").exists()
