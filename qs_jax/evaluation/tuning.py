"""Tuning the direct lens: from the closed form on, towards the dense model's next tokens. The model stays frozen.

Beyond the paper, as is the lens: an auxiliary fit. What is lowered is the KL divergence of the next-token distribution
from the dense model's, over the last tokens of windows in which all before them stopped, by Adam (optax), for as many
minutes as one gives it. SwiftKV (arXiv 2410.03960) distils its projections likewise.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from qs_jax import lens
from qs_jax.evaluation.direct import Seen
from qs_jax.evaluation.lens import is_held_out
from qs_jax.lens import DirectMap
from qs_jax.models.attention import new_segment
from qs_jax.models.base import CausalLM, Hidden
from qs_jax.models.layers import DirectKv

PEAK = 1e-4
"""The highest learning rate; it rises over the first twentieth of the time and falls to 0 as a cosine."""

SINKS = 4
"""Tokens at the start that run through all layers, as a policy protects them."""

_STALLED = 3
"""A step counts as at most so many of the fastest one: a machine that slept meanwhile did not tune."""

_BATCH = 4
_WARM_UP = 0.05
CHECKS = 10
"""How often held-out windows are looked at."""


class _Example(NamedTuple):
    """Windows whose first tokens run, the next rest and the last ones run: states at the stop of those that run, what
    the lens reads of those that rest, and the dense model's final states of the last ones."""

    running: Float[Array, "windows running hidden"]
    resting: tuple[Float[Array, "windows resting hidden"], ...]
    final: Float[Array, "windows last hidden"]


@dataclass(frozen=True)
class Tuned:
    """The best map on held-out windows, and the way there: minutes, steps, KL divergence on held-out windows (nats per
    token), of which the first is the closed form's."""

    map: DirectMap
    curve: list[dict[str, float]]


def tune(
    model: CausalLM,
    start: DirectMap,
    seen: Seen,
    minutes: float,
    *,
    peak: float = PEAK,
    seed: int = 0,
    keep: Callable[[Tuned], None] = lambda tuned: None,
    advance: Callable[..., None] = lambda n=1: None,
) -> Tuned:
    """A better map from a given one.

    Args:
        model: the network.
        start: the map to begin with.
        seen: what the dense model showed on windows, the final states of the last tokens among it.
        minutes: how long, compilation apart.
        peak: the highest learning rate.
        seed: of the order of windows.
        keep: called with the best so far whenever it is better: where to write it down.
        advance: called after every check of the held-out windows, of which there are `CHECKS` and one.

    What is not better on held-out windows is not kept: the result is never worse there than `start`.
    """
    windows = len(seen.tokens)
    held_out = [row for row in range(windows) if is_held_out(row, windows)]
    used = [row for row in range(windows) if not is_held_out(row, windows)]
    stand_in = lens.stand_in(start, jnp.dtype(jnp.float32))
    moments = optax.scale_by_adam().init(_weights(stand_in))

    def loss(part: DirectKv) -> float:
        return float(np.mean([_divergence(part, model, _example(seen, start, rows)) for rows in _cut(held_out)]))

    best = Tuned(start, [{"minutes": 0.0, "steps": 0, "held_out": loss(stand_in)}])
    advance()
    spent, steps, order = 0.0, 0, _shuffled(used, seed)
    usual = math.inf
    while spent < 60 * minutes:
        began = time.perf_counter()
        rate = peak * _rate(spent / (60 * minutes))
        stand_in, moments = _step(stand_in, moments, model, _example(seen, start, next(order)), jnp.float32(rate))
        jax.block_until_ready(stand_in)
        took, steps = time.perf_counter() - began, steps + 1
        if steps > 1:  # the first one compiles
            usual = min(usual, took)
            spent += min(took, _STALLED * usual)
        if spent >= 60 * minutes * len(best.curve) / CHECKS:
            found = loss(stand_in)
            better = found < min(point["held_out"] for point in best.curve)
            best.curve.append({"minutes": spent / 60, "steps": steps, "held_out": found})
            if better:
                best = replace(best, map=_map(stand_in))
                keep(best)
            advance()
    return best


