"""Grouped-query attention over a view: one or more runs of keys and values, each with its own mask."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Segment(NamedTuple):
    """A run of keys and values that queries may look at.

    Channels come last, so that a token is written as one piece per head. `bias`, if there is one, is added to every
    query's logits for the slot.
    """

    keys: Float[Array, "batch kv_heads slots head_dim"]
    values: Float[Array, "batch kv_heads slots head_dim"]
    visible: Bool[Array, "#batch #queries slots"]
    bias: Float[Array, "batch slots"] | None = None


View = tuple[Segment, ...]

_FEW_ROWS = 4
"""Rows of a float32 product that on the CPU go one by one: it packs what several rows share before it multiplies."""

_QUERIES = 256
"""Queries of a row that at most attend at once on the CPU."""

_FEWEST_QUERIES = 64
"""Blocks of fewer are not worth their loop."""


def new_segment(
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    visible: Bool[Array, "#batch #queries tokens"] | None = None,
    bias: Float[Array, "batch tokens"] | None = None,
) -> Segment:
    """Tokens being processed now; unless said otherwise each sees itself and those before it."""
    tokens = k.shape[1]
    causal = jnp.tril(jnp.ones((1, tokens, tokens), bool)) if visible is None else visible
    return Segment(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), causal, bias)


def attention(
    q: Float[Array, "batch queries heads head_dim"], view: View, scale: float
) -> Float[Array, "batch queries features"]:
    """Softmax attention of every query over all segments of the view together, softmax in float32.

    The segments' scores are joined, never their keys and values: the cache is read where it lies.
    Every query must see at least one slot.
    """
    queries = q.shape[1]
    block = next(n for n in range(min(queries, _QUERIES), 0, -1) if queries % n == 0)
    if block == queries or block < _FEWEST_QUERIES:
        return _attend(q, view, scale)
    return jax.lax.platform_dependent(
        q, view, cpu=partial(_in_blocks, scale=scale, block=block), default=partial(_attend, scale=scale)
    )


def _in_blocks(
    q: Float[Array, "batch queries heads head_dim"], view: View, scale: float, block: int
) -> Float[Array, "batch queries features"]:
    """Some queries at a time, so that fewer scores are written out between the product and the softmax."""

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, block, *x.shape[2:]).swapaxes(0, 1)

    masks = [segment.visible for segment in view]
    masks = [jnp.broadcast_to(mask, (mask.shape[0], q.shape[1], mask.shape[2])) for mask in masks]

    def attend(part: tuple[Array, list[Array]]) -> Float[Array, "batch block features"]:
        seen = zip(view, part[1], strict=True)
        return _attend(part[0], tuple(segment._replace(visible=mask) for segment, mask in seen), scale)

    mixed = jax.lax.map(attend, (cut(q), [cut(mask) for mask in masks]))
    return mixed.swapaxes(0, 1).reshape(*q.shape[:2], -1)


def _attend(
    q: Float[Array, "batch queries heads head_dim"], view: View, scale: float
) -> Float[Array, "batch queries features"]:
    batch, queries, heads, head_dim = q.shape
    kv_heads = view[0].keys.shape[1]
    group = heads // kv_heads
    grouped = q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(batch, kv_heads, group * queries, head_dim)
    scores = []
    for segment in view:
        score = _product("bkri,bkci->bkrc", grouped, segment.keys)
        score = score.reshape(batch, kv_heads, group, queries, -1) * scale
        if segment.bias is not None:
            score += segment.bias[:, None, None, None]
        scores.append(jnp.where(segment.visible[:, None, None], score, -jnp.inf))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    weights = weights.reshape(batch, kv_heads, group * queries, -1)
    mixed, start = jnp.zeros(grouped.shape, jnp.float32), 0
    for segment in view:
        stop = start + segment.keys.shape[2]
        mixed += _product("bkri,bkic->bkrc", weights[..., start:stop], segment.values)
        start = stop
    mixed = mixed.reshape(batch, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, queries, heads * head_dim).astype(q.dtype)


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
