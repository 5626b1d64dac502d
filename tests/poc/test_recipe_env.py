"""`recipe.run(ProdEnv(...))`, as the page of the jobs has it, with a provisioned server and two sites."""

from __future__ import annotations

from pathlib import Path

import pytest
from deployed import FEDERATION, TINY, Federation
from nvflare.recipe import ProdEnv

from pfedsam.deployment.recipe import PFedSAMRecipe


@pytest.mark.slow
def test_a_recipe_runs_from_an_administrators_kit_to_its_result(federation: Federation) -> None:
    kit = federation.deployment.admin()
    recipe = PFedSAMRecipe("pfedsam", rounds=1, min_clients=2, federation=FEDERATION, overrides=TINY, locked=True)
    run = recipe.run(ProdEnv(str(kit), username=kit.name))
    result = run.get_result(timeout=300)
    assert run.get_status() is None or "COMPLETED" in str(run.get_status())
    assert result is not None
    assert [path.name for path in Path(result).rglob("global_model.safetensors")] == ["global_model.safetensors"]
    assert set(federation.states()) == {"hospital-a", "hospital-b"}