def _rate(share: float) -> float:
    """Of the peak, after a share of the time."""
    return min(1.0, share / _WARM_UP + 0.05) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _cut(rows: list[int]) -> list[list[int]]:
    """A batch at a time; the last ones are left out where they are fewer, so that all have one program."""
    size = min(_BATCH, len(rows))
    return [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]


def _shuffled(rows: list[int], seed: int) -> Iterator[list[int]]:
    """Batches for ever, in another order every time round."""
    rng = np.random.default_rng(seed)
    while True:
        yield from _cut(rng.permutation(rows).tolist())


def _example(seen: Seen, of: DirectMap, rows: list[int]) -> _Example:
    """Some windows."""
    at, last = np.asarray(rows), seen.final.shape[1]
    end = seen.tokens.shape[1] - last
    stopped = seen.states[of.stop][at]
    running = jnp.concatenate([stopped[:, :SINKS], stopped[:, end:]], axis=1)
    resting = tuple(seen.states[layer][at, SINKS:end] for layer in of.inputs)
    return _Example(running, resting, seen.final[at])


def _weights(stand_in: DirectKv) -> tuple[Array, ...]:
    return tuple(part.get_value() for part in (stand_in.down, *stand_in.up, *stand_in.bias))


def _with_weights(stand_in: DirectKv, weights: tuple[Array, ...]) -> DirectKv:
    layers = len(stand_in.up)
    down, up, bias = weights[0], weights[1 : 1 + layers], weights[1 + layers :]
    return DirectKv(stand_in.inputs, down, list(up), list(bias))


def _map(stand_in: DirectKv) -> DirectMap:
    layers = len(stand_in.up)
    down, *rest = (np.asarray(part, np.float32) for part in _weights(stand_in))
    return DirectMap(stand_in.inputs, down, np.stack(rest[:layers]), np.stack(rest[layers:]))


@partial(jax.jit, donate_argnames=("stand_in", "moments"))
def _step(
    stand_in: DirectKv, moments: optax.OptState, model: CausalLM, example: _Example, rate: Float[Array, ""]
) -> tuple[DirectKv, optax.OptState]:
    weights = _weights(stand_in)
    slopes = jax.grad(lambda w: _divergence(_with_weights(stand_in, w), model, example))(weights)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        moves, moments = optax.scale_by_adam().update(slopes, moments)
    return _with_weights(stand_in, jax.tree.map(lambda w, move: w - rate * move, weights, moves)), moments


@jax.jit
def _divergence(stand_in: DirectKv, model: CausalLM, example: _Example) -> Float[Array, ""]:
    """KL divergence from the dense model's next tokens, in nats, mean over the last tokens of the windows."""
    states = _through(stand_in, model, example)[:, SINKS:]
    dense = jax.nn.log_softmax(jax.lax.stop_gradient(model.head(example.final)), axis=-1)
    found = jax.nn.log_softmax(model.head(states), axis=-1)
    return (jnp.exp(dense) * (dense - found)).sum(axis=-1).mean()


def _through(stand_in: DirectKv, model: CausalLM, example: _Example) -> Hidden:
    """Final states of those that run, which see of the others what the lens leaves."""
    windows, resting, _ = example.resting[0].shape
    places = jnp.arange(resting + example.running.shape[1], dtype=jnp.int32)
    rests = places[SINKS : SINKS + resting]
    runs = jnp.concatenate([places[:SINKS], places[SINKS + resting :]])
    sees = (rests[None, None, :] <= runs[None, :, None]), (runs[None, None, :] <= runs[None, :, None])
    at_rest, running = (jnp.broadcast_to(part, (windows, len(part))) for part in (rests, runs))
    latent, states = stand_in.latent(example.resting), example.running
    for number in range(stand_in.stop, len(model.blocks)):
        block = model.blocks[number]
        k, v = jnp.split(stand_in.features(number, latent), 2, axis=-1)
        left = new_segment(*block.placed(k, v, at_rest), sees[0])
        k, v = block.kv(states, running)
        view = left, new_segment(k, v, sees[1])
        states = block.run_over(states, running, view, k, v).hidden_states
    return states
