"""A federation in one process with a download per site: the default is untouched, and a stop changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pfedsam.data.phantom import write_phantom
from pfedsam.errors import PFedSAMError
from pfedsam.files import hash_of, read_lines
from pfedsam.storage.site_model import read
from pfedsam.training.federation import DOWNLOADS_FILE, Federation, run_federation
from pfedsam.training.federation_downloads import begun_downloads
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
TINY: dict[str, Any] = {"backbone": "vit_test", "image_size": 32, "batch_size": 4, "augmentations": 1, "experts": 0}
ROUND = {"name": "train", "trains": ["shared"], "experts": False, "epochs": 1}
MIXTURES = {"kind": "mixtures", "peers_see_models": True, "warmup_rounds": 1}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("data")
    write_phantom(root, sites=3, cases=6, shape=(32, 32, 4))
    return {path.name: path for path in sorted(root.iterdir()) if path.is_dir()}


def federation(sites: Mapping[str, Path], out: Path, downloads: Any, rounds: int = 3, **strategy: Any) -> Federation:
    settings = {"personal": [], "phases": [ROUND], "downloads": downloads, **strategy}
    return Federation("brain_lesion_mri", sites, Strategy.of(settings), out, rounds, TINY)


def test_one_group_of_all_is_the_federation_without_downloads_bit_for_bit(
    sites: Mapping[str, Path], tmp_path: Path
) -> None:
    plain, one = (
        federation(sites, tmp_path / name, downloads)
        for name, downloads in (("a", None), ("b", {"groups": 1, "warmup_rounds": 0}))
    )
    run_federation(plain)
    run_federation(one)
    (theta, number), (other, same_number) = plain.global_model(), one.global_model()
    assert number == same_number == 3 and theta.keys() == other.keys()
    assert all(torch.equal(theta[key], other[key]) for key in theta)
    assert not (plain.out / DOWNLOADS_FILE).exists() and not (plain.out / "downloads").exists()
    assert [told["groups"] for told in read_lines(one.out / DOWNLOADS_FILE)] == [[]] * 3


def test_the_folder_of_shared_rounds_has_the_name_that_it_had_before_there_were_downloads(
    sites: Mapping[str, Path], tmp_path: Path
) -> None:
    plain = federation(sites, tmp_path, None)
    strategy = plain.strategy.rounds_alone()
    settings = strategy.model_dump(mode="json", exclude={"interpolation", "serving", "downloads"})
    folders = {name: str(path) for name, path in sites.items()}
    name = hash_of([plain.bundle, folders, settings, {**TINY, "experts": 0}, 3, ""])[:16]
    assert plain.rounds_alone(tmp_path).out.name == name
    assert federation(sites, tmp_path, {}).rounds_alone(tmp_path).out.name != name


def test_a_stop_changes_nothing_and_the_final_phase_begins_with_the_sites_own_download(
    sites: Mapping[str, Path], tmp_path: Path
) -> None:
    copy = {"name": "final", "trains": ["copy"], "experts": False, "epochs": 1}
    whole, parts = (federation(sites, tmp_path / name, MIXTURES, final=[copy]) for name in ("a", "b"))
    parts.shared_rounds = parts.rounds_alone(tmp_path / "rounds")
    run_federation(whole)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) in (2 * len(sites) + 1, 3 * len(sites) + 2):  # in the third round, and between final phases
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_federation(parts, stop)
    run_federation(parts)
    for run in (whole, parts):
        own = begun_downloads(run.strategy, (run.shared_rounds or run).out, 3)
        for name in sites:
            final = read(run.model_of(name))
            assert final.info["final"] and all(
                torch.equal(final.shared[key], own.of(name)[key]) for key in final.shared
            )
    for name in sites:
        one, other = read(whole.model_of(name)), read(parts.model_of(name))
        for key, value in one.shared.items():
            # a training that was stopped is equal up to rounding
            torch.testing.assert_close(value, other.shared[key], rtol=0, atol=1e-5)
    first, second = (read(whole.model_of(name)).shared for name in list(sites)[:2])
    assert max(float((first[key] - second[key]).abs().max()) for key in first) > 1e-4
    mixed = read_lines(whole.out / DOWNLOADS_FILE)
    assert [told["round"] for told in mixed] == [0, 1, 2] and mixed[-1]["shares"][0] != mixed[-1]["shares"][1]


def test_rounds_whose_downloads_are_gone_are_not_gone_on_with(sites: Mapping[str, Path], tmp_path: Path) -> None:
    done = federation(sites, tmp_path, MIXTURES, rounds=2)
    run_federation(done)
    for path in (tmp_path / "downloads").iterdir():
        path.unlink()
    with pytest.raises(PFedSAMError, match="E33"):
        run_federation(federation(sites, tmp_path, MIXTURES, rounds=3))
