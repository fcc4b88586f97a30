"""Nested codes read at one precision: where a code stands, and the weights that come of it."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8, UInt8

from qs_jax.matryoshka.codec import BLOCK, Planes, unpack
from qs_jax.pytree import STATIC


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slice:
    """The `bits`-bit codes of a kernel, with their scales and offsets: all that a product at this precision reads."""

    planes: Planes
    scale: BFloat16[Array, "groups outputs"]
    offset: Int8[Array, "groups outputs"]
    bits: int = field(metadata=STATIC)
    bend: float = field(metadata=STATIC)

    @property
    def groups(self) -> int:
        return self.planes.high.shape[0]

    @property
    def group_size(self) -> int:
        return self.planes.high.shape[1] * BLOCK

    @property
    def outputs(self) -> int:
        return self.planes.high.shape[2]

    @property
    def offset_in_steps(self) -> Float[Array, "groups outputs"]:
        return offset_in_steps(self.offset, self.bits)

    def weights(self) -> Float[Array, "padded_inputs outputs"]:
        """The weights as their codes lie, padding included."""
        level = levels(unpack(self.planes, self.bits), self.bits, self.bend)
        return dequantised(level, self.scale, self.offset_in_steps).reshape(-1, self.outputs)


def dequantised(
    level: Float[Array, "groups group_size outputs"],
    scale: Float[Array, "groups outputs"],
    offset: Float[Array, "groups outputs"],
) -> Float[Array, "groups group_size outputs"]:
    """Weights of levels; the offset in steps of the scale."""
    return (level + offset[:, None]) * scale.astype(jnp.float32)[:, None]


def levels(codes: UInt8[Array, "*shape"], bits: int, bend: float) -> Float[Array, "*shape"]:
    """Where each code stands, in steps of the scale: evenly spaced around 0, and spread outwards by `bend`.

    t = c - (2**b - 1) / 2 becomes t + bend · t³ / (2**b / 2)²: a nested code then has narrow cells where weights are
    many and wide ones in the tails.
    """
    return bent(codes.astype(jnp.float32) - (2**bits - 1) / 2, bits, bend)


def bent(t: Float[Array, "*shape"], bits: int, bend: float) -> Float[Array, "*shape"]:
    """Evenly spaced levels around 0, spread outwards by `bend`."""
    return t if bend == 0.0 else t * (1.0 + bend / 4.0 ** (bits - 1) * t * t)


def straightened(y: Float[Array, "*shape"], bits: int, bend: float) -> Float[Array, "*shape"]:
    """The inverse of `bent`: the one real root of a cubic, by its hyperbolic form."""
    if bend == 0.0:
        return y
    p = 4.0 ** (bits - 1) / bend
    return 2 * math.sqrt(p / 3) * jnp.sinh(jnp.arcsinh(1.5 * math.sqrt(3 / p) * y) / 3)


def offset_in_steps(offsets: Int8[Array, "*shape"], bits: int) -> Float[Array, "*shape"]:
    """Stored offsets in steps of the slice's scale."""
    return offsets.astype(jnp.float32) * (2.0**bits / 256)
