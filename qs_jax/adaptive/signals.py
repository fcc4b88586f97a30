"""What a token shows of itself between layers: pure functions of hidden states and logits, one number per token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qs_jax.kernels import DenseKernel
from qs_jax.models.base import CausalLM

Hidden = Float[Array, "*tokens hidden"]
Value = Float[Array, "*tokens"]

_TINY = 1e-12


class Evidence(NamedTuple):
    """What there is to see of tokens after a layer: its input, output and attention update, and whose they are.

    Entropies in bits, None where no policy asks for them: of the intermediate logits, and of the previous output.
    """

    before: Hidden
    after: Hidden
    update: Hidden
    positions: Int[Array, "*tokens"]
    ids: Int[Array, "*tokens"]
    entropy: Value | None
    previous_entropy: Value | None = None

    def value(self, name: str, layer: int) -> Value:
        """The signal that policies call `name`, after `layer` layers."""
        known = {"entropy": self.entropy, "previous_entropy": self.previous_entropy}
        if (entropy := known.get(name)) is not None:
            return entropy
        if name == "random":
            return uniform(self.positions, self.ids, layer)
        if name == "attention_update":
            return attention_update(self.before, self.update)
        return DRIFTS[name](self.before, self.after)


def norm(x: Hidden) -> Value:
    """Euclidean norm, in float32."""
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axis=-1))


def cosine(a: Hidden, b: Hidden) -> Value:
    """Cosine of the angle between two states, in float32."""
    dot = (a.astype(jnp.float32) * b.astype(jnp.float32)).sum(axis=-1)
    return dot / jnp.maximum(norm(a) * norm(b), _TINY)


def angle(a: Hidden, b: Hidden) -> Value:
    """1 - cosine, from 0 to 2; never below 0, so that a threshold of 0 is neutral whatever the rounding."""
    return jnp.maximum(1.0 - cosine(a, b), 0.0)


def relative_drift(before: Hidden, after: Hidden) -> Value:
    """‖h_l - h_{l-1}‖ / ‖h_{l-1}‖: residual norms grow with depth, so raw differences mean nothing across layers."""
    return raw_drift(before, after) / jnp.maximum(norm(before), _TINY)


def direction_drift(before: Hidden, after: Hidden) -> Value:
    """1 - cos(h_l, h_{l-1}), from 0 to 2."""
    return angle(before, after)


def raw_drift(before: Hidden, after: Hidden) -> Value:
    """‖h_l - h_{l-1}‖, the paper's."""
    return norm(after.astype(jnp.float32) - before.astype(jnp.float32))


def attention_update(before: Hidden, update: Hidden) -> Value:
    """Norm of the attention half's update relative to the state it was added to."""
    return norm(update) / jnp.maximum(norm(before), _TINY)


def entropy_bits(logits: Float[Array, "*tokens vocab"]) -> Value:
    """Entropy of softmax(logits), in bits."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -(jnp.exp(logprobs) * logprobs).sum(axis=-1) / jnp.log(jnp.float32(2.0))


def lens_entropy(model: CausalLM, hidden_states: Hidden, shortlist: int) -> Value:
    """Entropy in bits of the logits that an intermediate state would give; over the first `shortlist` ids if not 0.

    The logit lens: the model's own final norm and head, no training.
    """
    if not shortlist:
        return entropy_bits(model.head(hidden_states))
    few = DenseKernel(model.head_kernel.rows(jnp.arange(shortlist)))
    return entropy_bits(few.matmul(model.final_norm(hidden_states)))


def uniform(positions: Int[Array, "*tokens"], tokens: Int[Array, "*tokens"], layer: int) -> Value:
    """A number from 0 to 1 that knows nothing of the state: the baseline. Drawn from token, position and layer only."""
    base = jax.random.fold_in(jax.random.key(0), layer)

    def draw(position: Array, token: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(base, position), token))

    flat = jax.vmap(draw)(positions.reshape(-1), tokens.reshape(-1))
    return flat.reshape(positions.shape)


DRIFTS = {"relative_drift": relative_drift, "direction_drift": direction_drift, "raw_drift": raw_drift}
"""Signals that compare a layer's input with its output, by the names that policies use."""
