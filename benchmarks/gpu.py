"""A 7-billion-parameter Llama shape on one accelerator: how close to its memory, and what conditionals cost there.

    python -m benchmarks.gpu              # every study; adds to benchmarks/results/gpu.json as each is done
    python -m benchmarks.gpu segments     # one of decode, planes, prefill, segments, torch
    python -m benchmarks.gpu --smoke      # all of it on a toy shape, on any device, nothing written

Llama-2-7B shape, bfloat16, random weights.

* decode: tokens/s at batch 1, 8 and 32, and the share of the bandwidth that a matrix-vector product reaches there;
* planes: the same weights as nested codes, read at 8 and 4 bits;
* prefill: time to the first token of 1,024 and 4,096 tokens, dense and under the `balanced` policy;
* segments: a step through the layers in segments of 1, 2, 4, … layers behind conditionals, all run or all skipped,
  against the same layers without conditionals: the smallest segment that costs nothing is the one to use;
* torch: transformers on the same card, eager and compiled.

Prediction, before the first run on a card: a conditional costs a round trip to the host, 20 to 50 microseconds; a
layer of this shape takes about 100, so segments of 4 layers keep the cost under a tenth.
"""

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from benchmarks.harness import interleaved, median_ratio, read_result, summary, write_result
from benchmarks.shapes import SHAPES, nested_model, random_model
from benchmarks.speed import our_generate, same_prompts
from qs_jax.evaluation.benchmark import benchmark
from qs_jax.model import Model
from qs_jax.models import CausalLM

