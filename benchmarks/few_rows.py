"""What do more rows, or more tokens of a row, cost in one pass, when the weights are read once either way?

    python -m benchmarks.few_rows            # SmolLM2, float32 and bfloat16; adds to benchmarks/results/few_rows.json
    python -m benchmarks.few_rows --model llama-1.1b --dtype bfloat16
    python -m benchmarks.few_rows --part prompts       # prompts of 512 tokens, of one row and of eight
    python -m benchmarks.few_rows --part mixed         # steps of codes whose rows are read at different bits
    python -m benchmarks.few_rows --quick    # float32, two rounds, nothing written

Passes of the dense model and its head over a cache of 512 tokens: of 1, 3, 5 and 9 tokens of one row, as exact mode
verifies drafts, and of one token of 2, 4 and 8 rows, as a batch decodes. Each with the backend's own products and with
those that `qs_jax.lanes` takes where it fits, in turn. Keys and values are random, and nothing is written to the cache:
its writes are small, and outside what is compared. Prompts are whole requests of one new token. Rows of mixed bits cost
a product for each that occurs: two products of eight rows were expected to take 1.8 to 2 times the time of one at 8
bits, as with so many rows writing weights out and multiplying cost more than reading codes.

Predictions for an EPYC without AMX, from products alone (float32 of 576 inputs: 5.3, 7.6, 10.6 and
13.6 ms for 1, 2, 5 and 9 rows; in lanes 6.0 for 2 and 9.0 for 5; bfloat16, one row: 190 us a kernel against 80): two
rows of float32 at 1.1 of one, five at 1.6 (2.0 without lanes), nine and eight as before, as they do not go in lanes;
one row of bfloat16 in two thirds of the time, so that ratios to it get worse where its passes get no faster.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleaved, read_result, stamp, write_result
from benchmarks.shapes import NAMES, model_named, nested_model
from benchmarks.speed import our_generate, same_prompts
from qs_jax import kernels
from qs_jax.cache import Cache, allocate, segment
from qs_jax.kernels import at_bits
from qs_jax.model import Model
from qs_jax.models import alike
from qs_jax.models.base import CausalLM

CONTEXT, STEPS = 512, 8
PASSES = ((1, 1), (1, 3), (1, 5), (1, 9), (2, 1), (4, 1), (8, 1))
"""Rows, and tokens of each."""

SIDES = ("lanes", "backend")

PROMPT_ROWS, MIXED_ROWS = (1, 8), (2, 8)


def filled_cache(model: Model, rows: int) -> Cache:
    """Random keys and values of `CONTEXT` tokens."""
    config, random = model.config, np.random.default_rng(0)
    layers = []
    for _ in range(config.num_hidden_layers):
        layer = allocate(config, rows, CONTEXT, model.network.embedding.table.dtype)
        some = jnp.asarray(random.standard_normal(layer.keys.shape), layer.keys.dtype)
        layers.append(replace(layer, keys=some, values=some, lengths=jnp.full(rows, CONTEXT, jnp.int32)))
    return tuple(layers)


def passes(network: CausalLM, cache: Cache, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """`STEPS` passes, each over the tokens that the one before found most likely."""

    def one(ids: jax.Array, _: None) -> tuple[jax.Array, None]:
        hidden_states, read = network.embed(ids, positions), jnp.zeros((), jnp.float32)
        for block, layer in zip(network.blocks, cache, strict=True):
            output = alike.run(block, hidden_states, positions, (segment(layer),))
            hidden_states = output.hidden_states
            read += output.k[0, 0, 0, 0].astype(jnp.float32) + output.v[0, 0, 0, 0].astype(jnp.float32)
        chosen = jnp.argmax(network.head(hidden_states), axis=-1).astype(jnp.int32)
        return jnp.where(read > jnp.inf, ids, chosen), None

    return jax.lax.scan(one, ids, None, length=STEPS)[0]


def compiled(model: Model, rows: int, tokens: int, side: str) -> Callable[[], Any]:
    """A call that runs the passes with the products of one side."""
    ids = jnp.asarray(np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, tokens)), jnp.int32)
    positions = jnp.broadcast_to(CONTEXT + jnp.arange(tokens, dtype=jnp.int32), ids.shape)
    given = (model.network, filled_cache(model, rows), ids, positions)
    chosen = kernels.lanes_for
    jax.clear_caches()  # else products traced for the other side would be taken
    try:
        if side == "backend":
            kernels.lanes_for = lambda rows, weights: None
        program = jax.jit(passes).lower(*given).compile()
    finally:
        kernels.lanes_for = chosen
    return partial(lambda: program(*given).block_until_ready())


def prompt_ms(model: Model, rounds: int) -> dict[str, float]:
    """A prompt of `CONTEXT` tokens to its first new one, by how many rows go together."""
    sides = {str(rows): partial(our_generate(model), same_prompts(model, rows, CONTEXT), 1) for rows in PROMPT_ROWS}
    seconds = interleaved(sides, rounds)
    return {rows: 1e3 * statistics.median(values) for rows, values in seconds.items()}


def mixed_ms(model: Model, rounds: int) -> dict[str, float]:
    """Steps of codes of two and of eight rows, all at 8 bits, all at 4, and half of them at each."""
    network, calls = nested_model(model).network, dict[str, Callable[[], Any]]()
    for rows in MIXED_ROWS:
        half = jnp.asarray([8] * (rows // 2) + [4] * (rows - rows // 2), jnp.int32)
        for name, bits in (("8 bits", 8), ("4 bits", 4), ("mixed", half)):
            read = replace(model, network=at_bits(network, bits))
            calls[f"{rows} rows, {name}"] = compiled(read, rows, 1, "lanes")
    return {name: 1e3 * statistics.median(taken) / STEPS for name, taken in interleaved(calls, rounds).items()}


def pass_ms(model: Model, rounds: int) -> list[dict[str, float]]:
    """Every pass, with the products of each side."""
    calls = {(*one, side): compiled(model, *one, side) for one in PASSES for side in SIDES}
    names = {f"{rows} x {tokens} {side}": (rows, tokens, side) for rows, tokens, side in calls}
    seconds = interleaved({name: calls[key] for name, key in names.items()}, rounds)
    ms = {names[name]: 1e3 * statistics.median(values) / STEPS for name, values in seconds.items()}
    return [
        {"rows": rows, "tokens": tokens, **{f"{side}_ms": ms[rows, tokens, side] for side in SIDES}}
        for rows, tokens in PASSES
    ]


PARTS: dict[str, Callable[[Model, int], Any]] = {"passes": pass_ms, "prompts": prompt_ms, "mixed": mixed_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", choices=NAMES)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--part", choices=tuple(PARTS), default="passes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="float32, two rounds, nothing written")
    arguments = parser.parse_args()
    part, rounds, result = arguments.part, 2 if arguments.quick else arguments.rounds, read_result("few_rows")
    for dtype in ["float32"] if arguments.quick else arguments.dtype:
        found = PARTS[part](model_named(arguments.model, dtype), rounds)
        print(f"{arguments.model} {dtype} {found}", flush=True)
        facts = {**stamp(), "rounds": rounds}
        result.setdefault(part, {})[f"{arguments.model} {dtype}, {facts['cpu']}"] = {**facts, part: found}
    if not arguments.quick:
        print(write_result("few_rows", {**result, "context": CONTEXT}))


if __name__ == "__main__":
    main()
