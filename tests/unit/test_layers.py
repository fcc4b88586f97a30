"""Products, attention and cache writes in every dtype and for every number of rows, against the plain mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike

from qs_jax.cache import LayerCache, append
from qs_jax.engine.sampling import log_normaliser, most_likely
from qs_jax.kernels import DenseKernel
from qs_jax.models.attention import Segment, attention
from qs_jax.models.layers import Linear

rng = np.random.default_rng(5)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 65])
@pytest.mark.parametrize("outputs", [24, 7])
def test_a_projection_sums_in_float32(dtype: DTypeLike, rows: int, outputs: int) -> None:
    x, kernel = normal(rows, 96, dtype=dtype), normal(outputs, 96, dtype=dtype)
    expected = exact(x) @ exact(kernel).T
    unrounded = jax.jit(DenseKernel.matmul)(DenseKernel(kernel), x)
    np.testing.assert_allclose(unrounded, expected, atol=2e-5)
    assert unrounded.shape == (rows, outputs)
    linear = Linear(96, outputs, bias=False, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    linear.kernel.set_value(kernel)
    own = jax.jit(lambda linear, x: linear(x))(linear, x)
    assert own.dtype == dtype
    np.testing.assert_array_equal(own, unrounded.astype(dtype))


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
@pytest.mark.parametrize(("queries", "window"), [(384, 384), (384, 50), (269, 269)])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_tokens_take_the_next_slots_and_those_without_change_nothing(dtype: DTypeLike, tokens: int) -> None:
    old = normal(3, 2, 4, 8, dtype=dtype)
    lengths = jnp.asarray([0, 2, 4], jnp.int32)
    layer = LayerCache(old, -old, jnp.zeros((3, 4), jnp.int32), lengths)
    k = normal(3, tokens, 2, 8, dtype=dtype)
    writes = jnp.asarray([[True], [False], [True]]).repeat(tokens, axis=1)
    positions = jnp.arange(7, 7 + tokens, dtype=jnp.int32)[None].repeat(3, axis=0)
    new = jax.jit(append)(layer, k, -k, positions, writes)
    expected = np.array(old)
    expected[0, :, :tokens] = np.asarray(k[0]).swapaxes(0, 1)  # row 1 writes nothing, row 2 is full
    np.testing.assert_array_equal(new.keys, expected)
    np.testing.assert_array_equal(new.values, -expected)
    assert new.lengths.tolist() == [tokens, 2, 4]
    assert new.positions[0, :tokens].tolist() == positions[0].tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_the_most_likely_is_the_first_of_equals_and_the_normaliser_that_of_softmax(rows: int) -> None:
    logits = normal(rows, 300).at[:, jnp.asarray([41, 17, 250])].set(9.0)
    assert jax.jit(most_likely)(logits).tolist() == [17] * rows
    np.testing.assert_allclose(jax.jit(log_normaliser)(logits), np.log(np.exp(exact(logits)).sum(axis=-1)), rtol=1e-6)
