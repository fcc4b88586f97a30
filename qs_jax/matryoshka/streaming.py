"""Products of one row or two with a nested kernel on CPU: codes become weights in registers, never in memory.

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

from qs_jax.matryoshka.codec import BLOCK, Planes, packed_codes
from qs_jax.matryoshka.slices import Slice, bent

Rows = Float[Array, "rows padded_inputs"]
Result = Float[Array, "rows outputs"]

FEW_ROWS = 2
"""Up to this many rows each pay for decoding the codes; from three on it pays to write weights out once."""

_SPAN = 64
_CHAINS = 2


def multiply_streams(x: Rows, codes: Slice) -> Result:
    """`x @ weights` in one pass over the planes, for `FEW_ROWS` rows at most.

    Every output is a vector lane. Within a span of inputs a masked word, converted as it is, holds its code times a
    power of 4 (16, 256), which the input takes back; both are exact. Spans are summed in the end.
    """
    codes, x = jax.lax.optimization_barrier((codes, x.astype(jnp.float32)))
    groups, outputs, bits, bend = codes.groups, codes.outputs, codes.bits, codes.bend
    scale = codes.scale.astype(jnp.float32)[:, None]
    offset = codes.offset_in_steps[:, None]
    if bend == 0.0:
        offset -= (2**bits - 1) / 2
    span = math.gcd(codes.group_size, _SPAN)
    spans = codes.group_size // span
    cut = Planes(*(plane.reshape(groups * spans, -1, outputs) for plane in codes.planes))
    results = []
    for row in x.reshape(x.shape[0], groups * spans, span):
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


def _sum(terms: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    """A plain sum: `where` changes nothing, since NaN plus anything is NaN."""
    return jax.lax.reduce(terms, jnp.zeros((), terms.dtype), lambda a, b: jnp.where(a == a, a + b, a), axes)
