"""A product with codes of one precision: streamed on CPU where rows are few, else with weights written out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qs_jax.matryoshka.slices import Slice
from qs_jax.matryoshka.streaming import FEW_ROWS, multiply_streams
from qs_jax.outline import outlined
from qs_jax.sharding import mesh_of

Rows = Float[Array, "rows padded_inputs"]
Result = Float[Array, "rows outputs"]

_TINY = 2**16
"""Weights of a kernel below which streaming would only take long to compile."""

_IN_CACHE = 2**21
"""Weights that are written out at once: 8 MB as float32. More would go through memory."""

_LANES = 64
"""Outputs that a block is a multiple of."""

_SOME_ROWS = 64
"""Beyond so many a whole product is faster than blocks of one."""


def multiply(x: Rows, codes: Slice) -> Result:
    """`x @ weights`, in float32.

    Written out in a narrower type than float32, weights cost half, and the CPU multiplies them faster.
    """
    if mesh_of((x, codes)) is not None:
        return _product(*jax.lax.optimization_barrier((x, codes)))
    rows, size = x.shape[0], x.shape[1] * codes.outputs
    if rows <= FEW_ROWS and size >= _TINY:
        return jax.lax.platform_dependent(x, codes, cpu=_streams, default=_multiply)
    if rows <= _SOME_ROWS and size > _IN_CACHE:
        return jax.lax.platform_dependent(x, codes, cpu=_multiply_blocks, default=_multiply)
    return _multiply(x, codes)


_streams = outlined(multiply_streams)


def _multiply_blocks(x: Rows, codes: Slice) -> Result:
    """Block by block of outputs, so that weights are multiplied from where they were just written.

    The last block ends with the last output, and so may say once more what the one before it said.
    """
    outputs = codes.outputs
    count = -(-x.shape[1] * outputs // _IN_CACHE)
    size = min(outputs, _LANES * -(-outputs // (count * _LANES)))

    def block(y: Result, start: Int[Array, ""]) -> tuple[Result, None]:
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=-1)
        part = _multiply(x, jax.tree.map(cut, codes))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=1), None

    starts = jnp.minimum(size * jnp.arange(-(-outputs // size), dtype=jnp.int32), outputs - size)
    return jax.lax.scan(block, jnp.zeros((x.shape[0], outputs), jnp.float32), starts)[0]


def _multiply(x: Rows, codes: Slice) -> Result:
    """Weights are written out first, but not before the rows are there.

    What depends on codes alone the compiler may do at any time: it would write out the weights of all layers at once.
    So scales wait for the rows, by a condition that never holds. XLA's CPU backend drops a barrier; on a mesh there is
    one all the same, as one number of the rows would have to go to every device.
    """
    return _product(x, replace(codes, scale=jnp.where(x[0, 0] > jnp.inf, jnp.nan, codes.scale)))


def _product(x: Rows, codes: Slice) -> Result:
    """With weights written out first."""
    weights = codes.weights().astype(x.dtype)
    return jax.lax.dot_general(x, weights, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
