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
from qs_jax.evaluation.resting import Divided, taken, through
from qs_jax.lens import DirectMap
from qs_jax.models.base import CausalLM
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
    """Windows of which some tokens rest: states at the stop of those that run, what the lens reads of those that rest,
    and the dense model's final states of the last ones."""

    divided: Divided
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
    share: float = 0.0,
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
        share: of the tokens that might rest those that run, the rarest: what `protect_rare` spares.
        peak: the highest learning rate.
        seed: of the order of windows.
        keep: called with the best so far whenever it is better: where to write it down.
        advance: called after every check of the held-out windows, of which there are `CHECKS` and one.

    What is not better on held-out windows is not kept: the result is never worse there than `start`.
    """
    windows = len(seen.tokens)
    held_out = [row for row in range(windows) if is_held_out(row, windows)]
    used = [row for row in range(windows) if not is_held_out(row, windows)]
    parts = divided(seen, share, model.config.vocab_size)
    stand_in = lens.stand_in(start, jnp.dtype(jnp.float32))
    moments = optax.scale_by_adam().init(_weights(stand_in))

    def example(rows: list[int]) -> _Example:
        return _example(seen, start, Divided(parts.runs[rows], parts.rests[rows]), rows)

    def loss(part: DirectKv) -> float:
        return float(np.mean([_divergence(part, model, example(rows)) for rows in _cut(held_out)]))

    best = Tuned(start, [{"minutes": 0.0, "steps": 0, "held_out": loss(stand_in)}])
    advance()
    spent, steps, order = 0.0, 0, _shuffled(used, seed)
    usual = math.inf
    while spent < 60 * minutes:
        began = time.perf_counter()
        rate = peak * _rate(spent / (60 * minutes))
        stand_in, moments = _step(stand_in, moments, model, example(next(order)), jnp.float32(rate))
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


def divided(seen: Seen, share: float, vocab_size: int) -> Divided:
    """The first and last tokens of windows run, and a share of the others, the rarest; as many in every window."""
    tokens, last = np.asarray(seen.tokens), seen.final.shape[1]
    rarity = lens.rarity_of(tokens, vocab_size)[tokens]
    rarity[:, :SINKS] = rarity[:, tokens.shape[1] - last :] = np.inf
    running = SINKS + last + round(share * (tokens.shape[1] - SINKS - last))
    runs = np.zeros(tokens.shape, bool)
    np.put_along_axis(runs, np.argsort(-rarity, axis=1, kind="stable")[:, :running], True, axis=1)
    return Divided.by(runs)


def _example(seen: Seen, of: DirectMap, parts: Divided, rows: list[int]) -> _Example:
    """Some windows, divided."""
    at = np.asarray(rows)
    resting = tuple(taken(seen.states[layer][at], parts.rests) for layer in of.inputs)
    return _Example(parts, taken(seen.states[of.stop][at], parts.runs), resting, seen.final[at])


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
    last = example.final.shape[1]
    states = through(stand_in, model, example.divided, example.running, example.resting)[:, -last:]
    dense = jax.nn.log_softmax(jax.lax.stop_gradient(model.head(example.final)), axis=-1)
    found = jax.nn.log_softmax(model.head(states), axis=-1)
    return (jnp.exp(dense) * (dense - found)).sum(axis=-1).mean()
