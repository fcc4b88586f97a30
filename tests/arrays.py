"""Random arrays in every dtype, and what they are exactly."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

rng = np.random.default_rng(5)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape), dtype)


def exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.float64)
