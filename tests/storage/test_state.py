"""The state of a site: one job at a time, always a valid file, and no state ever overwritten by another's."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pfedsam.errors import PFedSAMError
from pfedsam.parameters import COPY
from pfedsam.storage import state as module
from pfedsam.storage.site_model import SiteModel, read, write
from pfedsam.storage.state import SiteState, state_root
from pfedsam.storage.state_files import BEST, CURRENT, LOCK, PREVIOUS, described
from pfedsam.storage.state_list import delete_state, list_states, newest_states
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.cross_fit import Candidate, choose

FINGERPRINT = "ab" * 32
ROLES = {"shared": ["lora_a"], "personal": ["experts"]}
HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
input()
"""


def site_state(root: Path, fingerprint: str = FINGERPRINT, site: str = "site-1", bundle: str = "brain") -> SiteState:
    return SiteState(root, "federation", site, bundle, fingerprint)


def model(round_number: int, fingerprint: str = FINGERPRINT) -> SiteModel:
    return SiteModel(
        {"a": torch.full((100,), float(round_number))},
        {"b": torch.ones(3)},
        {"b#step": torch.tensor(1.0)},
        {"fingerprint": fingerprint, "roles": ROLES, "round": round_number},
    )


@pytest.fixture
def opened(tmp_path):
    state = site_state(tmp_path)
    state.open()
    yield state
    state.close()


def code_of(call, *args) -> str:
    with pytest.raises(PFedSAMError) as caught:
        call(*args)
    return caught.value.code


