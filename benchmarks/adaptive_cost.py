"""Does real time follow the ledger? Skipped layers in decode, gathered tokens in prefill, and what being able to costs.

    python -m benchmarks.adaptive_cost                   # writes benchmarks/results/adaptive_cost.json
    python -m benchmarks.adaptive_cost --model smollm2   # the real model; adaptive_cost_smollm2.json
    python -m benchmarks.adaptive_cost --quick           # two rounds, nothing written

A random GPT-2-124M shape in float32 unless another is named, every candidate in turn within each round, ratios round by
round:

* decode, batch 1: all tokens halt after half of the layers, under each K/V rule, against the ideal, which is a model of
  that many layers; and against dense;
* prefill of 1,023 tokens: three quarters of the tokens halt after half of the layers, against dense;
* off: the engine's dense decoding against a plain scan that knows nothing of policies.

Prediction, before the first run: decode 1.05 × ideal under `drop` and 1.2 × under `frozen` (keys and values are a sixth
of a block); prefill 1.5 × under `drop`, 1.35 × under `frozen`; off within 2 % of the plain scan. Before the first run
with `affine` (a 24th of a block more than `frozen`): 1.15 × ideal, prefill 1.4 ×.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import interleaved, median_ratio, summary, write_result
from benchmarks.peers import Generate, Prompts
from benchmarks.shapes import NAMES, SHAPES, model_named
from benchmarks.speed import seconds_per_step
from qs_jax.adaptive.policy import Halting, KvRuleName, Policy
from qs_jax.cache import allocate, append, segment
from qs_jax.engine.compilation import METER
from qs_jax.generation import CHUNK, generate
from qs_jax.lens import Lens, with_lens
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, network_from_arrays
from qs_jax.models.base import CausalLM

INFINITY = float("inf")
PROMPT_TOKENS = 32
LONG_PROMPT = 1023
RULES: tuple[KvRuleName, ...] = ("drop", "zero", "frozen", "affine")


def first_layers(model: Model, layers: int) -> Model:
    """The model cut off after some layers, with a lens that says nothing."""
    config = replace(model.config, num_hidden_layers=layers)
    arrays = {path: a for path, a in arrays_by_path(model.network).items() if _layer_of(path) < layers}
    model = replace(model, config=config, network=network_from_arrays(config, arrays, dtype=model.dtype))
    maps, hidden = layers - 1, config.hidden_size
    shapes = (maps, hidden // 4, hidden), (maps, hidden, hidden // 4), (maps, hidden)
    lens = Lens(*(np.zeros(shape, np.float32) for shape in shapes))
    return replace(model, network=with_lens(model.network, lens))


def _layer_of(path: str) -> int:
    """The layer that an array belongs to; -1 for what is in none."""
    kind, number, *_ = path.split(".")
    return int(number) if kind == "blocks" else -1


def half_depth(rule: KvRuleName, layer: int) -> Policy:
    """Every generated token stops after the layer."""
    return Policy(f"half depth, {rule}", decode_halting=Halting("random", INFINITY, layers=(layer,)), kv_rule=rule)


def quarter_of_the_prompt(rule: KvRuleName, layer: int) -> Policy:
    """A random quarter of the prompt goes on after the layer."""
    halting = Halting("random", 0.75, layers=(layer,))
    return Policy(f"quarter of the prompt, {rule}", prompt_halting=halting, kv_rule=rule)


def side(model: Model, policy: Policy) -> Generate:
    return lambda prompts, new: generate(model, prompts, max_new_tokens=new, eos_token_id=[], policy=policy).tokens


def ledger(model: Model, policy: Policy, prompt: list[int], new_tokens: int) -> dict[str, float]:
    return generate(model, [prompt], max_new_tokens=new_tokens, eos_token_id=[], policy=policy).ledger


def compiling(run: Callable[[], Any]) -> dict[str, float]:
    """Programs and seconds that the first call of something costs."""
    before, started = METER.reading(), time.perf_counter()
    run()
    compiled = METER.since(before)
    return {"programs": compiled.programs, "compile_s": compiled.seconds, "first_call_s": time.perf_counter() - started}


@partial(jax.jit, static_argnames="steps", donate_argnames="cache")
def plain_decode(model: CausalLM, token: jax.Array, cache: Any, start: jax.Array, *, steps: int) -> tuple[Any, Any]:
    """Greedy decoding as one would write it without any of this project's mechanisms."""

    def step(carry: Any, position: jax.Array) -> tuple[Any, jax.Array]:
        token, cache = carry
        positions = jnp.full((1, 1), position, jnp.int32)
        hidden_states, layers = model.embed(token[:, None], positions), []
        for block, layer in zip(model.blocks, cache, strict=True):
            out = block.run(hidden_states, positions, (segment(layer),))
            hidden_states = out.hidden_states
            layers.append(append(layer, out.k, out.v, positions, jnp.ones((1, 1), bool)))
        token = jnp.argmax(model.head(hidden_states[:, 0]), axis=-1).astype(jnp.int32)
        return (token, tuple(layers)), token

    (_, cache), tokens = jax.lax.scan(step, (token, cache), start + jnp.arange(steps, dtype=jnp.int32))
    return tokens, cache


