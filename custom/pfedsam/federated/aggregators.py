"""NVFlare's weighted aggregator with LoRA's factors averaged as products."""

from __future__ import annotations

from typing import Any

import torch
from nvflare.apis.dxo import DXO, MetaKey, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
from nvflare.app_common.app_constant import AppConstants

from pfedsam.training.aggregation import A, B, refactored


class ProductAggregator(InTimeAccumulateWeightedAggregator):
    """`svd`: the weighted mean of the sites' products `B A`, factored again to the same rank; the mean of all else.

    LoRA's factors of the sites are held until the aggregation (they are small); other tensors are added up as they
    come. Takes the guard's word for names, shapes and finite values.

    Args:
        kwargs: of `InTimeAccumulateWeightedAggregator`; the data kind is `WEIGHT_DIFF`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"expected_data_kind": "WEIGHT_DIFF", "weigh_by_local_iter": True, **kwargs})
        self._factors: list[tuple[float, dict[str, Any]]] = []

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Add a site's contribution; False if NVFlare's aggregator refused it."""
        accepted = super().accept(shareable, fl_ctx)
        if accepted:
            dxo = from_shareable(shareable)
            factors = {name: value for name, value in dxo.data.items() if name.endswith((A, B))}
            self._factors.append((float(dxo.get_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1)), factors))
        return accepted

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The weighted mean as a change of the global model."""
        result = super().aggregate(fl_ctx)
        held, self._factors = self._factors, []
        dxo = from_shareable(result)
        theta = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
        weights = [weight for weight, _ in held]
        for a in [name for name in theta if name.endswith(A) and held and name in held[0][1]]:
            b = a.removesuffix(A) + B
            if b not in held[0][1]:
                continue
            new = refactored([tuple(_tensor(theta[n] + one[n]) for n in (a, b)) for _, one in held], weights)  # type: ignore[misc]
            for name, tensor in zip((a, b), new, strict=True):
                dxo.data[name] = tensor.numpy() - theta[name]
        return DXO(dxo.data_kind, dxo.data, dxo.meta).update_shareable(result)

    def reset(self, fl_ctx: FLContext) -> None:
        """Forget what was held."""
        super().reset(fl_ctx)
        self._factors = []


def _tensor(array: Any) -> torch.Tensor:
    return torch.as_tensor(array)