def round_of(state: SiteState) -> int:
    found = state.load()
    assert found is not None
    return found.info["round"]


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def zero_the_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-16] + bytes(16))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[(8 + int.from_bytes(data[:8], "little") + len(data)) // 2] ^= 1
    path.write_bytes(data)


def not_a_number(path: Path) -> None:
    spoilt = model(9)
    spoilt.personal["b"][1] = torch.nan
    write(path, spoilt)


DAMAGE = [corrupt, zero_the_tail, flip_a_bit, not_a_number]


# the root -------------------------------------------------------------------------------------------------------------


def test_root_is_the_sites_setting_then_the_variable_then_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(module.ROOT_VARIABLE, str(tmp_path / "variable"))
    assert state_root("~/setting") == tmp_path / "setting"
    assert state_root() == tmp_path / "variable"
    monkeypatch.delenv(module.ROOT_VARIABLE)
    assert state_root() == state_root("") == tmp_path / ".pfedsam"


def test_nothing_is_written_before_it_is_opened(tmp_path):
    state = site_state(tmp_path)
    assert state.load() is None and not list(tmp_path.iterdir())


def test_folder_is_the_owners_only(opened, tmp_path):
    assert opened.folder == tmp_path / "federation" / "site-1" / f"brain-{FINGERPRINT[:12]}"
    opened.save(model(1))
    opened.save(model(2))
    for folder in (opened.folder, *list(opened.folder.parents)[:2]):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in opened.folder.iterdir() if path.name != LOCK} == {
        CURRENT: 0o600,
        PREVIOUS: 0o600,
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_root_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert code_of(site_state(tmp_path).open) == "E13"
    finally:
        tmp_path.chmod(0o700)


def test_root_that_is_a_file_is_an_error_of_ours(tmp_path):
    (tmp_path / "root").write_text("")
    assert code_of(site_state(tmp_path / "root").open) == "E13"


# one job at a time ----------------------------------------------------------------------------------------------------


def test_second_job_is_refused_until_the_first_gives_the_lock_back(opened, tmp_path):
    second = site_state(tmp_path)
    assert code_of(second.open) == "E14"
    opened.close()
    second.open()
    assert code_of(opened.open) == "E14"
    second.close()


def test_another_site_bundle_or_base_is_not_in_the_way(opened, tmp_path):
    for other in (
        site_state(tmp_path, site="site-2"),
        site_state(tmp_path, bundle="fundus"),
        site_state(tmp_path, fingerprint="cd" * 32),
    ):
        other.open()
        other.close()


def test_lock_of_another_process_is_respected_and_goes_with_it(opened):
    opened.close()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(opened.folder / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert code_of(opened.open) == "E14"
        process.kill()
        process.wait()
    opened.open()


# save and load --------------------------------------------------------------------------------------------------------


def test_empty_state_is_none_and_a_saved_one_comes_back(opened):
    assert opened.load() is None
    opened.save(model(1))
    found = opened.load()
    assert found.info["round"] == 1 and torch.equal(found.shared["a"], torch.full((100,), 1.0))
    assert set(found.moments) == {"b#step"}
    assert not (opened.folder / PREVIOUS).exists()


def test_state_is_there_for_a_job_that_is_submitted_again(opened, tmp_path):
    opened.save(model(1))
    opened.close()
    again = site_state(tmp_path)
    again.open()
    assert round_of(again) == 1
    again.close()


def test_state_before_the_last_is_kept_and_used_when_the_last_is_corrupt(opened):
    for number in (1, 2, 3):
        opened.save(model(number))
    assert round_of(opened) == 3
    corrupt(opened.folder / CURRENT)
    assert round_of(opened) == 2
    (opened.folder / CURRENT).unlink()
    assert round_of(opened) == 2
    assert {path.name for path in opened.folder.iterdir()} == {PREVIOUS, LOCK}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("loaded", [True, False])
def test_a_damaged_state_is_passed_over_and_never_takes_the_place_of_the_one_before_it(
    opened, tmp_path, damage, loaded, caplog
):
    opened.save(model(1))
    opened.save(model(2))
    opened.close()
    damage(opened.folder / CURRENT)
    again = site_state(tmp_path)
    again.open()
    if loaded:
        assert round_of(again) == 1
        assert str(again.folder / CURRENT) in caplog.text and "Trying the state before it" in caplog.text
    again.save(model(3))
    assert read(again.folder / CURRENT).info["round"] == 3
    assert read(again.folder / PREVIOUS).info["round"] == 1
    again.save(model(4))
    assert read(again.folder / PREVIOUS).info["round"] == 3
    again.close()


def test_what_a_killed_save_left_never_takes_the_place_of_the_one_before_it(opened):
    opened.save(model(1))
    opened.save(model(2))
    os.link(opened.folder / CURRENT, opened.folder / f".{PREVIOUS}")
    flip_a_bit(opened.folder / CURRENT)
    assert round_of(opened) == 1
    opened.save(model(3))
    assert read(opened.folder / PREVIOUS).info["round"] == 1


def without_links(*_, **__):
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_a_file_system_without_hard_links_keeps_the_state_before_the_last_too(opened, monkeypatch):
    monkeypatch.setattr(os, "link", without_links)
    for number in (1, 2, 3):
        opened.save(model(number))
    assert round_of(opened) == 3 and read(opened.folder / PREVIOUS).info["round"] == 2
    assert {path.name for path in opened.folder.iterdir()} == {CURRENT, PREVIOUS, LOCK}
    assert (opened.folder / PREVIOUS).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some disk space"), (errno.EROFS, "how the disk is mounted"), (errno.EIO, "Look at the disk")],
)
def test_the_remedy_is_that_of_the_error(opened, monkeypatch, number, remedy):
    opened.save(model(1))
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(PFedSAMError, match=rf"E13.*{os.strerror(number)}.*{remedy}"):
        opened.save(model(2))
    assert round_of(opened) == 1


LEFT_OVER = (f".{CURRENT}.abc.tmp", f"..{PREVIOUS}.abc.tmp")


def test_what_a_killed_write_has_left_is_removed_by_the_next_job_and_by_no_other(opened, tmp_path):
    opened.save(model(1))
    for name in LEFT_OVER:
        (opened.folder / name).write_bytes(b"half a state")
    second = site_state(tmp_path)
    assert code_of(second.open) == "E14"
    assert {path.name for path in opened.folder.iterdir()} == {CURRENT, LOCK, *LEFT_OVER}
    opened.close()
    second.open()
    assert {path.name for path in opened.folder.iterdir()} == {CURRENT, LOCK} and round_of(second) == 1
    second.close()


def test_a_state_with_values_that_are_not_finite_is_not_saved(opened):
    opened.save(model(1))
    opened.save(model(2))
    spoilt = model(3)
    spoilt.personal["b"][1] = torch.inf
    assert code_of(opened.save, spoilt) == "E13"
    assert round_of(opened) == 2 and read(opened.folder / PREVIOUS).info["round"] == 1


def test_saving_goes_on_after_a_corrupt_state(opened):
    opened.save(model(1))
    opened.save(model(2))
    corrupt(opened.folder / CURRENT)
    opened.save(model(3))
    assert round_of(opened) == 3


def test_two_corrupt_states_are_an_error_and_not_a_fresh_start(opened):
    opened.save(model(1))
    corrupt(opened.folder / CURRENT)
    assert code_of(opened.load) == "E13"
    opened.save(model(2))
    corrupt(opened.folder / CURRENT)
    assert code_of(opened.load) == "E13"


@pytest.mark.parametrize("rename", [1, 2])
def test_a_failing_save_leaves_a_state_that_can_be_loaded(opened, monkeypatch, rename):
    opened.save(model(1))
    opened.save(model(2))
    real, calls = os.replace, []

    def fail(*args):
        calls.append(args)
        if len(calls) == rename:
            raise OSError("disk full")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        assert code_of(opened.save, model(3)) == "E13"
    # the first rename puts the new state in place
    assert round_of(opened) == 1 + rename
    opened.save(model(4))
    assert round_of(opened) == 4
    assert {path.name for path in opened.folder.iterdir()} == {CURRENT, PREVIOUS, LOCK}


def test_state_of_other_base_weights_is_in_another_folder_and_never_overwritten(opened, tmp_path):
    opened.save(model(1))
    other = site_state(tmp_path, fingerprint="cd" * 32)
    other.open()
    assert other.load() is None
    other.save(model(9, "cd" * 32))
    assert other.folder != opened.folder
    assert (round_of(opened), round_of(other)) == (1, 9)
    other.close()


def test_state_of_other_base_weights_in_this_folder_is_refused(opened):
    """The folder's name has twelve letters of the fingerprint only."""
    opened.save(model(1, FINGERPRINT[:12] + "0" * 52))
    assert code_of(opened.load) == "E11"


def state_of(strategy: str, copy: bool) -> SiteModel:
    found = model(1)
    roles = find_strategy(strategy).checked().roles
    # the order of groups says nothing
    found.info |= {
        "strategy": strategy,
        "roles": {"shared": list(roles.shared)[::-1], "personal": list(roles.personal)},
    }
    if copy:
        found.personal[f"{COPY}a"] = torch.ones(2)
    return found


@pytest.mark.parametrize(
    ("saved", "copy", "job"),
    [
        ("ditto", True, "fedavg_lora"),
        ("fedavg_lora", False, "ditto"),
        ("ditto", True, "fedrep"),
        ("fedrep", False, "fedavg_lora"),
        ("pfedsam", False, "fedavg_lora"),
        ("fedln", False, "fedrep"),
    ],
)
def test_a_state_that_holds_other_tensors_than_the_job_keeps_is_refused(opened, saved, copy, job):
    with pytest.raises(PFedSAMError) as caught:
        opened.require_same_kind(state_of(saved, copy), find_strategy(job).checked())
    assert caught.value.code == "E13"
    for word in (str(opened.folder), f"'{saved}'", f"'{job}'", "another federation name", "pfedsam state delete"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("saved", "copy", "job"),
    [
        ("pfedsam", False, "pfedsam"),
        ("pfedsam", False, "narrow_lora"),
        ("pfedsam", False, "feddpa"),
        ("fedavg_lora", False, "fedprox"),
        ("ditto", True, "fedavg_lora_ft"),
        # the copy is made in the final phase
        ("fedavg_lora_ft", False, "fedavg_lora_ft"),
    ],
)
def test_a_state_that_holds_what_the_job_keeps_is_let_through_whatever_its_name(opened, saved, copy, job):
    opened.require_same_kind(state_of(saved, copy), find_strategy(job).checked())


# the best one ---------------------------------------------------------------------------------------------------------


def with_dice(number: int, personal: float | None = None, best: float | None = None, **info) -> SiteModel:
    found = model(number)
    told = {"val_dice_personal": personal, "val_dice_global": best, **info}
    found.info |= {key: value for key, value in told.items() if value is not None}
    return found


def best_of(state: SiteState) -> int | None:
    path = state.folder / BEST
    return read(path).info["round"] if path.exists() else None


def test_the_best_state_stays_beside_the_last_two(opened):
    best = []
    for number, dice in enumerate((0.5, 0.7, 0.6, None, 0.7)):
        opened.save(with_dice(number, dice))
        best.append(best_of(opened))
    # of two that are as good the later one
    assert best == [0, 1, 1, 1, 4] and round_of(opened) == 4
    assert (opened.folder / BEST).stat().st_mode & 0o777 == 0o600


def test_without_a_personal_dice_the_global_one_counts(opened):
    opened.save(with_dice(1, best=0.5))
    opened.save(with_dice(2, personal=0.4, best=0.9))
    assert best_of(opened) == 1
    opened.save(with_dice(3, personal=0.6, best=0.1))
    assert best_of(opened) == 3


def test_a_job_that_is_submitted_again_knows_the_best_one(opened, tmp_path):
    opened.save(with_dice(1, 0.7))
    opened.close()
    again = site_state(tmp_path)
    again.open()
    again.save(with_dice(2, 0.6))
    assert best_of(again) == 1
    again.close()


def test_no_job_goes_on_from_the_best_one_and_a_damaged_one_is_replaced(opened):
    opened.save(with_dice(1, 0.9))
    opened.save(with_dice(2, 0.5))
    for name in (CURRENT, PREVIOUS):
        (opened.folder / name).unlink()
    assert opened.load() is None and best_of(opened) == 1
    opened._best = None
    corrupt(opened.folder / BEST)
    opened.save(with_dice(3, 0.1))
    assert best_of(opened) == 3


@pytest.mark.parametrize("step", ["link", "replace"])
def test_a_best_state_that_cannot_be_kept_costs_no_round_and_the_one_before_it_is_whole(
    opened, monkeypatch, caplog, step
):
    opened.save(with_dice(1, 0.5))
    real = getattr(os, step)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(source, target):
        return full() if Path(target).name in (BEST, f".{BEST}") else real(source, target)

    monkeypatch.setattr(os, step, fail)
    monkeypatch.setattr(module, "write_atomically", full)
    opened.save(with_dice(2, 0.9))
    assert round_of(opened) == 2 and best_of(opened) == 1 and "best.safetensors could not be written" in caplog.text
    monkeypatch.undo()
    opened.save(with_dice(3, 0.8))
    assert best_of(opened) == 3, "the disk has room again, and what is kept is the best that there is"
    assert {path.name for path in opened.folder.iterdir()} == {CURRENT, PREVIOUS, BEST, LOCK}


def test_a_folder_with_a_best_state_alone_is_listed_and_can_be_deleted(opened, tmp_path):
    opened.save(with_dice(3, 0.7))
    opened.close()
    (entry,) = list_states(tmp_path)
    assert (entry.best["round"], entry.best["val_dice_personal"]) == (3, 0.7)
    (opened.folder / CURRENT).unlink()
    (entry,) = list_states(tmp_path)
    assert entry.problem and entry.best["round"] == 3
    delete_state(entry)
    assert not list(tmp_path.iterdir())


def test_a_file_is_described_by_its_kind_round_and_dice(opened, tmp_path):
    opened.save(with_dice(1, 0.75))
    opened.save(with_dice(2, 0.5, final=True))
    current, best = (described(opened.folder / name) for name in (CURRENT, BEST))
    assert "current state of round 2 (final), validation Dice 0.500" in current
    assert f"{BEST} beside it is of round 1, validation Dice 0.750" in current
    assert "best state of round 1, validation Dice 0.750" in best and "beside" not in best
    assert "state before the last of round 1" in described(opened.folder / PREVIOUS)
    write(tmp_path / "mine.safetensors", SiteModel({}, {}, {}, {"roles": ROLES, "round": None}))
    assert "model of a training alone, validation Dice not known" in described(tmp_path / "mine.safetensors")
    for gains, words in (
        ([0.04, 0.06], "kept 50% of the personal model after 2 epoch(s), Dice +0.050"),
        ([-1], "is the"),
    ):
        served = choose({Candidate(2, 0.5): gains}, margin=1).to_dict()
        write(tmp_path / "mine.safetensors", SiteModel({}, {}, {}, {"roles": ROLES, "round": 2, "served": served}))
        assert words in described(tmp_path / "mine.safetensors")
    assert code_of(described, tmp_path / "none") == "E13"


def farther(root: Path, fingerprint: str, **info: object) -> Path:
    """A state on disk, and its file."""
    found = model(1, fingerprint)
    found.info |= info
    path = root / "federation" / "site-1" / f"brain-{fingerprint[:12]}" / CURRENT
    write(path, found)
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"round": 3, "final": True}, {"round": 4, "final": False}),
        ({"round": 3, "final": False}, {"round": 3, "final": True}),
        ({"round": None}, {"round": 0}),
        ({"round": "9", "final": "yes"}, {"round": 0}),
    ],
)
def test_the_newest_state_has_come_farthest_whatever_the_clock_says(tmp_path, old, new):
    first, second = (farther(tmp_path, letters * 32, **told) for letters, told in (("ab", old), ("cd", new)))
    for early, late in ((first, second), (second, first)):
        os.utime(early, (1, 1))
        os.utime(late, (2, 2))
        assert newest_states(tmp_path, "federation")["site-1"].file == second


