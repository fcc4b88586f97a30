"""Nested integer codes: one 8-bit code per weight, of which the top 4 or top 2 bits are codes in their own right.

Codes live in three *planes*, of 2, 2 and 4 bits from the top, each packed in 16-bit words, so that a coarser reading
touches fewer bytes. Everything here is integer arithmetic and exact.

Codes are grouped along a kernel's inputs and outputs come last, (groups, group_size, outputs); planes are
(groups, words, outputs). Within a block of 8 inputs, the 2-bit code of input i lies at bits 2i and 2i + 1 of one
word; the low 4 bits of even inputs lie in order in the nibbles of one word, those of odd inputs in the next. So
two masks and a shift turn words of the upper planes into words of whole 4-bit codes, and those with words of the
lower plane into whole 8-bit ones. Words have 16 bits so that a masked word is a float32 exactly, by the signed
conversion that every CPU has.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt16, UInt32

BLOCK = 8
"""Inputs that share a word of a 2-bit plane; groups are multiples of it."""

WORD = 16
"""Bits of a word."""

Codes = UInt8[Array, "groups group_size outputs"]
Words = UInt16[Array, "groups words outputs"]


class Planes(NamedTuple):
    """Bits 7-6, 5-4 and 3-0 of every code."""

    high: UInt16[Array, "groups blocks outputs"]
    middle: UInt16[Array, "groups blocks outputs"]
    low: UInt16[Array, "groups twice_blocks outputs"]


class Packed(NamedTuple):
    """Words of whole codes, one for each block; from the lowest bits up, codes belong to these inputs of the block."""

    words: UInt16[Array, "groups blocks outputs"]
    inputs: tuple[int, ...]


def slice_of(codes: Codes, bits: int) -> Codes:
    """The `bits`-bit codes: the top bits of the 8-bit ones."""
    return codes >> (8 - bits)


def pack(codes: Codes) -> Planes:
    """The three planes of 8-bit codes.

    Raises:
        ValueError: the group size is not a multiple of 8.
    """
    groups, group_size, outputs = codes.shape
    if group_size % BLOCK:
        raise ValueError(f"group size {group_size} is not a multiple of {BLOCK}")
    blocks = codes.astype(jnp.uint16).reshape(groups, group_size // BLOCK, BLOCK, outputs)
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


def packed_codes(planes: Planes, bits: int) -> tuple[Packed, ...]:
    """The `bits`-bit codes still packed, whatever a word holds: the same codes as `unpack`, two masks and a shift each.

    Every operation works on whole words, so that it can be one pass over the planes in registers.
    """
    if bits == 2:
        return (Packed(planes.high, tuple(range(BLOCK))),)
    even = (planes.high & _u16(0x3333)) << 2 | (planes.middle & _u16(0x3333))
    odd = (planes.high & _u16(0xCCCC)) | (planes.middle & _u16(0xCCCC)) >> 2
    if bits == 4:
        return Packed(even, (0, 2, 4, 6)), Packed(odd, (1, 3, 5, 7))
    whole: list[Packed] = []
    for first, (upper, lower) in enumerate(((even, planes.low[:, 0::2]), (odd, planes.low[:, 1::2]))):
        whole.append(Packed((upper & _u16(0x0F0F)) << 4 | (lower & _u16(0x0F0F)), (first, first + 4)))
        whole.append(Packed((upper & _u16(0xF0F0)) | (lower & _u16(0xF0F0)) >> 4, (first + 2, first + 6)))
    return tuple(whole)


def _u16(value: int) -> UInt16[Array, ""]:
    return jnp.uint16(value)


def _join(codes: UInt16[Array, "groups words per_word outputs"], bits: int) -> Words:
    shifts = jnp.arange(0, WORD, bits, dtype=jnp.uint16)[:, None]
    return (codes << shifts).sum(axis=2, dtype=jnp.uint16)


def _split(words: Words, bits: int) -> UInt32[Array, "groups words per_word outputs"]:
    shifts = jnp.arange(0, WORD, bits, dtype=jnp.uint32)[:, None]
    return words[:, :, None].astype(jnp.uint32) >> shifts & (2**bits - 1)
