"""Groups of similar sites and mixtures: one group is the mean bit for bit, planted ones are found, none is small."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from pfedsam.errors import PFedSAMError
from pfedsam.training.aggregation import aggregate
from pfedsam.training.download_settings import Downloads
from pfedsam.training.similar_sites import cosines, similar_groups
from pfedsam.training.site_downloads import SiteDownloads, shares_of
from pfedsam.training.strategy import Strategy

torch.set_num_threads(1)
SHAPES = {"qkv.lora_a": (2, 4, 12), "qkv.lora_b": (2, 9, 4), "hyper.weight": (5, 3)}
SIX = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0, "f": 1}


def tensors(random: torch.Generator, mean: float = 0.0) -> dict[str, Tensor]:
    return {name: mean + torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


class Rounds:
    """Rounds of a server whose sites have updates of planted directions."""

    def __init__(self, of: dict[str, int], rule: str = "norm_clipped", **settings: Any) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.of, self.theta = of, tensors(self.random)
        self.start, self.number = self.theta, 0
        self.towards = [tensors(self.random) for _ in range(max(of.values()) + 1)]
        self.downloads = SiteDownloads(Downloads.of({"warmup_rounds": 1, **settings}), rule)
        self.told: dict[str, Any] = {}

    def updates(self) -> dict[str, dict[str, Tensor]]:
        noise = {site: tensors(self.random) for site in self.of}
        return {
            site: {name: self.towards[kind][name] + 0.3 * noise[site][name] for name in SHAPES}
            for site, kind in self.of.items()
        }

    def run(self, updates: dict[str, dict[str, Tensor]] | None = None, weights: list[float] | None = None) -> None:
        updates = self.updates() if updates is None else updates
        start = self.start if self.number else None
        outcome = self.downloads.next(self.number, self.theta, updates, weights or [1.0] * len(updates), start=start)
        self.theta = applied(self.theta, outcome.change)
        self.told, self.judged = outcome.told, outcome.judged
        self.number += 1


def applied(theta: dict[str, Tensor], change: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (tensor.double() + change[name]).to(tensor.dtype) for name, tensor in theta.items()}


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in SHAPES)


def close(one: Any, other: Any) -> None:
    for name in SHAPES:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["norm_clipped", "mean"])
@pytest.mark.parametrize("settings", [{"groups": 1}, {"warmup_rounds": 9}, {"least_size": 4}], ids=str)
def test_one_group_of_all_sites_is_the_mean_of_all_bit_for_bit(rule: str, settings: dict[str, Any]) -> None:
    rounds = Rounds(SIX, rule, **settings)
    theta = start = rounds.theta
    for number in range(3):
        updates, weights = rounds.updates(), [4.0, 9.0, 2.0, 5.0, 100.0, 7.0]
        updates["b"] = {name: 7 * tensor for name, tensor in updates["b"].items()}  # is clipped
        theta = aggregate(theta, list(updates.values()), weights, rule, start if number else None)
        rounds.run(updates, weights)
        assert same(rounds.theta, theta)
        assert all(rounds.downloads.of(site) is None for site in SIX), "all get the global model"


def test_planted_groups_are_found_and_each_has_the_model_of_its_own_federation() -> None:
    rounds = Rounds(SIX)
    rounds.towards[1] = {name: -tensor for name, tensor in rounds.towards[0].items()}
    rounds.run()
    assert not rounds.told["groups"], "the first round is for getting to know each other"
    alone = {0: rounds.theta, 1: rounds.theta}
    begun = rounds.number
    for _ in range(3):
        updates = rounds.updates()
        rounds.run(updates)
        assert rounds.told["groups"] == [["a", "c", "e"], ["b", "d", "f"]]
        assert not any(one.changed for one in rounds.judged), "who is of another group does not point back"
        for kind in alone:
            members = [update for site, update in updates.items() if SIX[site] == kind]
            way = rounds.start if rounds.number > begun + 1 else None
            alone[kind] = aggregate(alone[kind], members, [1.0] * 3, "norm_clipped", way)
        for site, kind in SIX.items():
            close(rounds.downloads.of(site), alone[kind])
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in SHAPES}
    close(rounds.theta, mean)


def test_a_site_that_points_back_within_its_group_is_left_out_there() -> None:
    rounds = Rounds({name: int(name > "d") for name in "abcdefgh"}, groups=2)
    rounds.run()
    updates = rounds.updates()
    rounds.run(updates)
    assert [len(group) for group in rounds.told["groups"]] == [4, 4]
    updates["a"] = {name: -tensor for name, tensor in rounds.updates()["a"].items()}
    rounds.run(updates)
    assert rounds.judged[0].left_out and not any(one.left_out for one in rounds.judged[1:])
    share = rounds.told["shares"][1]
    assert share[0] == 0 and share[1:4] == [0.333] * 3


@pytest.mark.parametrize(
    ("of", "groups"),
    [
        ({"a": 0, "b": 0, "c": 0, "d": 1, "e": 1}, []),
        ({"a": 0, "b": 0, "c": 0, "d": 1}, []),  # the global model beside that of the group would tell d's
        ({"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "f": 2}, [["a", "b", "c"]]),
        ({"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "f": 1, "g": 2}, [["a", "b", "c"], ["d", "e", "f"]]),
    ],
    ids=lambda of: "".join(map(str, of.values())) if isinstance(of, dict) else "",
)
def test_no_group_is_too_small_to_hide_a_site_nor_is_what_is_outside_of_it(of: dict, groups: list) -> None:
    rounds = Rounds(of, groups=max(of.values()) + 1)
    for _ in range(3):
        rounds.run()
    assert rounds.told["groups"] == groups
    grouped = [site for group in groups for site in group]
    assert all((rounds.downloads.of(site) is None) == (site not in grouped) for site in of)


def test_a_group_in_which_a_site_is_missing_or_left_out_is_too_small() -> None:
    rounds = Rounds(SIX, groups=2)
    rounds.run()
    rounds.run()
    assert len(rounds.told["groups"]) == 2
    there = rounds.updates()
    del there["a"]
    rounds.run(there)
    assert not rounds.told["groups"] and rounds.downloads.of("a") is None
    absurd = rounds.updates()
    absurd["b"] = {name: 1000 * tensor for name, tensor in absurd["b"].items()}
    rounds.run(absurd)
    assert rounds.judged[1].left_out and not rounds.told["groups"]


def test_an_absent_site_and_a_new_one_get_the_mean_of_all() -> None:
    rounds = Rounds({name: int(name > "d") for name in "abcdefgh"})
    rounds.run()
    rounds.run()
    there = rounds.updates()
    there.pop("a")
    there["new"] = there["b"]
    assert rounds.downloads.of("a") is not None
    rounds.run(there)
    assert len(rounds.told["groups"]) == 2
    assert rounds.downloads.of("a") is None and rounds.downloads.of("unknown") is None
    assert rounds.downloads.of("new") is rounds.downloads.of("b")


@given(some.lists(some.floats(0, 1e6), min_size=1, max_size=20).filter(lambda row: sum(row) > 1e-9))
def test_shares_are_not_negative_and_sum_to_one(row: list[float]) -> None:
    shares = shares_of(row)
    assert min(shares) >= 0 and sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["groups", "mixtures"])
def test_the_rows_that_are_told_sum_to_one(kind: str) -> None:
    rounds = Rounds(SIX, kind=kind, peers_see_models=True)
    for _ in range(2):
        rounds.run(weights=[3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
        assert all(sum(row) == pytest.approx(1, abs=0.01) and min(row) >= 0 for row in rounds.told["shares"])


def test_a_mixture_weighs_sites_by_their_cosine_and_follows_the_formula() -> None:
    rounds = Rounds(SIX, kind="mixtures", temperature=0.2, peers_see_models=True)
    rounds.run()
    received = {site: rounds.downloads.of(site) or rounds.theta for site in SIX}
    for _ in range(2):
        updates, before = rounds.updates(), dict(received)
        rounds.run(updates)
        flat = list(rounds.downloads._memory.values())
        shares = torch.softmax(cosines(flat) / 0.2, dim=1)
        assert shares[0, 2] > 10 * shares[0, 1]
        for place, site in enumerate(SIX):
            wanted = {
                name: sum(
                    s * (before[k][name].double() + updates[k][name]) for s, k in zip(shares[place], SIX, strict=True)
                )
                for name in SHAPES
            }
            received[site] = rounds.downloads.of(site)
            close(received[site], {name: value.float() for name, value in wanted.items()})


def test_a_site_of_which_nothing_counts_that_is_like_it_has_the_mean_of_all() -> None:
    rounds = Rounds(SIX, kind="mixtures", temperature=0.001, peers_see_models=True, warmup_rounds=0)
    updates = {site: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for site in SIX}
    for place, site in enumerate(SIX):  # all at right angles, and one far too long
        updates[site]["hyper.weight"].view(-1)[place] = 1000.0 if site == "a" else 1.0
    rounds.run(updates)
    assert rounds.judged[0].left_out and all(sum(row) == pytest.approx(1, abs=0.01) for row in rounds.told["shares"])


def test_a_federation_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, stopped = Rounds(SIX), Rounds(SIX)
    for _ in range(3):
        whole.run()
        stopped.run()
    stopped.downloads.save(tmp_path / "kept.safetensors", "digest")
    for number, model in ((2, "digest"), (3, "of another model")):
        assert not stopped.downloads.load(tmp_path / "kept.safetensors", number, model)
    other = SiteDownloads(Downloads(kind="mixtures", peers_see_models=True), "norm_clipped")
    assert not other.load(tmp_path / "kept.safetensors", 3, "digest"), "what other settings made is not gone on with"
    again = SiteDownloads(stopped.downloads.settings, "norm_clipped")
    assert again.load(tmp_path / "kept.safetensors", 3, "digest")
    assert again.of("a") is again.of("c") and not same(again.of("a"), again.of("b"))
    stopped.downloads = again
    for _ in range(2):
        whole.run()
        stopped.run()
        assert whole.told == stopped.told and same(whole.theta, stopped.theta)
        assert all(same(whole.downloads.of(site), again.of(site)) for site in SIX)


def test_a_damaged_file_is_no_start(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(PFedSAMError, match="E33"):
        Rounds(SIX).downloads.load(path, 0)


def test_sites_with_nothing_in_common_and_sites_that_are_all_alike_form_no_groups() -> None:
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(8, 3000, generator=random)
    assert similar_groups(cosines(list(noise))) == [list(range(8))]
    assert similar_groups(cosines(list(noise + torch.randn(3000, generator=random)))) == [list(range(8))]
    assert similar_groups(cosines([torch.zeros(5)] * 4)) == [list(range(4))]


def test_groups_do_not_depend_on_the_order_of_the_sites() -> None:
    random = torch.Generator().manual_seed(2)
    towards = torch.randn(3, 500, generator=random)
    vectors = [towards[place % 3] + 0.3 * torch.randn(500, generator=random) for place in range(9)]
    wanted = {frozenset(range(kind, 9, 3)) for kind in range(3)}
    for order in itertools.islice(itertools.permutations(range(9)), 0, 200000, 20011):
        found = similar_groups(cosines([vectors[place] for place in order]), least_size=3)
        assert {frozenset(order[place] for place in group) for group in found} == wanted


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"downloads": {"kind": "mixtures"}}, "peers_see_models"),
        ({"downloads": {"least_size": 2}}, "group of 2.*peers_see_my_model"),
        ({"downloads": {}, "aggregation": "median"}, "norm_clipped"),
        ({"downloads": {}, "aggregation": "svd"}, "norm_clipped"),
        ({"downloads": {}, "aggregation": "alternate"}, "norm_clipped"),
        ({"downloads": {}, "weights": "dro"}, "dro"),
        ({"downloads": {}, "shared": [], "personal": ["experts"]}, "none"),
        ({"downloads": {"memory": 1.5}}, "memory"),
        ({"downloads": {"groups": -1}}, "groups"),
        ({"downloads": {"temperature": 0}}, "temperature"),
        ({"downloads": {"kind": "clusters"}}, "kind"),
        ({"downloads": "one"}, "downloads"),
    ],
    ids=str,
)
def test_downloads_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PFedSAMError, match=rf"E16(?s:.)*{told}"):
        Strategy.of(settings)
