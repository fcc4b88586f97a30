"""Products of one row or a few with weights as they lie in memory, on CPUs whose backend has no good kernel for them.

XLA multiplies one row of float32 at the speed of memory. For two to five it packs the weights first, and for bfloat16
it has kernels only where the CPU multiplies tiles (AMX): elsewhere those read 9 GB/s of 26. Here every `lanes`-th input
of an output goes into the same lane of a vector, and lanes are summed by a product with ones. (`python -m
benchmarks.few_rows` measures both.) Wider kernels than the limits below gained nothing (docs/tried.md).

What the compiler must be kept from (jax 0.10, CPU): slices of narrow floats are taken as float32, all weights written
out for it, so that they are turned into integers before they are cut; and equal products are compiled once
(`outlined`), or the program takes four times as long to compile.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.outline import outlined

_WORTH_IT = 2**16
"""Weights of a kernel from which on its reading matters."""

_FLOAT32_ROWS = range(2, 6)
_FLOAT32_LANES, _FLOAT32_TERMS = (16,), 48
_BFLOAT16_ROWS = range(1, 3)
_BFLOAT16_LANES, _BFLOAT16_TERMS = (64, 96), 16


def lanes_for(rows: int, weights: Float[Array, "outputs inputs"]) -> int | None:
    """How many lanes suit a product of so many rows; None if the backend's own is better."""
    if weights.size < _WORTH_IT:
        return None
    if weights.dtype == jnp.float32 and rows in _FLOAT32_ROWS:
        return _fitting(weights.shape[1], _FLOAT32_LANES, _FLOAT32_TERMS)
    if weights.dtype == jnp.bfloat16 and rows in _BFLOAT16_ROWS and not _multiplies_tiles():
        return _fitting(weights.shape[1], _BFLOAT16_LANES, _BFLOAT16_TERMS)
    return None


def multiply_in_lanes(
    x: Float[Array, "rows inputs"], weights: Float[Array, "outputs inputs"], lanes: int
) -> Float[Array, "rows outputs"]:
    """`x @ weights.T` in float32; `lanes` divides the inputs."""
    return _outlined(x.astype(jnp.float32).reshape(x.shape[0], -1, lanes), weights)


@outlined
def _outlined(
    x: Float[Array, "rows terms lanes"], weights: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    rows, terms, lanes = x.shape
    outputs, narrow = weights.shape[0], weights.dtype == jnp.bfloat16
    cut = (jax.lax.bitcast_convert_type(weights, jnp.uint16) if narrow else weights).reshape(outputs, terms, lanes)

    def term(number: int) -> Float[Array, "outputs rows lanes"]:
        part = cut[:, None, number]
        if narrow:  # a bfloat16 is the upper half of a float32
            part = jax.lax.bitcast_convert_type(part.astype(jnp.uint32) << 16, jnp.float32)
        return x[None, :, number] * part

    total = term(0)
    for number in range(1, terms):
        total += term(number)
    return (total.reshape(outputs * rows, lanes) @ jnp.ones(lanes)).reshape(outputs, rows).T


def _fitting(inputs: int, choices: tuple[int, ...], most_terms: int) -> int | None:
    return next((lanes for lanes in choices if inputs % lanes == 0 and inputs // lanes <= most_terms), None)


@cache
def _multiplies_tiles() -> bool:
    """Whether this CPU multiplies tiles of bfloat16; said to be so where it cannot be known."""
    facts = Path("/proc/cpuinfo")
    return not facts.is_file() or "avx" not in (text := facts.read_text("utf-8")) or "amx_bf16" in text
