"""Layers of the real model run again with the keys and values of chosen tokens forced: any choice can be tried so, also
what no policy could make. What `benchmarks.resting` is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.kv_rules import KvRule
from qs_jax.cache import bucket
from qs_jax.model import Model
from qs_jax.models.attention import new_segment
from qs_jax.models.base import Block, CausalLM, Heads, Hidden

PROMPT, SCORED, FIRST, LAST = 512, 64, 4, 64
"""Tokens of a prompt and behind it, and of the prompt's start and end, which run through all layers."""

Tokens = Int[Array, "windows tokens"]
Rests = Bool[np.ndarray, "windows tokens"]
Losses = Float[np.ndarray, "windows scored"]


@dataclass(frozen=True)
class Seen:
    """Of the dense model over some windows: states after 0, 1, … layers, and what every scored token costs, in nats."""

    tokens: Tokens
    states: tuple[Hidden, ...]
    nll: Losses


def places(states: Hidden) -> Tokens:
    return jnp.broadcast_to(jnp.arange(states.shape[1], dtype=jnp.int32), states.shape[:2])


@jax.jit
def layer(block: Block, states: Hidden) -> Hidden:
    """A dense layer."""
    return block.run(states, places(states), ()).hidden_states


@jax.jit
def layer_over(block: Block, states: Hidden, left: tuple[Heads, Heads], rests: Bool[Array, "windows tokens"]) -> Hidden:
    """A layer in which those that rest leave other keys and values; their states mean nothing from there on."""
    own, at = block.kv(states, places(states)), rests[..., None, None]
    k, v = (jnp.where(at, other, mine) for other, mine in zip(left, own, strict=True))
    return block.run_over(states, places(states), (new_segment(k, v),), k, v).hidden_states


@jax.jit
def losses(model: CausalLM, states: Hidden, tokens: Tokens) -> Float[Array, "windows scored"]:
    """What the scored tokens cost, from final states."""
    logprobs = jax.nn.log_softmax(model.head(states[:, PROMPT - 1 : -1]), axis=-1)
    return -jnp.take_along_axis(logprobs, tokens[:, PROMPT:, None], axis=-1)[..., 0]


def seen(model: CausalLM, ids: Int[np.ndarray, "windows tokens"]) -> Seen:
    """What the dense model shows on windows."""
    tokens = jnp.asarray(ids, jnp.int32)
    states = [model.embed(tokens, places(tokens))]
    for block in model.blocks:
        states.append(layer(block, states[-1]))
    return Seen(tokens, tuple(states), np.asarray(losses(model, states[-1], tokens)))


def left_by(model: CausalLM, rule: KvRule, stop: int, of: Seen) -> list[tuple[Heads, Heads]]:
    """Keys and values that tokens leave in every layer from a stop on, by a K/V rule that carries no state on."""
    aside = tuple(of.states[number] for number in rule.looks_back(model))
    kept = rule.settle(model, stop, of.states[stop], aside)
    layers = enumerate(model.blocks[stop:], start=stop)
    return [rule.kv(model, number, block, kept, places(of.states[stop])) for number, block in layers]


def resting(model: CausalLM, left: Sequence[tuple[Heads, Heads]], of: Seen, rests: Rests) -> Losses:
    """What scored tokens cost where some prompt tokens rest from the first of the layers on that `left` has."""
    stop = len(model.blocks) - len(left)
    states, at_rest = of.states[stop], jnp.asarray(rests)
    for block, one in zip(model.blocks[stop:], left, strict=True):
        states = layer_over(block, states, one, at_rest)
    return np.asarray(losses(model, states, of.tokens))


def all_but(last: int, windows: int) -> Rests:
    """Every prompt token rests but the first and the last ones."""
    rests = np.zeros((windows, PROMPT + SCORED), bool)
    rests[:, FIRST : PROMPT - last] = True
    return rests


def but_highest(values: Float[np.ndarray, "windows tokens"], share: float, last: int) -> Rests:
    """The same, and of those that might rest a share, which shows the highest values, does not: as many of every
    window."""
    rests = all_but(last, len(values))
    among = values[:, FIRST : PROMPT - last]
    highest = np.argsort(-among, axis=1, kind="stable")[:, : round(share * among.shape[1])]
    np.put_along_axis(rests, FIRST + highest, False, axis=1)
    return rests


def dense_flops(model: Model) -> int:
    """Of a request, as the ledger counts but for padding: of a prompt's last layer keys and values alone but for one
    token, and the head for every token to come."""
    costs = Costs.of(model.network)
    depth, per_slot, last = len(costs.layers), costs.attention_flops_per_slot, costs.layers[-1]
    layers = sum(one.flops for one in costs.layers)
    prompt = PROMPT * (layers - last.flops + last.kv_flops + per_slot * PROMPT * (depth - 1))
    slots = bucket(PROMPT + SCORED, model.config.max_position_embeddings)
    generated = (SCORED - 1) * (layers + per_slot * (slots + 1) * depth) + last.flops + per_slot * PROMPT
    return prompt + generated + costs.head_flops * SCORED


def saved(model: Model, rule: KvRule, stop: int, rests: int) -> float:
    """The share of these that is saved where so many prompt tokens rest after so many layers, by a K/V rule."""
    costs = Costs.of(model.network)
    depth = len(costs.layers)
    ran = sum(one.flops + costs.attention_flops_per_slot * PROMPT for one in costs.layers[stop:-1])
    ran += costs.layers[-1].kv_flops
    instead = rule.settle_flops(costs, stop) + sum(rule.kv_flops(costs, number) for number in range(stop, depth))
    return rests * (ran - instead) / dense_flops(model)


def outcome(found: Mapping[str, Sequence[Losses]], dense: Sequence[Losses]) -> dict[str, dict[str, float]]:
    """By name, nats per token above the dense model's, their standard error over windows, and points of perplexity."""
    base = np.concatenate(dense)
    result = {}
    for name, parts in found.items():
        nll = np.concatenate(parts)
        above = (nll - base).mean(axis=1)
        result[name] = {
            "nats": float(above.mean()),
            "error": float(above.std(ddof=1) / np.sqrt(len(above))),
            "points": float(np.exp(nll.mean()) - np.exp(base.mean())),
            "windows": len(above),
        }
    return result
