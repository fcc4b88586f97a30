"""A few token ids on the device, in arrays of few lengths, so that another set compiles nothing."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Array, Bool, Int

_SLOTS = 8


def token_set(ids: Iterable[int]) -> Int[np.ndarray, " slots"]:
    """Token ids, padded with -1, which no token has, to a multiple of 8."""
    known = list(ids)
    return np.asarray([*known, *[-1] * (-len(known) % _SLOTS or (0 if known else _SLOTS))], np.int32)


def is_in(tokens: Int[Array, "*tokens"], ids: Int[Array | np.ndarray, " slots"]) -> Bool[Array, "*tokens"]:
    """Which tokens are of the set."""
    return (tokens[..., None] == ids).any(axis=-1)
