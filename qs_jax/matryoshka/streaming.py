"""Products of few rows with a large nested kernel on CPU: codes become weights in registers or cache, never in memory.

Decoding is bound by reading weights, so that bits save time only where the weights are not written out as floats on
the way; that alone costs more than a dense product reads (a fresh 64 MB buffer for 4096 x 4096 takes 40 ms, mostly for
its pages). Measured in benchmarks/quantized_decode.py.

What the compiler must not do here, and how it is kept from it (jax 0.10, CPU):

* sums of many terms go to YNNPACK, which takes operands from memory: the reduction is written in a form it does not
  know (`_sum`);
* a sum of 32 spans or fewer swallows the loop that makes its terms, which is then no longer vectorised (13 times
  slower for 768 inputs): spans are summed by a product with ones, which reads them from memory;
* what depends on weights alone is moved out of the decoding loop and kept, as floats: a barrier ties the planes to
  the rows.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.choices import BITS
from qs_jax.matryoshka.codec import BLOCK, Planes, packed_codes, unpack
from qs_jax.matryoshka.kernel import NestedKernel, bent, dequantised, levels, offset_in_steps

Rows = Float[Array, "rows inputs"]
Result = Float[Array, "rows outputs"]

FEW_ROWS = 4
"""Up to this many rows each pay for their own decoding of the codes."""

SOME_ROWS = 64
"""Up to this many go through groups of weights decoded into cache; beyond it a whole dense product is faster."""

_PART = 128
"""Inputs whose weights are decoded into cache at once; twice as many leave it."""

_SPAN = 64
_CHAINS = 2


def multiply_streams(x: Rows, kernel: NestedKernel, bits: int) -> Result:
    """`x @ weights.T` in one pass over the planes, for `FEW_ROWS` rows at most.

    Every output is a vector lane. Within a span of inputs a masked word, converted as it is, holds its code times a
    power of 4 (16, 256), which the input takes back; both are exact. Spans are summed in the end.
    """
    kernel, x = jax.lax.optimization_barrier((kernel, x.astype(jnp.float32)))
    slice_, groups, outputs = BITS.index(bits), kernel.groups, kernel.shape[0]
    bend = kernel.bend[slice_]
    scale = kernel.scales[slice_].astype(jnp.float32)[:, None]
    offset = offset_in_steps(kernel.offsets[slice_], bits)[:, None]
    if bend == 0.0:
        offset -= (2**bits - 1) / 2
    span = math.gcd(kernel.group_size, _SPAN)
    spans = kernel.group_size // span
    cut = Planes(*(plane.reshape(groups * spans, -1, outputs) for plane in kernel.planes))
    results = []
    for row in kernel.padded(x).reshape(x.shape[0], groups * spans, span):
        products = _span_products(row, cut, bits, bend).reshape(groups, spans, outputs)
        total = _sum(row, (1,)).reshape(groups, spans, 1)
        of_groups = ((products + offset * total) * scale).reshape(groups * spans, outputs)
        results.append(jnp.ones(groups * spans) @ of_groups)
    return jnp.stack(results)


def _span_products(
    row: Float[Array, "spans span"], planes: Planes, bits: int, bend: float
) -> Float[Array, "spans outputs"]:
    """Codes (or, where they are bent, levels) times inputs, summed over each span in chains of additions.

    One chain would wait for every addition in turn.
    """
    chains: list[Float[Array, "spans outputs"]] = []
    for block in range(row.shape[1] // BLOCK):
        cut = Planes(*(plane[:, n * block : n * (block + 1)] for plane, n in zip(planes, (1, 1, 2), strict=True)))
        for words, inputs_of in packed_codes(cut, bits):
            for place, i in enumerate(inputs_of):
                mask, unit = (2**bits - 1) << (bits * place), 2.0 ** (-bits * place)
                level = (words[:, 0] & jnp.uint16(mask)).astype(jnp.int32).astype(jnp.float32)
                inputs = row[:, BLOCK * block + i, None]
                if bend:
                    term = bent(level * unit - (2**bits - 1) / 2, bits, bend) * inputs
                else:
                    term = level * (inputs * unit)
                if len(chains) < _CHAINS:
                    chains.append(term)
                else:
                    chains = [*chains[1:], chains[0] + term]
    while len(chains) > 1:
        chains = [*chains[2:], chains[0] + chains[1]]
    return chains[0]


def multiply_groups(x: Rows, kernel: NestedKernel, bits: int) -> Result:
    """`x @ weights.T` part by part: weights of a few groups of inputs, in cache, times those inputs of every row."""
    slice_ = BITS.index(bits)
    together = math.gcd(kernel.groups, max(1, _PART // kernel.group_size))
    parts = kernel.groups // together
    rows = kernel.padded(x.astype(jnp.float32)).reshape(x.shape[0], parts, -1).swapaxes(0, 1)

    def add(y: Result, part: tuple[Rows, Planes, Array, Array]) -> tuple[Result, None]:
        rows, planes, scale, offset = part
        level = levels(unpack(planes, bits), bits, kernel.bend[slice_])
        weights = dequantised(level, scale, offset_in_steps(offset, bits)).reshape(rows.shape[1], -1)
        return y + jax.lax.dot_general(rows, weights, (((1,), (0,)), ((), ()))), None

    zeros = jnp.zeros((x.shape[0], kernel.shape[0]), jnp.float32)
    in_parts = (kernel.planes, kernel.scales[slice_], kernel.offsets[slice_])
    cut = jax.tree.map(lambda leaf: leaf.reshape(parts, together, *leaf.shape[1:]), in_parts)
    return jax.lax.scan(add, zeros, (rows, *cut))[0]


def _sum(terms: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """A plain sum: `where` changes nothing, since NaN plus anything is NaN."""
    return jax.lax.reduce(terms, jnp.zeros((), terms.dtype), lambda a, b: jnp.where(a == a, a + b, a), axes)
