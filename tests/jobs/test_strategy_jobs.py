"""Jobs of other shapes than the main one in NVFlare's simulator, and the same federations in one process.

The shapes are: alternating factors with experts in the final phase; and, slow, a personal copy that each round trains
after the shared tensors, one phase, and two phases (the main job with a local phase in each round).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from simulated import BUNDLE, ROOT, TINY, Job, simulate

from pfedsam.bundles import network_of
from pfedsam.parameters import COPY, group_of, shared_state
from pfedsam.storage.site_model import read
from pfedsam.training.catalogue import find_strategy
from pfedsam.training.federation import Federation, run_federation
from pfedsam.training.site import SiteTrainer

SITES = ("site-1", "site-2")
SHAPES = {
    "copy": "ditto",
    "alternate": "aggregation_alternate",
    "one phase": "fedavg_lora",
    "two phases": "local_phase_each_round",
}
SLOW = {"copy", "one phase", "two phases"}
ROUNDS = 2


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(one, id=one.replace(" ", "_"), marks=[pytest.mark.slow] if one in SLOW else []) for one in SHAPES
    ],
)
def shape(request: pytest.FixtureRequest, federation: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run of the simulator, and the same federation in this process with one thread."""
    name = SHAPES[request.param]
    file = find_strategy(name)
    folder = tmp_path_factory.mktemp(name)
    job = Job(recorded=False, source=ROOT / "jobs" / (name if (ROOT / "jobs" / name).is_dir() else "pfedsam"))
    job.plan["strategy"] = file.strategy
    job.server["num_rounds"] = ROUNDS
    simulated = simulate(folder, job, federation)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sites = {site: federation / site for site in SITES}
    ours = Federation(BUNDLE, sites, file.checked(), folder / "ours", ROUNDS, {**file.overrides, **TINY})
    try:
        run_federation(ours)
    finally:
        torch.set_num_threads(threads)
    return file.checked(), simulated, ours


def test_simulator_and_one_process_agree(shape) -> None:
    _, simulated, ours = shape
    assert simulated.exit_code == 0, simulated.output[-3000:]
    for site in SITES:
        theirs, mine = read(simulated.state_folder(site) / "state.safetensors"), read(ours.model_of(site))
        assert theirs.shared.keys() == mine.shared.keys()
        assert theirs.personal.keys() == mine.personal.keys()
        for name, tensor in theirs.shared.items():
            torch.testing.assert_close(tensor, mine.shared[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert theirs.info["val_dice_personal"] == pytest.approx(mine.info["val_dice_personal"], abs=1e-3)
        # training moved them: agreement of two untrained models would say nothing
        assert mine.info["final"]
        start = shared_state(network_of(BUNDLE, ours.overrides), ours.strategy.roles)
        assert any(not torch.equal(tensor, start[name]) for name, tensor in mine.shared.items())
    first, second = (read(ours.model_of(site)).shared for site in SITES)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "one global model for all"


def test_only_shared_tensors_left(shape) -> None:
    strategy, simulated, _ = shape
    for site in SITES:
        state = read(simulated.state_folder(site) / "state.safetensors")
        trained = [one for one in simulated.sent(site) if one["task"] == "train"]
        assert [one["tensors"] for one in trained] == [len(state.shared)] * ROUNDS
        assert {one["excluded"] for one in trained} <= {len(state.personal), 0}
        assert all(strategy.roles.of(name) == "shared" for name in state.shared)


def test_a_copy_stays_and_differs_from_what_is_shared(shape) -> None:
    strategy, simulated, _ = shape
    states = [read(simulated.state_folder(site) / "state.safetensors") for site in SITES]
    copies = [{n: t for n, t in state.personal.items() if n.startswith(COPY)} for state in states]
    if not strategy.has_copy:
        assert copies == [{}, {}]
        return
    for state, copy in zip(states, copies, strict=True):
        assert {name.removeprefix(COPY) for name in copy} == set(state.shared)
        assert any(not torch.equal(tensor, state.shared[name.removeprefix(COPY)]) for name, tensor in copy.items())
    assert any(not torch.equal(tensor, copies[1][name]) for name, tensor in copies[0].items())


def test_alternate_moves_one_factor_in_a_round(shape, federation: Path, tmp_path: Path) -> None:
    strategy, *_ = shape
    if strategy.aggregation != "alternate":
        assert not strategy.frozen_this_round(0)
        return
    assert (strategy.frozen_this_round(0), strategy.frozen_this_round(1)) == (
        frozenset({"lora_a"}),
        frozenset({"lora_b"}),
    )
    local = SiteTrainer(BUNDLE, federation / "site-1", strategy, TINY, tmp_path)
    local.open()
    for number in range(2):
        local.receive(shared_state(local.network, strategy.roles), local.fingerprint)
        moved = {group_of(name) for name, delta in local.train(number).delta.items() if delta.any()}
        assert moved == {"lora_b" if number == 0 else "lora_a", "decoder_subset"}
