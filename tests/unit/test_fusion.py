"""Which neighbours fuse, and into what, on a handful of numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.adaptive.fusion import fuse, pairs
from qs_jax.adaptive.policy import PositionRule


def states(*values: float) -> jnp.ndarray:
    return jnp.asarray(values, jnp.float32)[None, :, None]


@pytest.mark.parametrize(
    ("values", "free", "expected"),
    [
        ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), [0, 1, 0, 1, 0]),
        ((0, 9, 9, 9, 0), (1, 1, 1, 1, 1), [0, 0, 1, 0, 0]),
        ((0, 0, 9, 9, 0), (1, 1, 1, 1, 1), [0, 1, 0, 1, 0]),
        ((0, 0, 0, 0, 0), (1, 0, 1, 1, 1), [0, 0, 0, 1, 0]),
        ((0, 0, 0, 0, 0), (0, 1, 1, 1, 0), [0, 0, 1, 0, 0]),
        ((0, 3, 6, 9, 12), (1, 1, 1, 1, 1), [0, 0, 0, 0, 0]),
    ],
)
def test_every_second_token_of_a_run_fuses_leftwards(
    values: tuple[float, ...], free: tuple[int, ...], expected: list[int]
) -> None:
    fuses = pairs("l2", states(*values), jnp.asarray([free], bool), jnp.float32(1.0))
    assert fuses[0].astype(int).tolist() == expected


def test_the_first_token_has_no_left_neighbour_and_a_threshold_of_zero_fuses_nothing() -> None:
    free = jnp.ones((1, 2), bool)
    assert pairs("l2", states(0, 0), free, jnp.float32(jnp.inf)).tolist() == [[False, True]]
    assert not pairs("l2", states(0, 0), free, jnp.float32(0)).any()


@pytest.mark.parametrize(("position", "expected"), [("last", 9), ("first", 4), ("mean", 7)])
def test_a_pair_is_its_weighted_mean(position: PositionRule, expected: int) -> None:
    places, sizes = jnp.asarray([[1, 4, 9]]), jnp.asarray([[1, 1, 2]])
    fused = fuse(states(5, 3, 6), places, sizes, jnp.asarray([[False, False, True]]), position)
    np.testing.assert_allclose(fused.hidden_states[0, :, 0], [5, 3, 5])
    assert fused.positions.tolist() == [[1, 4, expected]]
    assert fused.sizes.tolist() == [[1, 1, 3]]
    assert fused.absorbed.tolist() == [[False, True, False]]
