"""The recipe writes the checked-in jobs, and the same folder for every environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.recipe import PocEnv, ProdEnv, SimEnv
from nvflare.recipe.session_mgr import SessionManager
from simulated import BUNDLE, ROOT, TINY

from pfedsam import defaults
from pfedsam.deployment.job_privacy import Privacy
from pfedsam.deployment.recipe import PFedSAMRecipe
from pfedsam.errors import PFedSAMError
from pfedsam.ownership import MARKER
from pfedsam.storage.state_list import list_states
from pfedsam.training.catalogue import find_strategy, strategy_names

FEDERATED = [name for name in strategy_names() if find_strategy(name).kind == "federated"]


def contents(job: Path) -> dict[str, Any]:
    """Files of a job by name, without the marker of an exported one; JSON as what it says."""
    paths = (path for path in job.rglob("*") if path.is_file() and path.name != MARKER)
    files = {str(path.relative_to(job)): path.read_text() for path in paths}
    return {name: json.loads(text) if name.endswith(".json") else text for name, text in files.items()}


@pytest.mark.parametrize("strategy", FEDERATED)
def test_the_checked_in_job_is_what_the_recipe_exports(strategy: str, tmp_path: Path) -> None:
    PFedSAMRecipe(strategy).export(str(tmp_path))
    assert contents(tmp_path / strategy) == contents(ROOT / "jobs" / strategy)


def test_every_checked_in_job_has_a_strategy() -> None:
    assert sorted(path.parent.name for path in (ROOT / "jobs").glob("*/meta.json")) == FEDERATED


def settings(**more: Any) -> dict[str, Any]:
    return {"rounds": 1, "min_clients": 2, "federation": "recipe", "bundle": BUNDLE, "overrides": TINY, **more}


def test_the_settings_reach_the_plan_and_both_sides(tmp_path: Path) -> None:
    PFedSAMRecipe("fedrep", name="mine", **settings(privacy=Privacy(1.0, 0.5, "int8"), locked=True)).export(
        str(tmp_path)
    )
    found = contents(tmp_path / "mine")
    assert not [name for name in found if "custom" in name]
    server, client = (found[f"app/config/config_fed_{side}.json"] for side in ("server", "client"))
    assert (server["num_rounds"], server["min_clients"]) == (1, 2)
    plan = found["app/config/plan.json"]
    assert plan["federation"] == "recipe" and plan["strategy"]["name"] == "fedrep"
    assert plan["overrides"] == {"experts": 0, **TINY}
    names = [one["path"].rsplit(".", 1)[-1] for one in client["task_result_filters"][0]["filters"]]
    assert names[1:] == ["ClipAndNoise", "PackPayload"]


def test_poc_and_production_submit_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the session, which is NVFlare's; real processes run this folder in tests/poc."""
    sent: list[dict[str, Any]] = []

    class Session:
        def submit_job(self, path: str) -> str:
            sent.append(contents(Path(path)))
            return "id"

        def close(self) -> None:
            pass

    monkeypatch.setattr(SessionManager, "_get_session", lambda self: Session())
    recipe = PFedSAMRecipe(**settings())
    recipe.export(str(tmp_path))
    kit = tmp_path / "kit"
    kit.mkdir()
    # POC finds its kit in a workspace that `deploy` prepares
    monkeypatch.setattr(PocEnv, "_get_admin_startup_kit_path", lambda self: str(kit))
    recipe.run(ProdEnv(str(kit)))
    PocEnv(num_clients=2)._get_session_manager().submit_job(recipe._job)
    assert sent == [contents(tmp_path / defaults.STRATEGY)] * 2


@pytest.mark.slow
def test_the_simulator_runs_it(federation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PFEDSAM_DATA", str(federation))
    monkeypatch.setenv("PFEDSAM_STATE_ROOT", str(tmp_path / "states"))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = PFedSAMRecipe(**settings()).run(SimEnv(num_clients=2, workspace_root=str(tmp_path / "ws")))
    assert Path(str(run.get_result())).is_dir()
    assert {(entry.site, entry.info["final"]) for entry in list_states(tmp_path / "states")} == {
        ("site-1", True),
        ("site-2", True),
    }


@pytest.mark.parametrize(("wrong", "code"), [("local_only", "E32"), ("no such", "E28")])
def test_a_strategy_without_a_job_is_refused(wrong: str, code: str) -> None:
    with pytest.raises(PFedSAMError, match=code):
        PFedSAMRecipe(wrong)


def test_a_filter_beside_ours_is_refused() -> None:
    """NVFlare's own ways to change a recipe would be lost in silence."""
    recipe = PFedSAMRecipe()
    for add in (recipe.add_client_output_filter, recipe.add_server_input_filter):
        with pytest.raises(PFedSAMError, match="cannot be added"):
            add(_Nothing(["WEIGHTS"], ["WEIGHTS"]))


class _Nothing(DXOFilter):
    def process_dxo(self, dxo: Any, shareable: Any, fl_ctx: Any) -> Any:
        return None
