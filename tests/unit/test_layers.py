"""Products, norms and activations in every dtype, against the plain mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.typing import DTypeLike
from scipy.special import erf, expit

from qs_jax.kernels import DenseKernel
from qs_jax.models.layers import ACTIVATIONS, Embedding, LayerNorm, Linear, RandomInit, RMSNorm
from tests.arrays import DTYPES, exact, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 65])
@pytest.mark.parametrize("outputs", [24, 7])
def test_a_projection_sums_in_float32(dtype: DTypeLike, rows: int, outputs: int) -> None:
    x, kernel = normal(rows, 96, dtype=dtype), normal(outputs, 96, dtype=dtype)
    expected = exact(x) @ exact(kernel).T
    unrounded = jax.jit(DenseKernel.matmul)(DenseKernel(kernel), x)
    np.testing.assert_allclose(unrounded, expected, atol=2e-5)
    assert unrounded.shape == (rows, outputs)
    linear = Linear(96, outputs, bias=False, init=RandomInit(jnp.dtype(dtype), nnx.Rngs(0)))
    linear.kernel.set_value(kernel)
    own = jax.jit(lambda linear, x: linear(x))(linear, x)
    assert own.dtype == dtype
    np.testing.assert_array_equal(own, unrounded.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_norms_are_taken_in_float32(kind: type[LayerNorm] | type[RMSNorm], dtype: DTypeLike) -> None:
    """Of rows far from zero, whose squares a narrow float could not hold apart."""
    norm, x = (
        kind(32, epsilon=1e-2, init=RandomInit(jnp.dtype(dtype), nnx.Rngs(0))),
        3 * normal(4, 32, dtype=dtype) + jnp.asarray(20, dtype),
    )
    norm.scale.set_value(normal(32, dtype=dtype))
    centred = exact(x)
    if isinstance(norm, LayerNorm):
        norm.bias.set_value(normal(32, dtype=dtype))
        centred = centred - centred.mean(axis=-1, keepdims=True)
    unscaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-2)
    expected = unscaled * exact(norm.scale.get_value())
    if isinstance(norm, LayerNorm):
        expected = expected + exact(norm.bias.get_value())
    found = norm(x)
    assert found.dtype == dtype
    # root-mean-square norms round before they scale, as Hugging Face's do
    np.testing.assert_allclose(exact(found), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=2e-5)


def test_activations_are_those_of_their_names() -> None:
    x = np.linspace(-6, 6, 101)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    expected = {
        "gelu": 0.5 * x * (1 + erf(x / np.sqrt(2))),
        "gelu_new": tanh,
        "gelu_pytorch_tanh": tanh,
        "quick_gelu": x * expit(1.702 * x),
        "relu": np.maximum(x, 0),
        "silu": x * expit(x),
    }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, activation in ACTIVATIONS.items():
        # exact and approximate gelu are 5e-4 apart
        np.testing.assert_allclose(activation(jnp.asarray(x, jnp.float32)), expected[name], atol=5e-6, err_msg=name)


def test_a_bias_is_added_before_the_result_is_rounded() -> None:
    linear = Linear(8, 3, bias=True, init=RandomInit(jnp.dtype("bfloat16"), nnx.Rngs(0)))
    assert linear.bias is not None
    linear.bias.set_value(jnp.asarray([0.1, 300.0, -7.0], jnp.bfloat16))
    x = normal(2, 8, dtype=jnp.bfloat16)
    expected = exact(x) @ exact(linear.kernel.get_value()).T + exact(linear.bias.get_value())
    np.testing.assert_array_equal(linear(x), jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16))
    np.testing.assert_allclose(linear(x, jnp.float32), expected, atol=1e-6)


def test_an_id_beyond_the_table_reads_its_last_row() -> None:
    """Padded rows carry positions that no table has; what they read counts for nothing, but has to be a number."""
    table = Embedding(5, 4, init=RandomInit(jnp.dtype("float32"), nnx.Rngs(0)))
    rows = np.asarray(table.table.get_value())
    np.testing.assert_array_equal(table(jnp.asarray([[0, 3], [4, 9]])), rows[[[0, 3], [4, 4]]])
