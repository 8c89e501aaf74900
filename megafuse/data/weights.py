"""The weight of a source for one prompt: Eq. 8 of FuseRL (arXiv 2504.06562)."""

import math
from collections.abc import Sequence

import numpy as np

from megafuse.errors import ConfigError, DataError


def source_weights(rewards: Sequence[float] | np.ndarray, alpha: float) -> np.ndarray:
    """`w_i = softmax_i(r_i / alpha)` in float64, with the maximum subtracted before the division.

    The order of the two matters: alpha goes down to 1e-4 and rewards have any scale, so `r / alpha` may overflow while
    `(r - max) / alpha` only ever overflows to minus infinity, whose weight is an exact 0.

    Args:
        rewards: [n] finite rewards of one prompt, n >= 1.
        alpha: temperature, finite and > 0; small: only the best source counts, large: all count the same.

    Returns:
        [n] float64, finite, non-negative, summing to 1. Equal rewards get bitwise equal weights.

    Raises:
        ConfigError: alpha is not a finite positive number.
        DataError: rewards are not a vector of at least one finite number.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha must be a finite number > 0, got {alpha!r}")
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise DataError(f"rewards must be a vector of at least one number, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise DataError(f"rewards must be finite, got {values.tolist()}")
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((values - values.max()) / alpha)
        return weights / weights.sum()
