"""Products with nested kernels, and the precision at which a whole module reads them."""

from dataclasses import replace
from functools import partial
from typing import TypeGuard, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qs_jax.choices import BITS
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.matryoshka.streaming import FEW_ROWS, SOME_ROWS, multiply_groups, multiply_streams

Tree = TypeVar("Tree")

Rows = Float[Array, "rows inputs"]
Result = Float[Array, "rows outputs"]
_LARGE = 2**19
"""Weights of a kernel from which on the CPU reads codes instead of writing out weights first."""


def at_bits(module: Tree, bits: int | Int[Array, " batch"]) -> Tree:
    """A copy of a module (a block, a whole model) whose nested kernels are read at `bits`; weights are shared.

    Args:
        module: any pytree; one without nested kernels comes back unchanged.
        bits: 8, 4 or 2 for every row, or an array with one of these per row of the batch.

    Raises:
        ValueError: a number other than 8, 4 or 2.
    """
    return jax.tree.map(lambda leaf: leaf.at(bits) if is_nested(leaf) else leaf, module, is_leaf=is_nested)


def has_planes(module: object) -> bool:
    """Whether a module has kernels that can be read at several precisions."""
    return any(map(is_nested, jax.tree.leaves(module, is_leaf=is_nested)))


def plane_bytes(module: nnx.Module, bits: int) -> int:
    """Bytes of weights that a pass over the module reads at `bits`: planes, their scales and offsets, dense leaves."""
    return sum(leaf.at(bits).nbytes if is_nested(leaf) else leaf.nbytes for leaf in weights(module))


def weights(module: nnx.Module) -> list[Array | NestedKernel]:
    """Every weight of a module, nested kernels whole."""
    return jax.tree.leaves(module, is_leaf=is_nested)


def is_nested(leaf: object) -> TypeGuard[NestedKernel]:
    return isinstance(leaf, NestedKernel)


def nested_product(x: Float[Array, "*rows inputs"], kernel: NestedKernel) -> Float[Array, "*rows outputs"]:
    """`x @ weights.T` at the kernel's precision, in float32; where that is per row, rows are those of x's first axis.

    A batch of mixed precisions costs one product for each that occurs, a uniform one exactly one.
    """
    rows = x.reshape(-1, x.shape[-1])
    if kernel.row_bits is None:
        y = _product(rows, kernel, kernel.bits)
    else:
        wanted = jnp.repeat(kernel.row_bits, rows.shape[0] // x.shape[0], total_repeat_length=rows.shape[0])
        y = jnp.zeros((rows.shape[0], kernel.shape[0]), jnp.float32)
        for bits in BITS[: BITS.index(kernel.least) + 1]:
            mine = wanted == bits
            y = jax.lax.cond(
                mine.any(),
                lambda y, mine, bits=bits: jnp.where(mine[:, None], _product(rows, kernel, bits), y),
                lambda y, mine: y,
                y,
                mine,
            )
    return y.reshape(*x.shape[:-1], kernel.shape[0])


def _product(x: Rows, kernel: NestedKernel, bits: int) -> Result:
    """One precision for all rows. Small kernels lie in cache anyway; streaming them would only take long to compile.

    Written out in a narrower type than float32, weights cost half, and the CPU multiplies them faster.
    """
    streamed = SOME_ROWS if x.dtype == jnp.float32 else FEW_ROWS
    if kernel.size < _LARGE or x.shape[0] > streamed:
        return _multiply(x, kernel, bits)
    stream = multiply_streams if x.shape[0] <= FEW_ROWS else multiply_groups
    return jax.lax.platform_dependent(x, kernel, cpu=partial(stream, bits=bits), default=partial(_multiply, bits=bits))


def _multiply(x: Rows, kernel: NestedKernel, bits: int) -> Result:
    """Weights are written out first, but not before the rows are there.

    What depends on codes alone the compiler may do at any time: it would write out the weights of all layers at once.
    So scales wait for the rows, by a condition that never holds. XLA's CPU backend drops a barrier.
    """
    kernel = replace(kernel, scales=jnp.where(x[0, 0] > jnp.inf, jnp.nan, kernel.scales))
    weights = kernel.by_input(bits).astype(x.dtype)
    return jax.lax.dot_general(kernel.padded(x), weights, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
