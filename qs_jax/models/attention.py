"""Grouped-query attention over a view: one or more runs of keys and values, each with its own mask."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.sharding import laid_out


class Segment(NamedTuple):
    """A run of keys and values that queries may look at.

    Channels come last, so that a token is written as one piece per head. `bias`, if there is one, is added to every
    query's logits for the slot. On a mesh it lies as caches do: the partitioner may cut heads finer than these within
    attention, not in what is kept.
    """

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]
    visible: Bool[Array, "#batch #queries slots"]
    bias: Float[Array, "batch slots"] | None = None


View = tuple[Segment, ...]

_FEW_ROWS = 4
"""Rows of a float32 product that on the CPU go one by one: it packs what several rows share before it multiplies."""

_QUERIES, _SLOTS = 512, 256
"""Queries of a row that at most attend at once on the CPU, and slots that they attend to at once."""

_FEWEST = 64
"""Blocks of fewer are not worth their loop."""

_NOTHING = float(jnp.finfo(jnp.float32).min)
"""Below every score, yet finite: differences from it are numbers."""

Grouped = Float[Array, "batch kv_heads group queries head_dim"]
Weights = Float[Array, "batch kv_heads group queries slots"]
Totals = tuple[Float[Array, "batch kv_heads group queries"], Float[Array, "batch kv_heads group queries"], Grouped]
"""The largest score so far, and relative to it the sum of weights and that of weighted values."""


def new_segment(
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    visible: Bool[Array, "#batch #queries tokens"] | None = None,
    bias: Float[Array, "batch tokens"] | None = None,
) -> Segment:
    """Tokens being processed now; unless said otherwise each sees itself and those before it."""
    tokens = k.shape[1]
    causal = jnp.tril(jnp.ones((1, tokens, tokens), bool)) if visible is None else visible
    return laid_out(Segment(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), causal, bias), like=k)


def attention(
    q: Float[Array, "batch queries heads head_dim"], view: View, scale: float
) -> Float[Array, "batch queries features"]:
    """Softmax attention of every query over all segments of the view together, softmax in float32.

    The segments' scores are joined, never their keys and values: the cache is read where it lies.
    Every query must see at least one slot.
    """
    block = _block(q.shape[1], max(_SLOTS, min(_QUERIES, q.shape[1] // 2)))
    if block == q.shape[1]:
        return _attend(q, view, scale)
    return jax.lax.platform_dependent(
        q, view, cpu=partial(_in_blocks, scale=scale, block=block), default=partial(_attend, scale=scale)
    )


def _attend(
    q: Float[Array, "batch queries heads head_dim"], view: View, scale: float
) -> Float[Array, "batch queries features"]:
    grouped = _by_head(q, view[0].keys.shape[1])
    scores = jnp.concatenate([_scores(grouped, segment, scale) for segment in view], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    mixed, start = jnp.zeros(grouped.shape, jnp.float32), 0
    for segment in view:
        stop = start + segment.keys.shape[2]
        mixed += _mixture(weights[..., start:stop], segment)
        start = stop
    return _by_query(mixed).astype(q.dtype)


def _in_blocks(
    q: Float[Array, "batch queries heads head_dim"], view: View, scale: float, block: int
) -> Float[Array, "batch queries features"]:
    """Some queries at a time over some slots at a time, without those that none of the queries may see.

    A softmax is a weighted mean, which is summed slots by slots against the largest score so far (arXiv 2205.14135):
    scores stay in cache, and a prompt takes half the products, as queries see nothing after themselves.
    """

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)

    masks = [segment.visible for segment in view]
    masks = [jnp.broadcast_to(mask, (mask.shape[0], q.shape[1], mask.shape[2])) for mask in masks]

    def attend(part: tuple[Array, list[Array]]) -> Float[Array, "batch block features"]:
        grouped = _by_head(part[0], view[0].keys.shape[1])
        totals = jnp.full(grouped.shape[:-1], _NOTHING), jnp.zeros(grouped.shape[:-1]), jnp.zeros(grouped.shape)
        for segment, mask in zip(view, part[1], strict=True):
            totals = _add_segment(totals, grouped, segment._replace(visible=mask), scale)
        _, total, mixed = totals
        return _by_query(mixed / total[..., None]).astype(q.dtype)

    mixed = jax.lax.map(attend, (cut(q), [cut(mask) for mask in masks]))
    return mixed.swapaxes(0, 1).reshape(*q.shape[:2], -1)


def _add_segment(totals: Totals, grouped: Grouped, segment: Segment, scale: float) -> Totals:
    """Add a segment block by block, from the first slot that a query sees to the last."""
    slots = segment.keys.shape[2]
    size = _block(slots, _SLOTS)
    seen = segment.visible.any(axis=(0, 1)).reshape(-1, size).any(axis=1)
    first, stop = jnp.argmax(seen), seen.shape[0] - jnp.argmax(seen[::-1])

    def add(i: Int[Array, ""], totals: Totals) -> Totals:
        def part(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

        bias = None if segment.bias is None else part(segment.bias, 1)
        block = Segment(part(segment.keys, 2), part(segment.values, 2), part(segment.visible, 2), bias)
        largest, total, mixed = totals
        scores = _scores(grouped, block, scale)
        larger = jnp.maximum(largest, scores.max(axis=-1))
        weights = jnp.exp(scores - larger[..., None]).astype(grouped.dtype)
        shrink = jnp.exp(largest - larger)
        total = total * shrink + weights.sum(axis=-1, dtype=jnp.float32)
        return larger, total, mixed * shrink[..., None] + _mixture(weights, block)

    return jax.lax.fori_loop(jnp.where(seen.any(), first, stop), stop, add, totals)


def _block(count: int, most: int) -> int:
    """The most of `count` queries or slots, up to `most`, that divide it evenly; all of them if those are too few."""
    block = next(n for n in range(min(count, most), 0, -1) if count % n == 0)
    return count if block < _FEWEST else block


def _by_head(q: Float[Array, "batch queries heads head_dim"], kv_heads: int) -> Grouped:
    batch, queries, heads, head_dim = q.shape
    return q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)


def _by_query(mixed: Grouped) -> Float[Array, "batch queries features"]:
    batch, _, _, queries, _ = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, queries, -1)


def _scores(grouped: Grouped, segment: Segment, scale: float) -> Weights:
    """Of every query for every slot of the segment; -inf where it may not look."""
    batch, kv_heads, group, queries, head_dim = grouped.shape
    rows = grouped.reshape(batch, kv_heads, group * queries, head_dim)
    scores = _product("bkri,bkci->bkrc", rows, segment.keys).reshape(*grouped.shape[:-1], -1) * scale
    if segment.bias is not None:
        scores += segment.bias[:, None, None, None]
    return jnp.where(segment.visible[:, None, None], scores, -jnp.inf)


def _mixture(weights: Weights, segment: Segment) -> Grouped:
    """Of the segment's values, in float32."""
    batch, kv_heads, group, queries, slots = weights.shape
    rows = weights.reshape(batch, kv_heads, group * queries, slots)
    return _product("bkri,bkic->bkrc", rows, segment.values).reshape(*weights.shape[:-1], -1)


def _product(
    axes: str, a: Float[Array, "batch kv_heads rows inner"], b: Float[Array, "batch kv_heads _ _"]
) -> Float[Array, "batch kv_heads rows columns"]:
    """A product per head, in float32, arranged on CPU for how many rows there are.

    Few rows of float32 one by one are up to 1.5 times faster there; elsewhere `b` would be read for each. One row of a
    narrower type goes as two: a product of one is not among those the CPU backend has a kernel for, and would first
    write out all of `b` as float32.
    """
    rows = a.shape[2]

    def together(a: Array, b: Array) -> Array:
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)

    def one_by_one(a: Array, b: Array) -> Array:
        return jnp.concatenate([together(row, b) for row in jnp.split(a, rows, axis=2)], axis=2)

    def as_two(a: Array, b: Array) -> Array:
        return together(jnp.concatenate([a, a], axis=2), b)[:, :, :1]

    if a.dtype == jnp.float32 and 1 < rows <= _FEW_ROWS:
        return jax.lax.platform_dependent(a, b, cpu=one_by_one, default=together)
    if a.dtype != jnp.float32 and rows == 1:
        return jax.lax.platform_dependent(a, b, cpu=as_two, default=together)
    return together(a, b)