def plain_side(model: Model, capacity: int) -> Generate:
    """The plain scan over as many steps as the engine runs for `new_tokens`, chunk by chunk, read back as it is."""

    def run(prompts: Prompts, new_tokens: int) -> Prompts:
        cache = tuple(allocate(model.config, 1, capacity, model.dtype) for _ in model.network.blocks)
        cache = tuple(replace(layer, lengths=layer.lengths + PROMPT_TOKENS) for layer in cache)
        for start in range(0, new_tokens - 1, CHUNK):
            at = jnp.int32(PROMPT_TOKENS + start)
            tokens, cache = plain_decode(model.network, jnp.ones(1, jnp.int32), cache, at, steps=CHUNK)
            jax.device_get(tokens)
        return prompts

    return run


def measure_decode(model: Model, half: Model, prompt: list[int], steps: int, rounds: int) -> dict[str, Any]:
    middle = half.config.num_hidden_layers
    sides = {
        "dense": side(model, Policy.off()),
        "ideal": side(half, Policy.off()),
        "plain scan": plain_side(model, 256),
        **{rule: side(model, half_depth(rule, middle)) for rule in RULES},
    }
    compiled = {name: compiling(partial(run, [prompt], steps + 1)) for name, run in sides.items()}
    seconds = seconds_per_step(sides, [prompt], steps, rounds)
    return {
        "step": {name: summary(values) for name, values in seconds.items()},
        "over_ideal": {rule: median_ratio(seconds[rule], seconds["ideal"]) for rule in RULES},
        "speedup": {rule: median_ratio(seconds["dense"], seconds[rule]) for rule in RULES},
        "off_over_plain_scan": median_ratio(seconds["dense"], seconds["plain scan"]),
        "compilation": compiled,
        "ledger": {rule: ledger(model, half_depth(rule, middle), prompt, steps + 1) for rule in RULES},
    }


def measure_prefill(model: Model, prompt: list[int], rounds: int) -> dict[str, Any]:
    adaptive = {rule: quarter_of_the_prompt(rule, model.config.num_hidden_layers // 2) for rule in RULES}
    policies: Mapping[str, Policy] = {"dense": Policy.off(), **adaptive}
    runs = {name: partial(side(model, policy), [prompt], 1) for name, policy in policies.items()}
    compiled = {name: compiling(run) for name, run in runs.items()}
    seconds = interleaved(runs, rounds)
    return {
        "prefill": {name: summary(values) for name, values in seconds.items()},
        "speedup": {rule: median_ratio(seconds["dense"], seconds[rule]) for rule in RULES},
        "compilation": compiled,
        "ledger": {rule: ledger(model, policy, prompt, 1) for rule, policy in adaptive.items()},
    }


def table(decode: Mapping[str, Any], prefill: Mapping[str, Any]) -> str:
    lines = ["| | decode, ms/step | over ideal | over dense | 1,023-token prefill, ms | faster than dense |"]
    lines.append("|---|---|---|---|---|---|")
    for rule in RULES:
        lines.append(
            f"| `{rule}` | {decode['step'][rule]['median_ms']:.1f} | {decode['over_ideal'][rule]:.2f} × | "
            f"{1 / decode['speedup'][rule]:.2f} × | {prefill['prefill'][rule]['median_ms']:.0f} | "
            f"{prefill['speedup'][rule]:.2f} × |"
        )
    ideal, dense = (decode["step"][name]["median_ms"] for name in ("ideal", "dense"))
    whole = prefill["prefill"]["dense"]["median_ms"]
    lines.append(f"| dense | {dense:.1f} | {dense / ideal:.2f} × | 1 | {whole:.0f} | 1 |")
    lines.append(f"| half of the layers (ideal) | {ideal:.1f} | 1 | {ideal / dense:.2f} × | – | – |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-124m", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="two rounds, nothing written")
    arguments = parser.parse_args()
    steps, rounds = (CHUNK, 2) if arguments.quick else (CHUNK, 7)
    named = model_named(arguments.model)
    depth = named.config.num_hidden_layers
    model = first_layers(named, depth)
    rng = np.random.default_rng(0)
    short, long = (rng.integers(0, model.config.vocab_size, n).tolist() for n in (PROMPT_TOKENS, LONG_PROMPT))
    decode = measure_decode(model, first_layers(named, depth // 2), short, steps, rounds)
    prefill = measure_prefill(model, long, max(2, rounds // 2))
    print(table(decode, prefill))
    print(f"off: {decode['off_over_plain_scan']:.3f} × a plain scan without policies")
    if not arguments.quick:
        settings = {"model": arguments.model, "dtype": "float32", "steps": steps, "rounds": rounds}
        name = "adaptive_cost" if arguments.model in SHAPES else f"adaptive_cost_{arguments.model}"
        print(write_result(name, {"settings": settings, "decode": decode, "prefill": prefill}))


if __name__ == "__main__":
    main()