SMOKE = {
    **SHAPES["llama-2-7b"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_STEPS = 16


def decode(model: Model, smoke: bool) -> dict[str, Any]:
    """Dense decoding at three batch sizes."""
    return {str(batch): _decoding(model, batch, smoke) for batch in ((1, 2) if smoke else (1, 8, 32))}


def planes(model: Model, smoke: bool) -> dict[str, Any]:
    """Nested codes at two precisions."""
    nested = nested_model(model)
    batches = (1,) if smoke else (1, 8)
    return {f"{bits}-bit/{batch}": _decoding(nested, batch, smoke, bits=bits) for bits in (8, 4) for batch in batches}


def _decoding(model: Model, batch: int, smoke: bool, **settings: Any) -> dict[str, Any]:
    figures = benchmark(model, batch=batch, prompt_tokens=32, new_tokens=16 if smoke else 128, **settings)
    return {name: value for name, value in figures.items() if name != "ledger"}


def prefill(model: Model, smoke: bool) -> dict[str, Any]:
    """Time to the first token, dense and staged."""
    sides = {"dense": our_generate(model), "balanced": our_generate(model, policy="balanced")}
    result = {}
    for tokens in (64,) if smoke else (1024, 4096):
        prompts = same_prompts(model, 1, tokens)
        calls = {name: partial(side, prompts, 1) for name, side in sides.items()}
        seconds = interleaved(calls, 2 if smoke else 7)
        speedup = median_ratio(seconds["dense"], seconds["balanced"])
        result[str(tokens)] = {**{name: summary(s) for name, s in seconds.items()}, "speedup": speedup}
    return result


@partial(jax.jit, static_argnames="size")
def descend(
    network: CausalLM, hidden_states: Float[Array, "batch 1 hidden"], runs: Bool[Array, " segments"], *, size: int
) -> Float[Array, "batch 1 hidden"]:
    """Steps through all layers, in segments behind conditionals; size 0 leaves the conditionals out.

    There is no cache: a token sees itself only, so that weights are all that is read.
    """
    positions = jnp.zeros(hidden_states.shape[:2], jnp.int32)

    def run(blocks: list[Any], h: Array) -> Array:
        for block in blocks:
            h = block.run(h, positions, ())[0]
        return h

    def step(h: Array, _: None) -> tuple[Array, None]:
        blocks, stride = list(network.blocks), size or len(network.blocks)
        for index, start in enumerate(range(0, len(blocks), stride)):
            segment = partial(run, blocks[start : start + stride])
            h = segment(h) if size == 0 else jax.lax.cond(runs[index], segment, lambda h: h, h)
        return h / jnp.sqrt(jnp.square(h).mean(axis=-1, keepdims=True)), None

    return jax.lax.scan(step, hidden_states, length=_STEPS)[0]


def segments(model: Model, smoke: bool) -> dict[str, Any]:
    """Milliseconds per step by segment size, all run and all skipped, and what one conditional costs."""
    layers = model.config.num_hidden_layers
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if size <= layers]
    hidden = jnp.ones((1, 1, model.config.hidden_size), model.dtype)

    def call(size: int, runs: bool) -> Callable[[], Any]:
        flags = jnp.full(-(-layers // size) if size else 1, runs)
        return lambda: descend(model.network, hidden, flags, size=size).block_until_ready()

    calls = {"0/run": call(0, True)}
    calls |= {f"{size}/{name}": call(size, runs) for size in sizes for name, runs in (("run", True), ("skip", False))}
    seconds = {name: [s / _STEPS for s in values] for name, values in interleaved(calls, 2 if smoke else 15).items()}
    plain = statistics.median(seconds["0/run"])
    per_conditional = {
        size: 1e6 * (statistics.median(seconds[f"{size}/run"]) - plain) / -(-layers // size) for size in sizes
    }
    return {"step": {name: summary(s) for name, s in seconds.items()}, "conditional_us": per_conditional}


def torch(model: Model, smoke: bool) -> dict[str, Any] | None:
    """transformers on the same shape and card, eager and compiled; None where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch as th
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if th.cuda.is_available() else "cpu"
    raw = SMOKE if smoke else SHAPES["llama-2-7b"]
    with th.device(device):
        peer: Any = LlamaForCausalLM(LlamaConfig(**raw)).to(getattr(th, str(model.dtype))).eval()

    def request(batch: int, new: int, **settings: Any) -> None:
        tokens = th.ones((batch, 32), dtype=th.long, device=device)
        lengths = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with th.inference_mode():
            peer.generate(tokens, attention_mask=th.ones_like(tokens), **lengths, **settings)
        if device == "cuda":
            th.cuda.synchronize()

    ways: dict[str, dict[str, Any]] = {"eager": {}}
    if device == "cuda":
        ways["compiled"] = {"cache_implementation": "static"}
    steps, rounds = (16, 1) if smoke else (128, 3)
    result: dict[str, Any] = {"device": device}
    for batch in (1,) if smoke else (1, 8, 32):
        for way, settings in ways.items():
            calls = {str(n): partial(request, batch, n, **settings) for n in (steps + 1, 1)}
            seconds = interleaved(calls, rounds)
            step = [(a - b) / steps for a, b in zip(seconds[str(steps + 1)], seconds["1"], strict=True)]
            result[f"{way}/{batch}"] = {**summary(step), "tokens_per_second": batch / statistics.median(step)}
    return result


STUDIES: dict[str, Callable[[Model, bool], Any]] = {
    "decode": decode,
    "planes": planes,
    "prefill": prefill,
    "segments": segments,
    "torch": torch,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="*", choices=[[], *STUDIES], help="which; none: all")
    parser.add_argument("--smoke", action="store_true", help="a toy shape on any device, nothing written")
    arguments = parser.parse_args()
    dtype = "float32" if arguments.smoke else "bfloat16"
    model = random_model(SMOKE if arguments.smoke else SHAPES["llama-2-7b"], "llama-2-7b", dtype)
    found = {} if arguments.smoke else read_result("gpu").get("studies", {})
    for name in arguments.study or STUDIES:
        found[name] = STUDIES[name](model, arguments.smoke)
        print(name, json.dumps(found[name]), flush=True)
        if not arguments.smoke:
            write_result("gpu", {"shape": SHAPES["llama-2-7b"], "dtype": dtype, "studies": found})


if __name__ == "__main__":
    main()
