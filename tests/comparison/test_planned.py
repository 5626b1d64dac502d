"""The runs of a comparison: which folder each seed has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pfedsam.comparison.planned import of_seed, planned_runs
from pfedsam.comparison.run import Run
from pfedsam.errors import PFedSAMError


def laid_out(root: Path, **folders: str) -> Path:
    for folder, sites in folders.items():
        for site in sites.split():
            (root / folder / site / "images").mkdir(parents=True)
    return root


def planned(data: Path) -> list[Run]:
    return planned_runs(data, ["fedavg_lora"], [0, 1], 1, "brain_lesion_mri", {})


def test_each_seed_has_a_folder_of_its_own_where_the_path_says_so(tmp_path: Path) -> None:
    laid_out(tmp_path, few_0="a b", few_1="a b")
    runs = planned(tmp_path / "few_{seed}")
    assert [(run.seed, run.folders()["b"]) for run in runs] == [
        (seed, (tmp_path / f"few_{seed}" / "b").resolve()) for seed in (0, 1)
    ]
    assert {run.data for run in planned(tmp_path / "few_0")} == {str((tmp_path / "few_0").resolve())}
    assert of_seed(Path("x"), 3) == Path("x")


@pytest.mark.parametrize(
    ("folders", "told"), [({"few_0": "a"}, "few_1 holds no site"), ({"few_0": "a", "few_1": "a b"}, "other sites")]
)
def test_seeds_with_other_sites_or_none_are_named(tmp_path: Path, folders: dict[str, str], told: str) -> None:
    laid_out(tmp_path, **folders)
    with pytest.raises(PFedSAMError, match=told) as caught:
        planned(tmp_path / "few_{seed}")
    assert caught.value.code == "E02"
