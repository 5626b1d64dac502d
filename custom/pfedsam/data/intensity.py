"""The intensity window of a volume: the percentiles that the bundles scale by, and where they say nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Lower and upper percentile.
WINDOW = (0.5, 99.5)
#: What is said of an image whose percentiles coincide.
NO_WINDOW = "nearly all of its values are the same, so its intensity window goes from the smallest to the largest value"
#: About so many values are looked at first.
_SAMPLE = 100_000


def window_is_empty(values: NDArray[Any]) -> bool:
    """Whether both percentiles of `WINDOW` are one value: at most 0.5 % of the values lie below, and above it.

    Most images are seen not to be so from a sample.
    """
    flat = values.ravel(order="K")
    sample = flat[:: max(1, len(flat) // _SAMPLE)]
    middle = np.partition(sample, len(sample) // 2)[len(sample) // 2]
    if np.count_nonzero(sample == middle) < 0.9 * len(sample):
        return False
    # ranks of the percentiles, as they are interpolated
    below, above = np.floor(WINDOW[0] / 100 * (len(flat) - 1)), np.ceil(WINDOW[1] / 100 * (len(flat) - 1))
    less = np.count_nonzero(flat < middle)
    return bool(less <= below and less + np.count_nonzero(flat == middle) > above)
