"""The cache of the frozen trunk: the same features, each computed once, within its limit."""

from __future__ import annotations

import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer
from torch import Tensor

from pfedsam.inferers import CachedSliceInferer
from pfedsam.networks.sam import build_network
from pfedsam.training.feature_cache import GIB, TRAINING, FeatureCache
from pfedsam.training.feature_store import FeatureStore

torch.set_num_threads(1)
ROW = 2 * 3 * 4  # values of one row


class Trunk:
    """Doubles the images and notes how many it saw."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.seen = dtype, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return (2 * images).to(self.dtype)


def images(*numbers: int) -> Tensor:
    return torch.stack([torch.arange(ROW).view(2, 3, 4) / 7 + number for number in numbers])


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path) -> str | None:
    return str(tmp_path / "cache") if request.param == "disk" else None


def limit(rows: float, itemsize: int = 4) -> float:
    return rows * ROW * itemsize / GIB


def test_features_are_those_of_the_trunk_and_computed_once(folder):
    trunk, cache = Trunk(), FeatureCache(1e-4, folder)
    for keys in ([1, 2], [2, 3], [3, 1, 2], [5, 1, 4]):
        assert torch.equal(cache.features(trunk, images(*keys), keys), 2 * images(*keys))
    assert trunk.seen == len(cache) == cache.misses == 5
    assert cache.hits == 5
    assert cache.bytes == 5 * ROW * 4


def test_stored_features_do_not_change_with_what_is_done_to_a_batch(folder):
    trunk, cache = Trunk(), FeatureCache(1e-4, folder)
    for _ in range(3):
        features = cache.features(trunk, images(1, 2), [1, 2])
        assert torch.equal(features, 2 * images(1, 2))
        features.zero_()


def test_limit_is_kept_and_the_summary_says_why(folder):
    trunk, cache = Trunk(), FeatureCache(limit(2.5), folder)
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(1, 2, 3), [1, 2, 3]), 2 * images(1, 2, 3))
    assert len(cache) == 2 and cache.bytes <= cache.limit
    assert trunk.seen == 4  # the third one again
    assert "full" in cache.summary() and "cache_limit_gb" in cache.summary() and "2 slices" in cache.summary()


def test_summary_of_a_cache_that_holds_everything_says_nothing_of_a_limit(folder):
    cache = FeatureCache(limit(2), folder)
    cache.features(Trunk(), images(1, 2), [1, 2])
    assert len(cache) == 2 and "full" not in cache.summary() and "2 computed" in cache.summary()


def test_limit_of_zero_turns_the_cache_off(folder):
    trunk, cache = Trunk(), FeatureCache(0, folder)
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(1), [1]), 2 * images(1))
    assert trunk.seen == 2 and not len(cache) and "off" in cache.summary()


def test_limit_below_one_slice_stores_nothing(folder):
    trunk, cache = Trunk(), FeatureCache(limit(0.5), folder)
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(1), [1]), 2 * images(1))
    assert not len(cache) and "full" in cache.summary()


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_reduced_features_are_close_and_take_half_the_bytes(folder, dtype, error):
    cache = FeatureCache(limit(2, 2), folder, dtype)
    exact = cache.features(Trunk(), images(1, 2), [1, 2])
    again = cache.features(Trunk(), images(1, 2), [1, 2])
    assert len(cache) == 2 and cache.bytes == 2 * ROW * 2
    assert again.dtype == exact.dtype == torch.float32
    assert torch.allclose(again, exact, rtol=error, atol=0)


def test_dtype_of_the_trunk_is_kept_in_every_batch(folder):
    """Under autocast a trunk gives bfloat16; a step must not depend on what is in the cache."""
    cache = FeatureCache(1e-4, folder)
    found = [cache.features(Trunk(torch.bfloat16), images(*keys), keys).dtype for keys in ([1, 2], [2, 3], [1, 3])]
    assert found == [torch.bfloat16] * 3


def test_one_cache_serves_a_reduced_and_an_exact_trunk(folder):
    """Training may run under autocast and validation not: each gets its own features in its own dtype."""
    cache = FeatureCache(1e-4, folder)
    for _ in range(2):
        for dtype, keys in ((torch.bfloat16, [1, 2]), (torch.float32, [3, 4])):
            found = cache.features(Trunk(dtype), images(*keys), keys)
            assert found.dtype == dtype and torch.equal(found, (2 * images(*keys)).to(dtype))
    assert (cache.hits, cache.misses) == (4, 4)


def test_features_of_another_shape_are_computed_anew(folder):
    trunk, cache = Trunk(), FeatureCache(1e-4, folder)
    cache.features(trunk, images(1), [1])
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(2)[..., :2], [2]), 2 * images(2)[..., :2])
    assert len(cache) == 1


def test_file_of_a_cache_has_no_name(tmp_path):
    """So that nobody else opens it, and nothing is left of it when the process is killed."""
    trunk, cache = Trunk(), FeatureCache(1e-4, str(tmp_path / "cache"))
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(1, 2), [1, 2]), 2 * images(1, 2))
    assert trunk.seen == 2 and "cache" in cache.summary()
    assert not list((tmp_path / "cache").iterdir())


def test_nothing_is_written_before_the_first_feature(tmp_path):
    FeatureCache(1.0, str(tmp_path / "cache"))
    assert not list(tmp_path.iterdir())


# files that runs share ----------------------------------------------------------------------------------------------


class Network:
    """What a store asks of a network."""

    def __init__(self, weights: str = "ab" * 32) -> None:
        self.weights, self.seen = weights, 0

    def trunk_fingerprint(self) -> str:
        return self.weights

    def trunk(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return 2 * images


def stored(folder: Path, network: Network, *numbers: int) -> Tensor:
    """Features by a store that has just been opened, as in the next run."""
    return FeatureStore(str(folder)).features(network.trunk, images(*numbers), numbers)


def cut(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def zero(path: Path, _: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def flip(path: Path, _: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-60] ^= 1
    path.write_bytes(data)


def without_digest(path: Path, _: Path) -> None:
    np.save(path, np.ones((2, 3, 4), np.float32))


def other_shape(path: Path, _: Path) -> None:
    np.save(path, np.ones((7, 7), np.float32))


def anothers(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def folder_in_its_place(path: Path, _: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, zero, flip, without_digest, other_shape, anothers, folder_in_its_place])
def test_a_torn_or_foreign_file_in_the_store_is_computed_anew(tmp_path, damage):
    network = Network()
    assert torch.equal(stored(tmp_path, network, 1, 2, 3), 2 * images(1, 2, 3)) and network.seen == 3
    assert torch.equal(stored(tmp_path, network, 1, 2, 3), 2 * images(1, 2, 3)) and network.seen == 3
    files = sorted(tmp_path.rglob("*.npy"))
    damage(files[0], files[1])
    for _ in range(2):
        assert torch.equal(stored(tmp_path, network, 1, 2, 3), 2 * images(1, 2, 3))
    # what cannot be replaced is computed each time
    assert network.seen == (5 if damage is folder_in_its_place else 4)


def test_features_of_another_trunk_are_not_taken(tmp_path):
    first, second = Network("ab" * 32), Network("cd" * 32)
    stored(tmp_path, first, 1)
    (file,) = tmp_path.rglob("*.npy")
    moved = tmp_path / second.weights[:16] / file.parent.name / file.name
    moved.parent.mkdir(parents=True)
    shutil.copy(file, moved)
    stored(tmp_path, second, 1)
    assert second.seen == 1


def test_features_of_another_shape_in_the_store_are_all_computed_anew(tmp_path):
    """Whole files, of a network that has changed under the same fingerprint."""
    network = Network()
    stored(tmp_path, network, 1, 2)
    network.trunk = types.MethodType(lambda self, batch: batch[..., :2], network)  # type: ignore[method-assign]
    for numbers in ((1, 3), (1, 2, 3)):
        assert torch.equal(stored(tmp_path, network, *numbers), images(*numbers)[..., :2])


def test_a_store_that_cannot_be_written_costs_time_and_no_run(tmp_path, caplog):
    (tmp_path / "store").write_text("a file")
    network = Network()
    for seen in (2, 4):
        assert torch.equal(stored(tmp_path / "store", network, 1, 2), 2 * images(1, 2)) and network.seen == seen
    assert caplog.text.count("features cannot be stored") == 2  # once in each run


# volumes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["meta tensor", "tensor"])
@torch.no_grad()
def test_inference_with_the_cache_equals_inference_without_it(folder, kind):
    network = build_network("vit_test", 32)
    settings = {"roi_size": (32, 32), "sw_batch_size": 3, "spatial_dim": 2}
    cache = FeatureCache(0.01, folder)
    cached, plain = CachedSliceInferer(cache, **settings), SliceInferer(**settings)
    for _ in range(2):
        for case, depth in (("a", 7), ("b", 4)):
            volume = torch.rand(1, 3, 32, 32, depth, generator=torch.Generator().manual_seed(depth))
            expected = plain(volume, network)
            if kind == "meta tensor":
                volume = MetaTensor(volume, meta={"filename_or_obj": [f"{case}.nii.gz"]})
            found = cached(volume, network)
            assert found.shape == (1, 1, 32, 32, depth)
            assert torch.allclose(torch.as_tensor(found), expected, atol=1e-5)
    # a volume without a name cannot be told from another one
    assert (len(cache), cache.hits) == ((11, 11) if kind == "meta tensor" else (0, 0))


@torch.no_grad()
def test_inference_under_autocast_agrees_with_the_exact_one_and_the_store_keeps_both(tmp_path):
    network = build_network("vit_test", 32)
    settings = {"roi_size": (32, 32), "sw_batch_size": 2, "spatial_dim": 2}
    volume = torch.rand(1, 3, 32, 32, 4, generator=torch.Generator().manual_seed(0))
    named = MetaTensor(volume, meta={"filename_or_obj": ["a.nii.gz"]})
    expected, store = SliceInferer(**settings)(volume, network), FeatureStore(str(tmp_path))
    for amp in (True, False):
        for inputs in (volume, named, named):
            found = torch.as_tensor(CachedSliceInferer(store, amp=amp, **settings)(inputs, network))
            assert found.dtype == torch.float32
            # bfloat16 has 8 bits of precision
            assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()) if amp else 1e-5)
            assert torch.equal(found, expected) or amp or inputs is named
    assert (store.misses, store.hits) == (8, 8)
    assert len(list(tmp_path.rglob("*.npy"))) == 8


def of_training(*numbers: int) -> list[tuple[str, int]]:
    return [(TRAINING, number) for number in numbers]


def test_training_takes_the_places_of_validation_and_keeps_its_own(folder):
    trunk, cache = Trunk(), FeatureCache(limit(3), folder)
    cases = [("volume", "case", number) for number in range(3)]
    cache.features(trunk, images(0, 1, 2), cases)
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(7, 8), of_training(7, 8)), 2 * images(7, 8))
    assert trunk.seen == 5 and "50% of 4" in cache.summary(), "the second epoch reads all of them"
    for _ in range(2):  # the first two cases have no place any more
        assert torch.equal(cache.features(trunk, images(0, 1, 2), cases), 2 * images(0, 1, 2))
    assert trunk.seen == 9 and len(cache) == 3 and cache.bytes <= cache.limit
    assert torch.equal(cache.features(trunk, images(7, 8), of_training(7, 8)), 2 * images(7, 8))
    assert trunk.seen == 9, "nobody takes the places of training"


def test_training_that_does_not_fit_keeps_what_it_has(folder):
    trunk, cache = Trunk(), FeatureCache(limit(2), folder)
    for _ in range(2):
        assert torch.equal(cache.features(trunk, images(1, 2, 3), of_training(1, 2, 3)), 2 * images(1, 2, 3))
    assert trunk.seen == 4 and "33% of 6" in cache.summary() and "full" in cache.summary()
