"""Nested integer codes: one 8-bit code per weight, of which the top 4 or top 2 bits are codes in their own right.

Codes live in three *planes*, of 2, 2 and 4 bits from the top, each packed in 32-bit words, so that a coarser reading
touches fewer bytes. Everything here is integer arithmetic and exact.

Codes are grouped along a kernel's inputs and outputs come last, (groups, group_size, outputs); planes are
(groups, words, outputs). Within a block of 16 inputs, the 2-bit code of input i lies at bits 2i and 2i + 1 of one
word; the low 4 bits of even inputs lie in order in the nibbles of one word, those of odd inputs in the next. So
two masks and a shift turn words of the upper planes into words of whole 4-bit codes, and those with words of the
lower plane into whole 8-bit ones.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

BITS = (8, 4, 2)
"""The precisions at which codes can be read, finest first."""

BLOCK = 16
"""Inputs that share a word of a 2-bit plane; groups are multiples of it."""

Codes = UInt8[Array, "groups group_size outputs"]
Words = UInt32[Array, "groups words outputs"]


class Planes(NamedTuple):
    """Bits 7-6, 5-4 and 3-0 of every code. Empty words stand for a plane that was not read."""

    high: UInt32[Array, "groups blocks outputs"]
    middle: UInt32[Array, "groups blocks outputs"]
    low: UInt32[Array, "groups twice_blocks outputs"]


def slice_of(codes: Codes, bits: int) -> Codes:
    """The `bits`-bit codes: the top bits of the 8-bit ones."""
    return codes >> (8 - bits)


def pack(codes: Codes) -> Planes:
    """The three planes of 8-bit codes.

    Raises:
        ValueError: the group size is not a multiple of 16.
    """
    groups, group_size, outputs = codes.shape
    if group_size % BLOCK:
        raise ValueError(f"group size {group_size} is not a multiple of {BLOCK}")
    blocks = codes.astype(jnp.uint32).reshape(groups, group_size // BLOCK, BLOCK, outputs)
    nibble = (blocks & 15).reshape(groups, -1, BLOCK // 2, 2, outputs).swapaxes(2, 3)
    return Planes(
        high=_join(blocks >> 6, 2),
        middle=_join((blocks >> 4) & 3, 2),
        low=_join(nibble.reshape(groups, -1, BLOCK // 2, outputs), 4),
    )


def unpack(planes: Planes, bits: int) -> Codes:
    """The `bits`-bit codes that `pack` stored; reads only the planes they need."""
    high, (groups, _, outputs) = _split(planes.high, 2), planes.high.shape
    if bits == 2:
        return high.reshape(groups, -1, outputs).astype(jnp.uint8)
    upper = high << 2 | _split(planes.middle, 2)
    if bits == 4:
        return upper.reshape(groups, -1, outputs).astype(jnp.uint8)
    low = _split(planes.low, 4).reshape(groups, -1, 2, BLOCK // 2, outputs).swapaxes(2, 3)
    codes = upper << 4 | low.reshape(upper.shape)
    return codes.reshape(groups, -1, outputs).astype(jnp.uint8)


def _join(codes: UInt32[Array, "groups words per_word outputs"], bits: int) -> Words:
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)[:, None]
    return (codes << shifts).sum(axis=2, dtype=jnp.uint32)


def _split(words: Words, bits: int) -> UInt32[Array, "groups words per_word outputs"]:
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)[:, None]
    return words[:, :, None] >> shifts & (2**bits - 1)
