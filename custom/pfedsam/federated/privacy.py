"""Differential privacy of what leaves a site: clip the whole update, add Gaussian noise, account for the rounds.

The unit is one site's whole update in one round: what is hidden is whether the site took part with this update, not a
single patient. Epsilon counts the rounds of one job: a later job of the same federation, and a round that is sent again
after the server was lost, come on top. What travels beside the update has no noise: the number of training cases (see
`weights: uniform`), the validation Dice in steps of 0.01, the gap of `weights: gaa`, and the scalars for curves
(losses, shares of gates and experts). A small epsilon needs noise that a federation of few sites does not average out:
useful noise gives a large epsilon, which is then protection against accidents, not a guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from pfedsam.errors import ErrorCode, PFedSAMError

DELTA = 1e-5


class ClipAndNoise(Filter):
    """Outgoing filter of a site, after `PersonalisedFilter`: bounds the update's L2 norm and adds Gaussian noise.

    Args:
        clip: largest L2 norm of an update over all of its tensors.
        noise_multiplier: standard deviation of the noise on each number, as a multiple of `clip`; 0 for none.

    The noise comes from the operating system's source of randomness: no seed makes it known to anybody.

    Raises:
        ValueError: for a clip that is not positive or a negative noise.
    """

    def __init__(self, clip: float, noise_multiplier: float = 0.0) -> None:
        super().__init__()
        if not clip > 0 or noise_multiplier < 0:
            raise ValueError(f"clip is {clip}, noise_multiplier {noise_multiplier}; expected > 0 and >= 0")
        self.clip = clip
        self.noise_multiplier = noise_multiplier

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """Clip and noise a weight difference; anything else passes as it is."""
        if shareable.get_return_code() != ReturnCode.OK or not holds_update(shareable):
            return shareable
        dxo = from_shareable(shareable)
        data, norm = clipped(dxo.data, self.clip)
        if self.noise_multiplier:
            data = noised(data, self.noise_multiplier * self.clip, np.random.default_rng())
        self.logger.info(f"update of norm {norm:.4g}: clip {self.clip:g}, noise {self.noise_multiplier:g} times that")
        return DXO(DataKind.WEIGHT_DIFF, data=data, meta=dxo.meta).to_shareable()


def require_policy(chain: Sequence[Filter], largest_clip: float | None, least_noise: float | None) -> None:
    """Refuse a job that clips less, or adds less noise, than the site asks for.

    Args:
        chain: the outgoing filters of the site's training results, in order.
        largest_clip, least_noise: see `pfedsam.federated.settings.SiteSettings`.

    Raises:
        PFedSAMError: E23 with what was asked for and what was found.
    """
    if largest_clip is None and least_noise is None:
        return
    # a subclass could do anything
    noise_filters = [filter_ for filter_ in chain if type(filter_) is ClipAndNoise]
    for noise_filter in noise_filters:
        if noise_filter.clip <= (largest_clip or math.inf) and noise_filter.noise_multiplier >= (least_noise or 0.0):
            return
    strengths = [
        f"clip {noise_filter.clip:g}, noise {noise_filter.noise_multiplier:g}" for noise_filter in noise_filters
    ] or "no clipping"
    raise PFedSAMError(
        ErrorCode.PRIVACY_TOO_WEAK,
        f"the job has {strengths}, this site asks for clip <= {largest_clip} and noise >= {least_noise}.",
        "Ask for a job made with --clip and --noise, or change the site's own local/pfedsam.json.",
    )


def holds_update(shareable: Shareable) -> bool:
    """Whether a result is a weight difference."""
    try:
        return from_shareable(shareable).data_kind == DataKind.WEIGHT_DIFF
    except ValueError:
        return False


def clipped(data: dict[str, np.ndarray], clip: float) -> tuple[dict[str, np.ndarray], float]:
    """An update scaled to an L2 norm of at most `clip`, and the norm that it had."""
    norm = math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in data.values()))
    scale = min(1.0, clip / norm) if norm else 1.0
    return {name: (array * scale).astype(array.dtype) for name, array in data.items()}, norm


def noised(data: dict[str, np.ndarray], deviation: float, random: np.random.Generator) -> dict[str, np.ndarray]:
    """An update with independent Gaussian noise on each number."""
    return {name: (a + random.normal(0, deviation, a.shape)).astype(a.dtype) for name, a in data.items()}


def epsilon(noise_multiplier: float, rounds: int, delta: float = DELTA) -> float:
    """Epsilon at `delta` of so many rounds of the Gaussian mechanism (Renyi accountant of dp-accounting).

    Raises:
        PFedSAMError: E31 if dp-accounting is not installed.
    """
    if not noise_multiplier:
        return math.inf
    try:
        from dp_accounting import GaussianDpEvent, rdp
    except ImportError:
        raise PFedSAMError(
            ErrorCode.MISSING_LIBRARY, "there is no accountant.", "Install the extra 'privacy' of pfedsam."
        ) from None
    accountant = rdp.RdpAccountant()
    accountant.compose(GaussianDpEvent(noise_multiplier), rounds)
    return float(accountant.get_epsilon(delta))
