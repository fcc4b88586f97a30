"""A quantised kernel: nested codes, and what turns them back into weights at every precision."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, Int8, UInt8, UInt16

from qs_jax.choices import BITS, FULL, not_among
from qs_jax.matryoshka.codec import BLOCK, Planes, pack
from qs_jax.matryoshka.product import multiply
from qs_jax.matryoshka.slices import Slice
from qs_jax.pytree import STATIC

SCALE_DTYPE = jnp.bfloat16

_FLOAT32 = jnp.dtype("float32")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NestedKernel:
    """Weights (outputs, inputs) as nested codes; stands wherever a plain kernel stands.

    At `b` bits, code c of a group with scale s and offset o reads as `s · (level(c) + o · 2**b / 256)`, where level(c)
    is c - (2**b - 1) / 2, bent by the codebook (`slices.levels`). Inputs are padded to whole groups. `scales` and
    `offsets` hold one row per entry of BITS.

    Attributes:
        shape: (outputs, inputs) of the weights.
        group_size: inputs that share a scale and an offset.
        bend: curvature of the codebook at each of BITS; zeros for evenly spaced levels.
        dtype: of the weights as they are read.
        least: fewest bits at which this kernel may be read, whatever is asked.
        bits: the precision at which it is read, where it is the same for all rows.
        row_bits: that of each row of the batch, in its place; traced.
    """

    high: UInt16[Array, "groups blocks outputs"]
    middle: UInt16[Array, "groups blocks outputs"]
    low: UInt16[Array, "groups twice_blocks outputs"]
    scales: BFloat16[Array, "slices groups outputs"]
    offsets: Int8[Array, "slices groups outputs"]
    shape: tuple[int, int] = field(metadata=STATIC)
    group_size: int = field(metadata=STATIC)
    bend: tuple[float, ...] = field(default=(0.0, 0.0, 0.0), metadata=STATIC)
    dtype: jnp.dtype = field(default=_FLOAT32, metadata=STATIC)
    least: int = field(default=2, metadata=STATIC)
    bits: int = field(default=FULL, metadata=STATIC)
    row_bits: Int[Array, " batch"] | None = None

    @property
    def ndim(self) -> int:
        return 2

    @property
    def size(self) -> int:
        """Number of weights, padding apart."""
        return math.prod(self.shape)

    @property
    def groups(self) -> int:
        return groups_of(self.shape[1], self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads at `bits`; where rows differ, at most."""
        weights = self.groups * self.group_size * self.shape[0]
        per_group = self.scales.dtype.itemsize + self.offsets.dtype.itemsize
        bits = FULL if self.row_bits is not None else self.bits
        return weights * bits // 8 + per_group * self.groups * self.shape[0]

    def at(self, bits: int | Int[Array, " batch"]) -> "NestedKernel":
        """The same weights, read at `bits` from now on: one number, or one per row of the batch.

        Raises:
            ValueError: a number other than 8, 4 or 2.
        """
        if self.least == FULL:
            bits = self.least
        if isinstance(bits, int):
            if bits not in BITS:
                raise ValueError(not_among("bits", bits, BITS))
            return replace(self, bits=max(bits, self.least), row_bits=None)
        return replace(self, bits=FULL, row_bits=jnp.maximum(bits, self.least))

    def slice(self, bits: int) -> Slice:
        """What is read at one precision."""
        number = BITS.index(bits)
        planes = Planes(self.high, self.middle, self.low)
        return Slice(planes, self.scales[number], self.offsets[number], bits, self.bend[number])

    def matmul(self, x: Float[Array, "*rows inputs"]) -> Float[Array, "*rows outputs"]:
        """`x @ weights.T` at the kernel's precision, in float32; where that is per row, rows are those of x's first
        axis.

        A batch of mixed precisions costs one product for each that occurs, a uniform one exactly one.
        """
        rows = self.padded(x.reshape(-1, x.shape[-1]))
        y = multiply(rows, self.slice(self.bits)) if self.row_bits is None else self._mixed(rows, x.shape[0])
        return y.reshape(*x.shape[:-1], self.shape[0])

    def _mixed(self, rows: Float[Array, "rows padded_inputs"], batch: int) -> Float[Array, "rows outputs"]:
        """One product for each precision that some row of the batch asks for."""
        assert self.row_bits is not None
        wanted = jnp.repeat(self.row_bits, rows.shape[0] // batch, total_repeat_length=rows.shape[0])
        y = jnp.zeros((rows.shape[0], self.shape[0]), jnp.float32)
        for bits in BITS[: BITS.index(self.least) + 1]:
            mine = wanted == bits
            y = jax.lax.cond(
                mine.any(),
                lambda y, mine, bits=bits: jnp.where(mine[:, None], multiply(rows, self.slice(bits)), y),
                lambda y, mine: y,
                y,
                mine,
            )
        return y

    def dequantise(self, bits: int) -> Float[Array, "outputs inputs"]:
        """The weights at `bits`, in `dtype`: the plain reference for every faster product."""
        return self.slice(bits).weights().astype(self.dtype).T[:, : self.shape[1]]

    def padded(self, x: Float[Array, "rows inputs"]) -> Float[Array, "rows padded_inputs"]:
        """Rows with zeros for the padding."""
        return jnp.pad(x, ((0, 0), (0, self.groups * self.group_size - self.shape[1])))

    def rows(self, outputs: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of the weights at `bits`, as an embedding looks them up."""
        codes = self.slice(self.bits)
        take = partial(jnp.take, indices=outputs.reshape(-1), axis=-1, mode="clip")
        few = jax.tree.map(take, codes)
        return few.weights().astype(self.dtype).T[:, : self.shape[1]].reshape(*outputs.shape, -1)


def groups_of(inputs: int, group_size: int) -> int:
    """Groups that hold all inputs, the last one padded."""
    return -(-inputs // group_size)


def nested_kernel(
    codes: UInt8[Array, "groups group_size outputs"],
    scales: Float[Array, "slices groups outputs"],
    offsets: Int8[Array, "slices groups outputs"],
    *,
    inputs: int,
    bend: tuple[float, ...] = (0.0, 0.0, 0.0),
    least: int = BITS[-1],
) -> NestedKernel:
    """Pack codes into a kernel; `inputs` is the number of inputs without padding."""
    _, group_size, outputs = codes.shape
    return NestedKernel(
        *pack(codes),
        scales=scales.astype(SCALE_DTYPE),
        offsets=offsets,
        shape=(outputs, inputs),
        group_size=group_size,
        bend=bend,
        least=least,
    )


def abstract_kernel(shape: tuple[int, int], group_size: int) -> NestedKernel:
    """A kernel with shapes in place of arrays."""
    outputs, inputs = shape
    groups, blocks = groups_of(inputs, group_size), group_size // BLOCK

    def words(count: int) -> Any:
        return jax.ShapeDtypeStruct((groups, count, outputs), jnp.uint16)

    def per_group(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((len(BITS), groups, outputs), dtype)

    arrays = words(blocks), words(blocks), words(2 * blocks), per_group(SCALE_DTYPE), per_group(jnp.int8)
    return NestedKernel(*arrays, shape=shape, group_size=group_size)
