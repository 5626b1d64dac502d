"""What an administrator does without a server: the job that goes on after one was lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pfedsam.deployment.admin import resumed_job
from pfedsam.deployment.job_files import find_job, server_settings
from pfedsam.deployment.jobs import CARRIED, export_job
from pfedsam.errors import PFedSAMError
from pfedsam.parameters import TensorSpec
from pfedsam.storage.global_model import round_of, write_global_model


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return export_job(find_job("pfedsam"), tmp_path / "job", locked=True, server={"num_rounds": 5})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A global model after three rounds."""
    path = tmp_path / "global_model.safetensors"
    write_global_model(path, {"a": torch.ones(2)}, "ab" * 32, {"a": TensorSpec((2,), "float32")}, 2)
    return path


@pytest.mark.parametrize(("rounds", "left"), [(5, 2), (4, 1), (3, 0)])
def test_a_resumed_job_does_the_rounds_that_are_left_also_none(
    job: Path, model: Path, tmp_path: Path, rounds: int, left: int
) -> None:
    """With no round left the final personal phase and the evaluation still are."""
    again = resumed_job(job, tmp_path / "again", model, rounds)
    settings = server_settings(again)
    assert (settings["num_rounds"], settings["start_round"]) == (left, 3)
    assert settings["workflows"] == server_settings(job)["workflows"]
    (persistor,) = [one for one in settings["components"] if one["id"] == "persistor"]
    assert persistor["args"]["theta0"] == CARRIED
    assert round_of(again / "app" / "config" / CARRIED) == 2
    assert not (again / "app" / "custom").exists()


def test_a_job_that_went_further_than_was_asked_for_is_refused(job: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PFedSAMError, match=r"E32.*3 rounds are done, 2 were asked for"):
        resumed_job(job, tmp_path / "again", model, 2)
