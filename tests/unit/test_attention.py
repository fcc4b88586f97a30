"""Attention in every dtype, over any segments and for every number of queries, against the plain mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from qs_jax.models.attention import Segment, attention
from tests.arrays import DTYPES, exact, normal, rng


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 2), (1, 8), (3, 2)])
def test_attention_over_two_segments_is_that_over_all_slots(dtype: DTypeLike, queries: int, group: int) -> None:
    q = normal(2, queries, 2 * group, 16, dtype=dtype)
    runs = [(normal(2, 2, n, 16, dtype=dtype), normal(2, 2, n, 16, dtype=dtype)) for n in (6, 3)]
    visible = [jnp.asarray(rng.random((2, queries, n)) < 0.7).at[..., 0].set(True) for n in (6, 3)]
    view = tuple(Segment(k, v, seen) for (k, v), seen in zip(runs, visible, strict=True))
    keys, values = (np.concatenate([exact(run[i]) for run in runs], axis=2) for i in (0, 1))
    heads = exact(q).reshape(2, queries, 2, group, 16)
    scores = np.einsum("bqkgd,bksd->bkgqs", heads, keys) * 0.25
    scores = np.where(np.concatenate(visible, axis=-1)[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bkgqs,bksd->bqkgd", weights, values).reshape(2, queries, -1)
    found = jax.jit(attention, static_argnums=2)(q, view, 0.25)
    assert found.dtype == dtype
    # weights are rounded to the dtype, and so is the result
    np.testing.assert_allclose(exact(found), expected, atol=8 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "window"), [(384, 384), pytest.param(384, 50, marks=pytest.mark.slow), (269, 269)])
def test_many_queries_attend_as_each_does_alone(dtype: DTypeLike, queries: int, window: int) -> None:
    """384 go in blocks, and with a window some see nothing in the first slots; 269 is prime, 5 slots are one block."""

    def run(slots: int, visible: jax.Array, *bias: jax.Array) -> Segment:
        return Segment(normal(2, 2, slots, 8, dtype=dtype), normal(2, 2, slots, 8, dtype=dtype), visible, *bias)

    q, own = normal(2, queries, 2, 8, dtype=dtype), jnp.tril(jnp.ones((1, queries, queries), bool))
    empty = run(512, jnp.zeros((1, 1, 512), bool))
    past = run(512, jnp.arange(512)[None, None] < jnp.asarray([300, 3])[:, None, None], normal(2, 512))
    few = run(5, jnp.ones((1, 1, 5), bool), normal(2, 5))
    view = empty, past, few, run(queries, own & ~jnp.tril(own, -window))
    together = jax.jit(attention, static_argnums=2)(q, view, 0.3)
    assert together.dtype == dtype
    for query in (0, 191, 192, queries - 1):
        seen = *view[:3], view[3]._replace(visible=view[3].visible[:, query : query + 1])
        alone = attention(q[:, query : query + 1], seen, 0.3)
        atol = 4 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 1e-5
        np.testing.assert_allclose(exact(together[:, query : query + 1]), exact(alone), atol=atol)