def test_of_states_that_have_come_as_far_the_last_by_the_clock_counts(tmp_path):
    first, second = (farther(tmp_path, letters * 32, round=2) for letters in ("ab", "cd"))
    for early, late in ((first, second), (second, first)):
        os.utime(early, (1, 1))
        os.utime(late, (2, 2))
        assert newest_states(tmp_path, "federation")["site-1"].file == late


# list and delete ------------------------------------------------------------------------------------------------------


def test_all_states_are_listed_in_order_also_a_corrupt_one(tmp_path):
    assert list_states(tmp_path) == list_states(tmp_path / "none") == []
    for site, bundle in (("site-2", "brain"), ("site-1", "with-dash"), ("site-1", "brain")):
        state = site_state(tmp_path, site=site, bundle=bundle)
        state.open()
        state.save(model(5))
        state.close()
    corrupt(state.folder / CURRENT)
    entries = list_states(tmp_path)
    assert [(e.federation, e.site, e.bundle, e.fingerprint) for e in entries] == [
        ("federation", "site-1", "brain", FINGERPRINT[:12]),
        ("federation", "site-1", "with-dash", FINGERPRINT[:12]),
        ("federation", "site-2", "brain", FINGERPRINT[:12]),
    ]
    assert entries[0].problem and entries[0].info == {}
    assert not entries[1].problem and entries[1].info["round"] == 5
    assert entries[1].file.is_file()


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_entry_names_the_file_that_a_job_goes_on_from(opened, tmp_path, damage):
    opened.save(model(1))
    opened.save(model(2))
    (entry,) = list_states(tmp_path)
    assert (entry.file.name, entry.info["round"], entry.problem) == (CURRENT, 2, "")
    damage(opened.folder / CURRENT)
    (entry,) = list_states(tmp_path)
    assert (entry.file.name, entry.info["round"]) == (PREVIOUS, 1)
    assert str(opened.folder / CURRENT) in entry.problem and "The state before it is used" in entry.problem


@pytest.mark.parametrize("left", [PREVIOUS, f".{PREVIOUS}", f".{CURRENT}.abc.tmp"])
def test_a_folder_with_any_tensors_is_listed_and_can_be_deleted(opened, tmp_path, left):
    opened.save(model(1))
    opened.close()
    (opened.folder / CURRENT).rename(opened.folder / left)
    (entry,) = list_states(tmp_path)
    assert entry.problem and entry.info.get("round") == (1 if left == PREVIOUS else None)
    delete_state(entry)
    assert not list(tmp_path.iterdir())


def test_deleted_state_is_gone_with_the_one_before_it_and_others_stay(opened, tmp_path):
    opened.save(model(1))
    opened.save(model(2))
    opened.close()
    write(tmp_path / "federation" / "site-2" / "brain-1" / CURRENT, model(1))
    first, second = list_states(tmp_path)
    delete_state(first)
    assert not first.folder.parent.exists() and second.file.is_file()
    delete_state(second)
    assert not list(tmp_path.iterdir())


def test_state_that_a_job_works_on_is_not_deleted(opened, tmp_path):
    opened.save(model(1))
    (entry,) = list_states(tmp_path)
    assert code_of(delete_state, entry) == "E14"
    assert round_of(opened) == 1
