"""Packs prompt groups into token rows, and one global batch onto data parallel ranks.

A group is one prompt with all of its responses, or a part of it that the loss does not join with the rest (see
`megafuse.data.parts`). What is packed here as one group is never split. The work is done in C++ (`csrc/`), without
the GIL.

Plans are deterministic: they depend on the arguments only, equal sizes are ordered by index, and costs are compared as
integers. So every rank can compute the plan of a batch on its own, and all of them agree.
"""

import importlib
import operator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megafuse.errors import ConfigError, DataError, MegafuseError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


def pack_rows(tokens: ArrayLike, budget: int) -> list[IntArray]:
    """Whole groups into as few rows of at most `budget` tokens as possible, to go through a data set once.

    Best-fit decreasing in O(n log min(n, budget)), which needs at most 11/9 of the fewest rows (Johnson, 1974) and on
    real lengths practically fills them. Where it does not reach the lower bound and there are at most 4096 groups, a
    search for the best subset of each row (minimum bin slack; Gupta and Ho, 1999) is tried as well.

    Args:
        tokens: [n] integers, the tokens of each group as `group_tokens` counts them; n >= 1.
        budget: the most tokens of a row, 1..2^31-1.

    Returns:
        One int64 array a row: rising group indices. Every group is in exactly one row. Rows come by falling token
        count, so that rows of similar length are neighbours and the one that is not full is the last.

    Raises:
        DataError: there is no group, or one with less than 1 or more than `budget` tokens (it names the group).
        ConfigError: `budget` is out of range.
    """
    return _extension().pack_rows(_integers("tokens", tokens), _limit("budget", budget))


def pack_batch(tokens: ArrayLike, cost: ArrayLike, budget: int, ranks: int) -> list[list[IntArray]]:
    """One global batch onto data parallel ranks: as many rows on each, balanced costs, a short longest row.

    The number of rows a rank, m, is the smallest one for which a packing is found, as for `pack_rows`. Then, in this
    order of importance: the dearest rank is made cheap (longest processing time first, then moves and swaps of
    groups between ranks; within about 0.1 % of the mean where the groups allow it), and the longest row, to which all
    rows of a step are padded, is made short (multifit; Coffman, Garey and Johnson, 1978). A longer row is accepted
    only where it makes the dearest rank at least 1 % cheaper.

    Args:
        tokens: [n] integers, the tokens of each group of the batch; n >= 1, a few thousands at most.
        cost: [n] floats, the cost of each group in any unit, finite and >= 0; see `group_cost`.
        budget: the most tokens of a row, 1..2^31-1.
        ranks: the number of data parallel ranks, 1..65536.

    Returns:
        `plan[rank][row]`, an int64 array of rising group indices. Every group occurs exactly once. All ranks have m
        rows, by falling token count. Rows are empty only where n < ranks * m.

    Raises:
        DataError: as for `pack_rows`, or a cost is negative or not finite, or there is not one cost a group.
        ConfigError: `budget` or `ranks` is out of range.
    """
    costs = np.asarray(cost)
    if costs.size and costs.dtype.kind not in "iuf":
        raise DataError(f"cost has dtype {costs.dtype}; fix: give real numbers, such as those of group_cost()")
    costs = np.ascontiguousarray(costs, dtype=np.float64)
    return _extension().pack_batch(_integers("tokens", tokens), costs, _limit("budget", budget), _limit("ranks", ranks))


def group_tokens(
    prompt_lengths: ArrayLike, response_lengths: ArrayLike, offsets: ArrayLike, *, prefix_sharing: bool
) -> IntArray:
    """The tokens that each group occupies in a row, [n] int64.

    A group with a prompt of P and responses of R_i tokens has P + sum R_i of them with prefix sharing, and
    sum (P + R_i) without. Arguments and errors as for `group_cost`.
    """
    return _extension().group_tokens(*_lengths(prompt_lengths, response_lengths, offsets), bool(prefix_sharing))


def group_cost(
    prompt_lengths: ArrayLike,
    response_lengths: ArrayLike,
    offsets: ArrayLike,
    *,
    linear_cost: float,
    attention_cost: float,
    prefix_sharing: bool,
) -> FloatArray:
    """The cost of each group, [n] float64: `linear_cost` a computed token plus `attention_cost` an attended pair.

    A pair is a query and a key that it may see. With a prompt of P and responses of R_i tokens there are
    P(P+1)/2 + sum (R_i P + R_i(R_i+1)/2) of them with prefix sharing (a response sees the whole prompt and its own
    earlier tokens), and sum L_i(L_i+1)/2 with L_i = P + R_i without. Counts are exact below 2^53.

    Args:
        prompt_lengths: [n] integers, P of each group.
        response_lengths: [R] integers, the responses of all groups one after the other.
        offsets: [n+1] integers: the responses of group i are those from offsets[i] to offsets[i+1].
        linear_cost: cost of a token in everything but the attention scores (for FLOPs: 2 x active parameters).
        attention_cost: cost of a pair (for FLOPs: 4 x layers x heads x head size).
        prefix_sharing: whether a row holds a prompt once, or once a response.

    Raises:
        DataError: a length is negative or above 2^31-1, or `offsets` does not fit the lengths.
        ConfigError: a cost is negative or not finite.
    """
    lengths = _lengths(prompt_lengths, response_lengths, offsets)
    return _extension().group_cost(*lengths, float(linear_cost), float(attention_cost), bool(prefix_sharing))


@cache
def _extension() -> ModuleType:
    # At the first call, not at import: what needs no packing must work in a tree that was never built.
    try:
        return importlib.import_module("megafuse.kernels._C")
    except ImportError as error:
        raise MegafuseError(
            f"the compiled packer megafuse.kernels._C cannot be loaded ({error}); "
            "fix: run `pip install -e .` in the repository, which needs a C++17 compiler"
        ) from error


def _integers(name: str, values: ArrayLike) -> IntArray:
    array: NDArray[Any] = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise DataError(f"{name} has dtype {array.dtype}; fix: give integers, since a cast would round lengths")
    return np.ascontiguousarray(array, dtype=np.int64)


def _lengths(prompt: ArrayLike, response: ArrayLike, offsets: ArrayLike) -> tuple[IntArray, IntArray, IntArray]:
    return (
        _integers("prompt_lengths", prompt),
        _integers("response_lengths", response),
        _integers("offsets", offsets),
    )


def _limit(name: str, value: int) -> int:
    number = operator.index(value)
    if abs(number) >= 2**63:  # what the extension could not even be given; it checks the range itself
        raise ConfigError(f"{name} is {number}; fix: give a number that a row or a cluster can have")
    return number
