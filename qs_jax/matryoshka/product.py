"""A product with codes of one precision: streamed on CPU where rows are few, else with weights written out."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.matryoshka.slices import Slice
from qs_jax.matryoshka.streaming import FEW_ROWS, SOME_ROWS, multiply_groups, multiply_streams
from qs_jax.outline import outlined

Rows = Float[Array, "rows padded_inputs"]
Result = Float[Array, "rows outputs"]

_LARGE = 2**19
"""Weights of a kernel from which on the CPU reads codes instead of writing out weights first."""


def multiply(x: Rows, codes: Slice) -> Result:
    """`x @ weights`, in float32. Small kernels lie in cache anyway; streaming them would only take long to compile.

    Written out in a narrower type than float32, weights cost half, and the CPU multiplies them faster.
    """
    streamed = SOME_ROWS if x.dtype == jnp.float32 else FEW_ROWS
    if x.shape[1] * codes.outputs < _LARGE or x.shape[0] > streamed:
        return _multiply(x, codes)
    stream = _streams if x.shape[0] <= FEW_ROWS else multiply_groups
    return jax.lax.platform_dependent(x, codes, cpu=stream, default=_multiply)


_streams = outlined(multiply_streams)


def _multiply(x: Rows, codes: Slice) -> Result:
    """Weights are written out first, but not before the rows are there.

    What depends on codes alone the compiler may do at any time: it would write out the weights of all layers at once.
    So scales wait for the rows, by a condition that never holds. XLA's CPU backend drops a barrier.
    """
    codes = replace(codes, scale=jnp.where(x[0, 0] > jnp.inf, jnp.nan, codes.scale))
    weights = codes.weights().astype(x.dtype)
    return jax.lax.dot_general(x, weights, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
