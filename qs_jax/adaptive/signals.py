"""What a token shows of itself between layers: pure functions of hidden states and logits, one number per token.

`SIGNALS` names them as policies do. A signal asks `Evidence` for what it reads; what costs something to make, such as
the entropy of intermediate logits, is made only when a signal asks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qs_jax.adaptive.policy import SignalName
from qs_jax.kernels import DenseKernel
from qs_jax.models.base import CausalLM, LayerOutput

Hidden = Float[Array, "*tokens hidden"]
Value = Float[Array, "*tokens"]

COMPARISON_FLOPS = 8
"""Per hidden channel: two norms and a difference, or a cosine."""

_TINY = 1e-12


class Shown(NamedTuple):
    """What a layer shows of the tokens that ran through it: the state that entered it, the state that left it, and
    attention's update between the two."""

    before: Hidden
    after: Hidden
    attention_update: Hidden

    @classmethod
    def by(cls, before: Hidden, output: LayerOutput) -> "Shown":
        return cls(before, output.hidden_states, output.attention_update)

    @classmethod
    def by_none(cls, hidden_states: Hidden) -> "Shown":
        """Of tokens that ran through no layer."""
        return cls(hidden_states, hidden_states, jnp.zeros_like(hidden_states))


@dataclass(frozen=True)
class Evidence:
    """What there is to see of tokens after `layer` layers, and whose it is. Lives while a program is traced.

    `probe` takes the entropy of the intermediate logits, in bits; `previous_entropy` is that of the output one step
    earlier. Either is None where there is none.
    """

    layer: int
    shown: Shown
    ids: Int[Array, "*tokens"]
    positions: Int[Array, "*tokens"]
    probe: Callable[[], Value] | None = None
    previous_entropy: Value | None = None

    @cached_property
    def entropy(self) -> Value | None:
        return self.probe() if self.probe else None

    def read(self, name: SignalName) -> Value:
        """The signal that policies call `name`."""
        value = SIGNALS[name].read(self)
        assert value is not None, f"{name} was asked for where there is nothing to read it of"
        return value


class Signal(NamedTuple):
    """How a signal is read, and what that takes.

    `flops_per_channel` is counted per token and hidden channel. `probes`: it reads the entropy of intermediate logits,
    which the ledger counts by itself. `remembers`: it reads the entropy of the previous step's output.
    """

    read: Callable[[Evidence], Value | None]
    flops_per_channel: int = 0
    probes: bool = False
    remembers: bool = False


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


def probe_entropy(model: CausalLM, hidden_states: Hidden, shortlist: int) -> Value:
    """Entropy in bits of the logits that an intermediate state would give; over the first `shortlist` ids if not 0.

    The model's own final norm and head, no training: what is known as the logit lens.
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


def _comparing(distance: Callable[[Hidden, Hidden], Value]) -> Signal:
    """A signal that compares a layer's input with its output."""
    return Signal(lambda seen: distance(seen.shown.before, seen.shown.after), COMPARISON_FLOPS)


SIGNALS: dict[SignalName, Signal] = {
    "relative_drift": _comparing(relative_drift),
    "direction_drift": _comparing(direction_drift),
    "raw_drift": _comparing(raw_drift),
    "attention_update": Signal(
        lambda seen: attention_update(seen.shown.before, seen.shown.attention_update), COMPARISON_FLOPS
    ),
    "entropy": Signal(lambda seen: seen.entropy, probes=True),
    "previous_entropy": Signal(lambda seen: seen.previous_entropy, remembers=True),
    "random": Signal(lambda seen: uniform(seen.positions, seen.ids, seen.layer)),
}
