"""What the dense model shows on text, layer by layer: where thresholds could lie, and what an oracle would do."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.adaptive.fusion import DISTANCES
from qs_jax.adaptive.policy import Distance, SignalName
from qs_jax.adaptive.signals import SIGNALS, Evidence, Shown, entropy_bits
from qs_jax.evaluation.windows import Window
from qs_jax.model import Model
from qs_jax.models.base import CausalLM
from qs_jax.sharding import on_host

OBSERVED: tuple[SignalName, ...] = tuple(name for name, signal in SIGNALS.items() if signal.flops_per_channel)
"""Signals that are read of a layer's states, so that shares of tokens say where thresholds could lie."""

_MOST_WINDOWS = 8


@dataclass(frozen=True)
class Observed:
    """Signals of the tokens of some windows, per layer run (index 0: after the first layer).

    `prompt` and `scored` hold each drift signal for prompt tokens that no policy protects by place, and for the tokens
    whose passes predict scored ones; `neighbours` the distance of adjacent prompt tokens; `entropy` of the output one
    step before each of those passes, in bits; `settled` after how many layers the most likely next token was the final
    one and stayed so.
    """

    prompt: dict[str, Float[np.ndarray, "layers prompt_tokens"]]
    scored: dict[str, Float[np.ndarray, "layers scored_tokens"]]
    neighbours: dict[str, Float[np.ndarray, "layers pairs"]]
    entropy: Float[np.ndarray, " scored_tokens"]
    settled: Int[np.ndarray, " scored_tokens"]


def observe(model: Model, windows: Sequence[Window], *, protect_first: int, protect_last: int) -> Observed:
    """Run the plain dense model over a few windows."""
    few = windows[:_MOST_WINDOWS]
    tokens = np.asarray([[*window.prompt, *window.scored] for window in few], np.int32)
    values, distances, entropy, settled = on_host(_look(model.network, tokens))
    end = len(few[0].prompt)
    inner, passes = slice(protect_first, max(protect_first, end - protect_last)), slice(end - 1, -1)

    def flat(part: np.ndarray, places: slice) -> np.ndarray:
        return part[..., places].reshape(len(part), -1)

    prompt = {name: flat(value, inner) for name, value in values.items()}
    return Observed(
        prompt={**prompt, "random": np.tile(np.linspace(0, 1, 1001), (model.config.num_hidden_layers, 1))},
        scored={name: flat(value, passes) for name, value in values.items()},
        neighbours={name: flat(value, inner) for name, value in distances.items()},
        entropy=entropy[:, end - 1 : -2].reshape(-1),
        settled=settled[:, passes].reshape(-1),
    )


@jax.jit
def _look(
    model: CausalLM, tokens: Int[Array, "windows tokens"]
) -> tuple[dict[SignalName, Array], dict[Distance, Array], Array, Array]:
    """Per layer, window and token: the drift signals, the distance to the token before, and, at the end, the output's
    entropy and after how many layers the most likely token was settled."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden_states, seen, best = model.embed(tokens, positions), [], []
    for block in model.blocks:
        before, output = hidden_states, block.run(hidden_states, positions, ())
        hidden_states = output.hidden_states
        evidence = Evidence(len(seen) + 1, Shown.by(before, output), tokens, positions)
        left = jnp.roll(hidden_states, 1, axis=1)
        apart = {name: distance(left, hidden_states) for name, distance in DISTANCES.items()}
        seen.append(({name: evidence.read(name) for name in OBSERVED}, apart))
        best.append(model.head(hidden_states).argmax(axis=-1))
    values, distances = jax.tree.map(lambda *layers: jnp.stack(layers), *seen)
    wrong = jnp.stack(best) != best[-1]
    places = jnp.arange(1, len(best) + 1, dtype=jnp.int32)[:, None, None]
    settled = 1 + jnp.where(wrong, places, 0).max(axis=0)
    return values, distances, entropy_bits(model.head(hidden_states)), settled
