"""MLflow in place of TensorBoard: at the server alone, and of the sites' listed scalars alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from simulated import Job, component, simulate

from pfedsam.deployment.allowed_classes import MLFLOW, needed_classes
from pfedsam.federated.scalars import EVENT, LISTED
from pfedsam.storage.job_plan import CLIENT, SERVER


def test_a_server_allows_the_tracker_and_a_site_does_not() -> None:
    """NVFlare's own list allows it on both sides; at a site it would send to any address that a job names."""
    assert MLFLOW in needed_classes(SERVER)
    assert not [name for name in needed_classes(CLIENT) if ".tracking." in name]


@pytest.mark.slow
def test_a_job_with_mlflow_keeps_listed_scalars_of_each_site_and_nothing_else(federation: Path, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    job = Job(recorded=False)
    receiver = component(job.server, "tb_receiver")
    receiver["path"], receiver["args"] = MLFLOW, {"events": [EVENT], "kw_args": {"experiment_name": "lesions"}}
    run = simulate(tmp_path, job, federation)
    assert run.exit_code == 0, run.output[-3000:]
    (database,) = run.workspace.rglob("mlflow.db")
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("lesions")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(one.info.run_name[:6] for one in runs) == ["site-1", "site-2"]
    for one in runs:
        assert one.info.status == "FINISHED" and one.data.params == {}
        assert {"val_dice_personal", "val_dice_global"} <= set(one.data.metrics)
        assert all(LISTED.fullmatch(tag) for tag in one.data.metrics)
        assert set(one.data.tags) <= {"job_id", "run_name", "mlflow.runName"}
        assert client.list_artifacts(one.info.run_id) == []
