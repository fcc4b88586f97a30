"""Tokens that run on where others rest under the direct lens: all layers from a stop on, for known text at once.

What the engine makes of windows whose prompt tokens stop, without its decode steps: text that follows is known, so that
all of it runs in one pass, and policies share the layers before their stops. Tuning needs the slope of this,
calibration the scores of many policies.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.policy import Policy
from qs_jax.cache import bucket
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.perplexity import Advance
from qs_jax.evaluation.statistics import PerWindow
from qs_jax.evaluation.windows import Window
from qs_jax.fitting.activations import embedded, run_all
from qs_jax.generation import not_finite
from qs_jax.model import Model
from qs_jax.models.attention import new_segment
from qs_jax.models.base import CausalLM, Hidden
from qs_jax.models.layers import DirectKv
from qs_jax.request import bind_policy
from qs_jax.sharding import on_host

_SMALLEST, _PER_OCTAVE = 16, 4
"""Widths of groups, so that policies that spare about as many tokens share a program."""


class Divided(NamedTuple):
    """The places of the tokens that run and of those that rest, rising; -1 where a window has fewer than others."""

    runs: Int[Array | np.ndarray, "windows running"]
    rests: Int[Array | np.ndarray, "windows resting"]

    @classmethod
    def by(cls, running: Bool[np.ndarray, "windows tokens"], width: Callable[[int], int] = int) -> "Divided":
        """Those that run, and all others; `width` makes room for so many."""

        def placed(chosen: Bool[np.ndarray, "windows tokens"]) -> Int[np.ndarray, "windows width"]:
            room = width(int(chosen.sum(axis=1).max()))
            at = np.where(chosen, np.arange(chosen.shape[1], dtype=np.int32), np.int32(-1))
            padded = np.pad(np.sort(at, axis=1), ((0, 0), (room, 0)), constant_values=-1)
            return padded[:, padded.shape[1] - room :]

        return cls(placed(running), placed(~running))


def taken(states: Hidden, places: Int[Array | np.ndarray, "windows some"]) -> Float[Array, "windows some hidden"]:
    """The states at these places."""
    return jnp.take_along_axis(states, jnp.maximum(jnp.asarray(places), 0)[..., None], axis=1)


def through(
    stand_in: DirectKv,
    model: CausalLM,
    divided: Divided,
    running: Float[Array, "windows running hidden"],
    resting: Sequence[Float[Array, "windows resting hidden"]],
) -> Float[Array, "windows running hidden"]:
    """Final states of those that run, which see of the others what the lens leaves.

    Args:
        stand_in: the lens for the stop.
        model: the network.
        divided: who runs and who rests.
        running: states at the stop of those that run.
        resting: of those that rest, states after as many layers as the lens's `inputs` say.
    """
    runs, rests = (jnp.asarray(part, jnp.int32) for part in divided)
    sees_resting, sees_running = (
        (places >= 0)[:, None, :] & (places[:, None, :] <= runs[:, :, None]) for places in (rests, runs)
    )
    sees_running |= jnp.eye(runs.shape[1], dtype=bool)  # what is no token, too, must see something
    at_rest, at = (jnp.maximum(places, 0) for places in (rests, runs))
    latent, states = stand_in.latent(resting), running
    for number in range(stand_in.stop, len(model.blocks)):
        block = model.blocks[number]
        k, v = jnp.split(stand_in.features(number, latent), 2, axis=-1)
        left = new_segment(*block.placed(k, v, at_rest), sees_resting)
        k, v = block.kv(states, at)
        view = left, new_segment(k, v, sees_running)
        states = block.run_over(states, at, view, k, v).hidden_states
    return states


def score_stops(
    model: Model,
    windows: Sequence[Window],
    policies: Mapping[str, Policy],
    *,
    batch: int,
    advance: Advance = lambda n=1: None,
) -> tuple[PerWindow, dict[str, PerWindow]]:
    """Mean negative log-likelihood of every window in nats per token: the dense model's, and by name under policies by
    which no more happens than that all prompt tokens stop that are not protected, after a stop of the direct lens.
    Equal but for rounding to what the compiled steps give that generate.

    Args:
        model, windows: as for `qs_jax.evaluation.scoring.score`.
        policies: by name.
        batch: windows run together.
        advance: called after every batch.

    Raises:
        EvaluationError: scores are NaN or infinite in the model's dtype.
        PolicyError: the model has no lens for a stop.
    """
    bound = {name: bind_policy(model, policy) for name, policy in policies.items()}
    lenses = {name: model.network.direct_from(one.stages[0][1]) for name, one in bound.items()}  # all stop there
    wanted = {layer for lens in lenses.values() for layer in lens.inputs}
    tokens, scored = jnp.asarray([one.prompt + one.scored for one in windows], jnp.int32), len(windows[0].scored)
    parts = {name: _divided(one, tokens, scored) for name, one in bound.items()}
    dense, found = list[np.ndarray](), {name: list[np.ndarray]() for name in policies}
    for first in range(0, len(windows), batch):
        rows = slice(first, first + batch)
        states, final = _dense(model.network, tokens[rows], wanted)
        last = tokens[rows, -scored:]
        dense.append(on_host(_nll(model.network, final[:, -scored - 1 :], last)))
        for name, lens in lenses.items():
            divided = Divided(*(part[rows] for part in parts[name]))
            given = taken(states[lens.stop], divided.runs), [taken(states[n], divided.rests) for n in lens.inputs]
            found[name].append(on_host(_stopped(lens, model.network, divided, *given, last)))
        advance()
    together = np.concatenate(dense), {name: np.concatenate(parts) for name, parts in found.items()}
    if not all(np.isfinite(nll).all() for nll in (together[0], *together[1].values())):
        raise EvaluationError(not_finite(model))
    return together


def _divided(policy: BoundPolicy, tokens: Int[Array, "windows tokens"], scored: int) -> Divided:
    """Of all windows, in groups of the same widths, so that a policy takes one program."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ends = jnp.full(len(tokens), tokens.shape[1] - scored, jnp.int32)
    width = partial(bucket, limit=tokens.shape[1], smallest=_SMALLEST, per_octave=_PER_OCTAVE)
    return Divided.by(on_host(policy.protection.of_prompt(tokens, places, ends)), width)


def _dense(model: CausalLM, tokens: Int[Array, "windows tokens"], wanted: set[int]) -> tuple[dict[int, Hidden], Hidden]:
    """States after so many layers as are wanted, and final ones."""
    states, kept = embedded(model, tokens), dict[int, Hidden]()
    for number, block in enumerate(model.blocks):
        if number in wanted:
            kept[number] = states
        states = run_all(block, states)
    return kept, states


@jax.jit
def _nll(
    model: CausalLM, states: Float[Array, "windows ends hidden"], scored: Int[Array, "windows scored"]
) -> Float[Array, " windows"]:
    """Of the tokens that follow all states but the last one."""
    logprobs = jax.nn.log_softmax(model.head(states[:, :-1]).astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logprobs, scored[..., None], axis=-1)[..., 0].mean(axis=1)


@jax.jit
def _stopped(
    stand_in: DirectKv,
    model: CausalLM,
    divided: Divided,
    running: Float[Array, "windows running hidden"],
    resting: Sequence[Float[Array, "windows resting hidden"]],
    scored: Int[Array, "windows scored"],
) -> Float[Array, " windows"]:
    states = through(stand_in, model, divided, running, resting)
    return _nll(model, states[:, -scored.shape[1] - 1 :], scored)
