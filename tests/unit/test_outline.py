from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.outline import outlined

LAYERS = 5
KERNELS = jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, 4, 4)), jnp.float32)
INPUTS = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)


def layer(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, jnp.tanh(x @ kernel), x)


def through(run: Callable[..., jax.Array], kernels: jax.Array, x: jax.Array) -> jax.Array:
    for kernel in kernels:
        x = run(kernel, x)
    return x


def test_the_outcome_stays_and_so_do_gradients() -> None:
    for transformed in (lambda f: f, lambda f: jax.grad(lambda x: f(x).sum()), jax.vmap):
        alone = (lambda x, run=run: through(run, KERNELS, x) for run in (layer, outlined(layer)))
        np.testing.assert_array_equal(*(jax.jit(transformed(one))(INPUTS) for one in alone))


def test_equal_uses_are_traced_once_and_compiled_as_one() -> None:
    traced: list[int] = []

    def noted(kernel: jax.Array, x: jax.Array) -> jax.Array:
        traced.append(1)
        return layer(kernel, x)

    lowered = jax.jit(lambda x: through(outlined(noted), KERNELS, x)).lower(INPUTS)
    assert len(traced) == 1
    assert lowered.as_text().count("func.func private @noted") == 1
    assert str(lowered.compile().as_text()).count(" call(") == LAYERS


def test_within_loops_and_conditionals() -> None:
    """Where a decode step has it."""

    def program(run: Callable[..., jax.Array]) -> jax.Array:
        def step(x: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.cond(number % 2 == 0, lambda x: through(run, KERNELS, x), lambda x: -x, x), None

        return jax.lax.scan(step, INPUTS, jnp.arange(6))[0]

    np.testing.assert_array_equal(*(jax.jit(lambda run=run: program(run))() for run in (layer, outlined(layer))))


def test_other_shapes_are_another_function() -> None:
    run, wide = outlined(layer), jnp.ones((2, 6))

    def both(x: jax.Array, wide: jax.Array) -> tuple[jax.Array, jax.Array]:
        return run(KERNELS[0], x), run(jnp.eye(6), wide)

    narrow_out, wide_out = jax.jit(both)(INPUTS, wide)
    np.testing.assert_array_equal(narrow_out, jax.jit(layer)(KERNELS[0], INPUTS))
    np.testing.assert_array_equal(wide_out, jax.jit(layer)(jnp.eye(6), wide))
