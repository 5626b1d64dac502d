"""The server's aggregator of products against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.analytix import AnalyticsDataType  # noqa: F401  registers NVFlare's types
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants

from pfedsam.federated.aggregators import ProductAggregator
from pfedsam.training.aggregation import aggregate


def contribution(delta: dict[str, np.ndarray], weight: int, site: str) -> object:
    dxo = DXO(DataKind.WEIGHT_DIFF, dict(delta), {MetaKey.NUM_STEPS_CURRENT_ROUND: weight})
    shareable = dxo.to_shareable()
    shareable.set_peer_props({ReservedKey.IDENTITY_NAME: site})
    shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
    return shareable


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_servers_aggregation_is_the_references(rounds: int) -> None:
    random = np.random.default_rng(0)
    shapes = {"qkv.lora_a": (2, 4, 12), "qkv.lora_b": (2, 9, 4), "hyper.weight": (5, 3)}
    theta = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    aggregator, context = ProductAggregator(), FLContext()
    aggregator.handle_event(EventType.START_RUN, context)
    context.set_prop(AppConstants.CURRENT_ROUND, 0)
    for _ in range(rounds):
        deltas = [{n: 0.2 * random.normal(size=s).astype(np.float32) for n, s in shapes.items()} for _ in range(3)]
        weights = [4, 9, 2]
        context.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(dict(theta), {}))
        for number, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
            assert aggregator.accept(contribution(delta, weight, f"site-{number}"), context)
        assert not aggregator.accept(contribution(deltas[0], 1, "site-0"), context), "a site counts once in a round"
        change = from_shareable(aggregator.aggregate(context)).data
        wanted = aggregate(*_tensors(theta, deltas), weights, "svd")
        got = {name: theta[name] + change[name] for name in theta}
        product = lambda s: torch.as_tensor(s["qkv.lora_b"]) @ torch.as_tensor(s["qkv.lora_a"])  # noqa: E731
        torch.testing.assert_close(product(got), product(wanted), rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(got["hyper.weight"]), wanted["hyper.weight"], rtol=0, atol=1e-6)
        theta = got
        aggregator.reset(context)


def _tensors(theta: dict, deltas: list[dict]) -> tuple[dict, list[dict]]:
    as_tensors = [{name: torch.as_tensor(value) for name, value in one.items()} for one in (theta, *deltas)]
    return as_tensors[0], as_tensors[1:]
