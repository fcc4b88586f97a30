"""Kernels: the weights of a projection, dense, in nested codes or both, behind one contract."""

import math
import os
from dataclasses import dataclass
from typing import Protocol, TypeGuard, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qs_jax.choices import FULL
from qs_jax.lanes import lanes_for, multiply_in_lanes
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.sharding import mesh_of

Tree = TypeVar("Tree")

_FEW_ROWS = 64
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@runtime_checkable
class Kernel(Protocol):
    """Weights (outputs, inputs), however they are stored. All that models, engine and ledger know of them."""

    @property
    def size(self) -> int:
        """Number of weights."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        ...

    def at(self, bits: int | Int[Array, " batch"]) -> "Kernel":
        """The same weights read at 8, 4 or 2 bits: for all rows, or for each row of the batch its own."""
        ...

    def matmul(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        """`x @ weights.T`, with float32 sums whatever the operands, in float32."""
        ...

    def rows(self, outputs: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of the weights, as an embedding looks them up; ids beyond the last give the last."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseKernel:
    """Plain weights; there is one precision at which they can be read."""

    weights: Float[Array, "outputs inputs"]

    @property
    def size(self) -> int:
        return self.weights.size

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    def at(self, bits: int | Int[Array, " batch"]) -> "DenseKernel":
        return self

    def matmul(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        """Arranged on CPU for how many rows there are (measured in benchmarks/kernel_layout.py); plain on a mesh, where
        the partitioner cuts it."""
        rows = x.reshape(-1, x.shape[-1])
        if mesh_of((rows, self.weights)) is not None:
            y = _multiply(rows, self.weights)
        else:
            y = jax.lax.platform_dependent(rows, self.weights, cpu=_multiply_on_cores, default=_multiply)
        return y.reshape(*x.shape[:-1], self.weights.shape[0])

    def rows(self, outputs: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        return jnp.take(self.weights, outputs, axis=0, mode="clip")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TwofoldKernel:
    """Dense weights, and codes of the same beside them: dense until some bits are asked for, then codes alone.

    So a model is read as it was trained and drafts for itself at fewer bits; what nobody reads costs memory only.
    """

    weights: Float[Array, "outputs inputs"]
    codes: NestedKernel

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape

    @property
    def ndim(self) -> int:
        return self.weights.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.weights.dtype

    @property
    def size(self) -> int:
        return self.weights.size

    @property
    def nbytes(self) -> int:
        """Those of the dense weights."""
        return self.weights.nbytes

    def at(self, bits: int | Int[Array, " batch"]) -> NestedKernel:
        """The codes, read at `bits`; 8 is all of a code, not the dense weights.

        Raises:
            ValueError: a number other than 8, 4 or 2.
        """
        return self.codes.at(bits)

    def matmul(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        return DenseKernel(self.weights).matmul(x)

    def rows(self, outputs: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        return DenseKernel(self.weights).rows(outputs)


Coded = NestedKernel | TwofoldKernel
"""Kernels that can be read at 8, 4 or 2 bits."""


def as_kernel(stored: Float[Array, "outputs inputs"] | Coded) -> Kernel:
    """What a parameter holds, as a kernel: the one place that tells dense weights from codes."""
    return stored if isinstance(stored, Coded) else DenseKernel(stored)


def _multiply(x: Float[Array, "rows inputs"], weights: Float[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    return jax.lax.dot_general(x, weights, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _multiply_on_cores(
    x: Float[Array, "rows inputs"], weights: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """A handful of rows go through a product batched over one block of outputs per core.

    XLA's CPU backend divides a small product badly among cores; a batch it divides well, and reads the weights up
    to twice as fast. Prefill-sized products are better left whole. One row of a narrower type than float32 goes as two:
    a product of one is not among those the backend has a kernel for. Few rows may go in lanes (`qs_jax.lanes`).
    """
    outputs, inputs = weights.shape
    if lanes := lanes_for(x.shape[0], weights):
        return multiply_in_lanes(x, weights, lanes)
    blocks = math.gcd(outputs, 1 << (_CORES.bit_length() - 1))
    rows = x.shape[0]
    if rows == 1 and x.dtype != jnp.float32:
        x = jnp.concatenate([x, x])
    if rows > _FEW_ROWS or blocks == 1:
        return _multiply(x, weights)[:rows]
    spread = jnp.broadcast_to(x, (blocks, *x.shape))
    weights = weights.reshape(blocks, outputs // blocks, inputs)
    y = jnp.einsum("nri,noi->rno", spread, weights, preferred_element_type=jnp.float32)
    return y.reshape(x.shape[0], outputs)[:rows]


def is_nested(leaf: object) -> TypeGuard[NestedKernel]:
    """Whether a weight is codes and nothing else."""
    return isinstance(leaf, NestedKernel)


def _is_coded(leaf: object) -> TypeGuard[Coded]:
    """Keeps kernels whole where a module is taken apart."""
    return isinstance(leaf, Coded)


def weights(module: object) -> list[Array | Coded]:
    """Every weight of a module or kernel, kernels with codes whole."""
    return jax.tree.leaves(module, is_leaf=_is_coded)


def at_bits(module: Tree, bits: int | Int[Array, " batch"]) -> Tree:
    """A copy of a module (a block, a whole model) whose codes are read at `bits`; weights are shared.

    Args:
        module: any pytree; one without codes comes back unchanged.
        bits: 8, 4 or 2 for every row, or an array with one of these per row of the batch.

    Raises:
        ValueError: a number other than 8, 4 or 2.
    """
    return jax.tree.map(lambda leaf: leaf.at(bits) if _is_coded(leaf) else leaf, module, is_leaf=_is_coded)


def has_planes(module: object) -> bool:
    """Whether a module has kernels that can be read at several precisions."""
    return any(map(_is_coded, jax.tree.leaves(module, is_leaf=_is_coded)))


def most_bits(module: nnx.Module) -> int:
    """Bits of a weight where nobody asks for fewer: those of a code where there are codes alone, else of the dense."""
    leaves = weights(module)
    kernels = [leaf for leaf in leaves if is_nested(leaf) or leaf.ndim > 1]  # what is read of others may be wider
    return FULL if any(map(is_nested, kernels)) else max(8 * leaf.dtype.itemsize for leaf in kernels)


def plane_bytes(module: object, bits: int | None) -> int:
    """Bytes of weights that a pass over a module, or one kernel, reads at `bits`: planes, their scales and offsets,
    dense leaves.

    None for the module as it stands, so that of kernels with dense weights and codes it is the dense ones.
    """
    return sum(leaf.nbytes for leaf in weights(module if bits is None else at_bits(module, bits)))
