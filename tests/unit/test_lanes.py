"""Products in lanes: those of the weights, whatever their type, and only where they pay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax import lanes as module
from qs_jax.kernels import DenseKernel
from qs_jax.lanes import lanes_for, multiply_in_lanes

rng = np.random.default_rng(0)


def some_weights(dtype: str, outputs: int = 128, inputs: int = 576) -> jax.Array:
    return jnp.asarray(rng.standard_normal((outputs, inputs)), dtype)


@pytest.fixture(params=[True, False], ids=["tiles", "no_tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "_multiplies_tiles", lambda: request.param)
    return request.param


@pytest.mark.parametrize(("dtype", "rows", "lanes"), [("float32", 3, 16), ("bfloat16", 1, 64), ("bfloat16", 2, 96)])
def test_products_are_those_of_the_weights_in_full_precision(dtype: str, rows: int, lanes: int) -> None:
    weights, x = some_weights(dtype), jnp.asarray(rng.standard_normal((rows, 576)), dtype)
    product = jax.jit(multiply_in_lanes, static_argnums=2)(x, weights, lanes)
    exact = np.asarray(x, np.float64) @ np.asarray(weights, np.float64).T
    assert product.dtype == jnp.float32
    # also of narrow operands: their products are exact in float32, and so are sums to its rounding
    np.testing.assert_allclose(product, exact, atol=2e-6 * np.abs(exact).max(), rtol=0)


def test_one_row_of_bfloat16_goes_in_lanes_where_the_backend_has_no_kernel_for_it(tiles: bool) -> None:
    weights = some_weights("bfloat16")
    assert lanes_for(1, weights) == (None if tiles else 64)
    assert lanes_for(3, weights) is None


@pytest.mark.parametrize(("rows", "expected"), [(1, None), (2, 16), (5, 16), (6, None)])
def test_a_few_rows_of_float32_go_in_lanes(rows: int, expected: int | None, tiles: bool) -> None:
    assert lanes_for(rows, some_weights("float32")) == expected


@pytest.mark.parametrize("shape", [(16, 576), (128, 580), (128, 4096)], ids=["small", "odd", "wide"])
def test_what_does_not_gain_is_left_to_the_backend(shape: tuple[int, int]) -> None:
    assert lanes_for(2, some_weights("float32", *shape)) is None


def test_kernels_take_lanes(tiles: bool) -> None:
    jax.clear_caches()  # JAX keeps what it traced, whatever the CPU was said to be then
    weights, x = some_weights("bfloat16"), jnp.ones((1, 576), jnp.bfloat16)
    program = (
        jax.jit(lambda x, weights: DenseKernel(weights).matmul(x)).trace(x, weights).lower(lowering_platforms=("cpu",))
    )
    assert ("bitcast_convert" in program.as_text()) == (not tiles)
