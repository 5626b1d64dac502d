"""Prepared volumes: the same from memory, from a file without a name and from kept files; what is forgotten."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd

from pfedsam.bundles import find_bundle
from pfedsam.data.kept_volumes import DAY, DAYS, KeptVolumes
from pfedsam.data.phantom import write_phantom
from pfedsam.data.prepared import PreparedVolumes
from pfedsam.data.sites import datalist
from pfedsam.data.slices import SliceDataset

#: Where volumes may be: the arguments of `PreparedVolumes` for each.
PLACES = ("memory", "unnamed file", "kept")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("prepared")
    write_phantom(folder, sites=1, cases=6, shape=(24, 20, 5))
    return [case for section in ("training", "validation") for case in datalist(folder / "site-1", section)]


def transform_of(part: str, size: int = 16) -> Any:
    parser = ConfigParser()
    parser.read_config(str(find_bundle("brain_lesion_mri") / "configs" / "train.json"))
    parser["image_size"] = size
    return parser.get_parsed_content(f"{part}#preprocessing")


def place(where: str, folder: Path) -> dict[str, Any]:
    return {
        "memory": {},
        "unnamed file": {"memory_gb": 0},
        "kept": {"kept": {"folder": folder / "kept", "key": "a"}},
    }[where]


def counted(transform: Any) -> tuple[Any, list[Any]]:
    """A transform that notes what it is called with."""
    called: list[Any] = []
    return lambda item: called.append(item) or transform(item), called


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("part", ["train", "validate"])
def test_volumes_are_what_the_transform_gives_wherever_they_are(cases, tmp_path, part: str, where: str) -> None:
    transform = transform_of(part)
    volumes = PreparedVolumes(cases, transform, **place(where, tmp_path))
    assert len(volumes) == len(cases)
    for number, case in enumerate(cases):
        expected, found = transform(dict(case)), volumes[number]
        assert found["case"] == case["case"] and set(found) == set(expected)
        for key in ("image", "label"):
            assert torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype
            assert isinstance(found[key], MetaTensor) and torch.equal(found[key].affine, expected[key].affine)
            assert found[key].meta["filename_or_obj"] == case[key]
        assert volumes.labelled(number) == expected["label"].flatten(0, -2).any(dim=0).tolist()


@pytest.mark.parametrize("where", PLACES)
def test_a_prediction_on_a_volume_is_put_back_on_its_image_wherever_it_was(cases, tmp_path, where: str) -> None:
    transform = transform_of("validate")
    back = Invertd(keys="pred", transform=transform, orig_keys="image", nearest_interp=False)

    def inverted(item: dict[str, Any]) -> torch.Tensor:
        item["pred"] = item["image"][:1].clone()
        return back(item)["pred"]

    PreparedVolumes(cases, transform, **place(where, tmp_path))  # with "kept", the next one reads what it wrote
    found = inverted(PreparedVolumes(cases, transform, **place(where, tmp_path))[0])
    assert torch.equal(found, inverted(transform(dict(cases[0])))) and found.shape[1:] == (24, 20, 5)


@pytest.mark.parametrize("where", PLACES[1:])
def test_training_gets_the_same_slices_as_from_memory(cases, tmp_path, where: str, monkeypatch) -> None:
    transform = transform_of("train")
    expected = SliceDataset(cases, transform)
    settings = place(where, tmp_path)
    if where == "unnamed file":
        monkeypatch.setattr("pfedsam.data.prepared.GIB", 0)
    found = SliceDataset(cases, transform, kept=settings.get("kept"))
    assert (found.slices, found.positive, found.negative) == (expected.slices, expected.positive, expected.negative)
    for index in range(len(expected)):
        assert all(torch.equal(found[index][key], expected[index][key]) for key in ("image", "label"))


def test_memory_holds_as_many_volumes_as_the_budget_allows(cases) -> None:
    transform = transform_of("train")
    bytes_of_one = 16 * 16 * 5 * (4 + 1)
    volumes = PreparedVolumes(cases, transform, memory_gb=2.5 * bytes_of_one / 1024**3)
    held = [type(volume).__name__ for volume in volumes.volumes]
    assert held == ["_HeldVolume"] * 2 + ["StoredVolume"] * (len(cases) - 2)
    assert volumes._file is not None and os.fstat(volumes._file.fileno()).st_nlink == 0
    assert os.fstat(volumes._file.fileno()).st_size == (len(cases) - 2) * bytes_of_one


def test_kept_volumes_are_made_once_and_belong_to_their_owner(cases, tmp_path) -> None:
    kept = {"folder": tmp_path / "kept", "key": "a"}
    transform, called = counted(transform_of("train"))
    PreparedVolumes(cases, transform, kept=kept)
    PreparedVolumes(cases, transform, kept=kept)
    assert len(called) == len(cases)
    PreparedVolumes(cases, transform, kept={**kept, "key": "another"})
    assert len(called) == 2 * len(cases)
    files = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert len(files) == 4 * len(cases) and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "kept" / "a").stat().st_mode) == 0o700


def copied(cases: list[dict[str, str]], folder: Path) -> list[dict[str, str]]:
    copies = []
    for case in cases[:2]:
        item = dict(case)
        for key in ("image", "label"):
            target = folder / key / Path(case[key]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(case[key]).read_bytes())
            item[key] = str(target)
        copies.append(item)
    return copies


def test_what_is_left_of_a_file_goes_with_it_and_changes_with_it(cases, tmp_path) -> None:
    own, kept = copied(cases, tmp_path), {"folder": tmp_path / "kept", "key": "a"}
    transform, called = counted(transform_of("train"))
    PreparedVolumes(own, transform, kept=kept)
    other = Path(cases[2]["image"]).read_bytes()
    Path(own[0]["image"]).write_bytes(other)
    changed = PreparedVolumes(own, transform, kept=kept)
    assert len(called) == 3 and torch.equal(changed[0]["image"], transform_of("train")(dict(own[0]))["image"])
    Path(own[1]["label"]).unlink()
    PreparedVolumes(own[:1], transform, kept={**kept, "key": "another"})
    records = [json.loads(path.read_text()) for path in (tmp_path / "kept" / "a").glob("*.json")]
    assert [record["made_of"]["image"] for record in records] == [own[0]["image"]]
    assert len(list((tmp_path / "kept" / "a").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut off", "no JSON", "another form", "gone"])
def test_a_damaged_volume_is_made_anew(cases, tmp_path, damage: str) -> None:
    kept = {"folder": tmp_path / "kept", "key": "a"}
    transform, called = counted(transform_of("train"))
    PreparedVolumes(cases[:1], transform, kept=kept)
    (slices,), (index,) = ((tmp_path / "kept" / "a").glob(pattern) for pattern in ("*.slices", "*.json"))
    if damage == "cut off":
        slices.write_bytes(slices.read_bytes()[:-1])
    elif damage == "no JSON":
        index.write_text("{")
    elif damage == "another form":
        index.write_text(json.dumps({**json.loads(index.read_text()), "form": 0}))
    else:
        slices.unlink()
    again = PreparedVolumes(cases[:1], transform, kept=kept)
    assert len(called) == 2 and torch.equal(again[0]["image"], transform_of("train")(dict(cases[0]))["image"])


def test_volumes_of_settings_that_nobody_uses_any_more_are_removed(cases, tmp_path) -> None:
    folder = tmp_path / "kept"
    for key in ("old", "used"):
        PreparedVolumes(cases[:1], transform_of("train"), kept={"folder": folder, "key": key})
    long_ago = (folder / "old").stat().st_mtime - (DAYS + 1) * DAY
    os.utime(folder / "old", (long_ago, long_ago))
    PreparedVolumes(cases[:1], transform_of("train"), kept={"folder": folder, "key": "new"})
    assert sorted(path.name for path in folder.iterdir()) == ["new", "used"]


def test_what_a_killed_job_has_left_half_written_is_removed_and_what_another_writes_is_not(cases, tmp_path) -> None:
    kept = {"folder": tmp_path / "kept", "key": "a"}
    PreparedVolumes(cases[:1], transform_of("train"), kept=kept)
    for name, age in ((".old", 2 * DAY), (".new", 0)):
        folder = tmp_path / "kept" / "a" / name
        folder.mkdir()
        (folder / "volume.slices").write_bytes(b"voxels")
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    PreparedVolumes(cases[:1], transform_of("train"), kept=kept)
    assert {path.name for path in (tmp_path / "kept" / "a").glob(".*")} == {".new"}


def test_a_full_disk_costs_the_next_job_time_and_this_one_nothing(cases, tmp_path, monkeypatch, caplog) -> None:
    tries: list[Any] = []

    def full(self: KeptVolumes, item: Any, volume: Any) -> Any:
        tries.append(item)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(KeptVolumes, "save", full)
    volumes = PreparedVolumes(cases, transform_of("train"), kept={"folder": tmp_path / "kept", "key": "a"})
    assert len(tries) == 1 and "No space left" in caplog.text
    for number, case in enumerate(cases):
        assert torch.equal(volumes[number]["image"], transform_of("train")(dict(case))["image"])


def test_what_cannot_be_written_stays_in_memory(cases) -> None:
    def transform(item: dict[str, Any]) -> dict[str, Any]:
        return {**transform_of("train")(item), "own": object()}

    volumes = PreparedVolumes(cases[:1], transform, memory_gb=0)
    assert type(volumes.volumes[0]).__name__ == "_HeldVolume" and "own" in volumes[0]


def test_workers_that_share_a_file_read_their_own_places(cases) -> None:
    volumes = PreparedVolumes(cases, transform_of("train"), memory_gb=0)
    loader = torch.utils.data.DataLoader(SliceOf(volumes), batch_size=None, num_workers=2)
    for number, (first, found) in enumerate(loader):
        assert torch.equal(found, volumes.window(number, first, first + 1)["image"])


class SliceOf(torch.utils.data.Dataset[Any]):
    """The first slice of each volume."""

    def __init__(self, volumes: PreparedVolumes) -> None:
        self.volumes = volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor]:
        return number % 3, self.volumes.window(number, number % 3, number % 3 + 1)["image"]


def test_a_transform_without_a_view_is_stored_as_a_whole(cases) -> None:
    steps = transform_of("validate").transforms[:3]
    volumes = PreparedVolumes(cases[:1], Compose(steps))
    assert volumes[0]["image"].shape == (1, 24, 20, 5)
