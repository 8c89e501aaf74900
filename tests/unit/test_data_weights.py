"""Eq. 8 against 60-digit decimal arithmetic, at the temperatures and scales where a plain softmax breaks."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megafuse.data.weights import source_weights
from megafuse.errors import ConfigError, DataError


def exact(rewards: list[float], alpha: float) -> list[Decimal]:
    with localcontext() as context:
        context.prec = 60
        context.Emin, context.Emax = -999999999999999999, 999999999999999999
        best = max(Decimal(r) for r in rewards)
        terms = []
        for r in rewards:
            exponent = (Decimal(r) - best) / Decimal(alpha)
            terms.append(exponent.exp() if exponent > -100000 else Decimal(0))
        total = sum(terms)
        return [t / total for t in terms]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 5e-3, 1e-2, 1.0, 100.0])
def test_equals_exact_softmax(scale: float, alpha: float) -> None:
    rng = np.random.default_rng()
    for n in (1, 2, 5, 40):
        rewards = (rng.normal(size=n) * scale * min(1.0, 100 * alpha)).tolist()
        want = np.array([float(w) for w in exact(rewards, alpha)])
        # one rounding of (r - max) / alpha costs |exponent| * 2^-53 in relative terms
        spread = (max(rewards) - np.array(rewards)) / alpha
        np.testing.assert_allclose(source_weights(rewards, alpha), want, rtol=0, atol=1e-15 * (10 + spread.max()))


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(finite, min_size=1, max_size=30), st.floats(1e-4, 1e4))
def test_is_a_distribution_for_any_reward(rewards: list[float], alpha: float) -> None:
    weights = source_weights(rewards, alpha)
    assert weights.dtype == np.float64 and weights.shape == (len(rewards),)
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert abs(math.fsum(weights) - 1) < 1e-12
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(weights[order]) >= 0).all(), "a higher reward never weighs less"
    for i, r in enumerate(rewards):
        assert weights[i] == weights[rewards.index(r)], "equal rewards weigh the same, bit for bit"


def test_extremes() -> None:
    np.testing.assert_array_equal(source_weights([1e300, -1e300, 1e300], 1e-4), [0.5, 0.0, 0.5])
    np.testing.assert_array_equal(source_weights([-1.7e308, 1.7e308], 1e-4), [0.0, 1.0])
    np.testing.assert_array_equal(source_weights([1e300] * 4, 1e-4), [0.25] * 4)


@pytest.mark.parametrize("alpha", [0.0, -1e-3, math.nan, math.inf])
def test_refuses_alpha(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        source_weights([1.0, 2.0], alpha)


@pytest.mark.parametrize("rewards", [[], [1.0, math.nan], [math.inf], [[1.0], [2.0]]])
def test_refuses_rewards(rewards: list[float]) -> None:
    with pytest.raises(DataError, match="rewards"):
        source_weights(rewards, 1e-2)
