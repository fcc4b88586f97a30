"""How much an error in a key or a value of a layer matters to those who read it: what the direct lens is fitted by.

A regression that counts every output alike spends itself on what nobody looks at. An error e in a value of a head
changes what attention adds to the residual stream by W_o e, and one in a key changes a query's score by q · e, and so
what it adds by about as much as the values that it then mixes differ. Both are quadratic forms, means over text.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.fitting.activations import batches
from qs_jax.kernels import as_kernel
from qs_jax.models.base import Block, Hidden

_NEAREST = 64
"""How far before its readers a token stands at least: those that rest are not a prompt's last."""

_FLOOR = 1e-4
"""Of the mean eigenvalue: directions that nobody reads count a little, or the fit would be free there; and its square
of that of all heads, of some of which nothing may be read at all."""

_SOME = 4
"""Batches of windows that the means are taken over: forms of a head's size are known long before maps are."""


class Units(NamedTuple):
    """A layer's keys and values in units of what an error in them changes in its residual stream, and back.

    `into` is the symmetric root of the forms, a block per key-value head, first of keys and then of values.
    """

    into: Float[np.ndarray, "blocks head_dim head_dim"]
    back: Float[np.ndarray, "blocks head_dim head_dim"]

    def of(self, features: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, "rows features"]:
        """Keys, without positions, and values in these units."""
        return _by_block(features, self.into)

    def undo(self, features: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, "rows features"]:
        """The other way round."""
        return _by_block(features, self.back)


def _by_block(
    features: Float[np.ndarray, "rows features"], forms: Float[np.ndarray, "blocks head_dim head_dim"]
) -> Float[np.ndarray, "rows features"]:
    parts = features.reshape(len(features), len(forms), -1)
    return np.einsum("nbd,bde->nbe", parts, forms, optimize=True).reshape(features.shape).astype(features.dtype)


def units(block: Block, states: Hidden) -> Units:
    """Those of a layer, from the states that enter it over some windows."""
    found = [_forms(block, batch, jnp.int32(seed)) for seed, batch in zip(range(_SOME), batches(states), strict=False)]
    forms = np.mean([np.asarray(part, np.float64) for part in found], axis=0)
    values, vectors = np.linalg.eigh(forms)
    least = _FLOOR * values.mean(axis=-1, keepdims=True), _FLOOR**2 * values.mean() or 1.0
    values = np.maximum(values, np.maximum(*least))
    root = np.sqrt(values)[:, None, :]
    back = np.swapaxes(vectors, 1, 2)
    return Units(((vectors * root) @ back).astype(np.float32), ((vectors / root) @ back).astype(np.float32))


@jax.jit
def _forms(block: Block, states: Hidden, seed: Int[Array, ""]) -> Float[Array, "blocks head_dim head_dim"]:
    """The quadratic forms of keys, then of values, relative to the residual stream's mean square.

    A query sees keys at all distances. It is placed as far from them as its readers stand, at random; that is what its
    score with a key at position 0 is made of, whatever places them.
    """
    config = block.config
    groups, shared = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    x = block.attention_norm(states)
    far = jnp.minimum(_NEAREST, states.shape[1] - 1)
    apart = jax.random.randint(jax.random.key(seed), states.shape[:2], far, states.shape[1])
    heads = block.q(x).reshape(*x.shape[:2], groups * shared, config.head_dim)
    q = block.place(heads, apart).astype(jnp.float32).reshape(-1, groups, shared, config.head_dim)
    v = block.kv_features(states)[1].astype(jnp.float32).reshape(-1, groups, config.head_dim)
    wide = as_kernel(block.o.kernel.get_value()).matmul(jnp.eye(groups * shared * config.head_dim, dtype=x.dtype))
    wide = wide.reshape(groups, shared, config.head_dim, -1)
    values = jnp.einsum("gsdo,gseo->gde", wide, wide)
    spread = v - v.mean(axis=0)
    mixed = jnp.einsum("ngd,gde,nge->g", spread, values, spread) / (len(v) * shared)
    keys = jnp.einsum("ngsd,ngse->gde", q, q) * (block.scale**2 / len(v)) * mixed[:, None, None]
    return jnp.concatenate([keys, values]) / jnp.square(states.astype(jnp.float32)).sum(axis=-1).mean()
