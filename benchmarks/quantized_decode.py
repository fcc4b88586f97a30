"""How long does a decode step take at 8, 4 and 2 bits, against float32 in the same run?

    python -m benchmarks.quantized_decode                       # writes results/quantized_decode.json
    python -m benchmarks.quantized_decode --model gpt2-124m     # only this shape; the others stay in the file
    python -m benchmarks.quantized_decode --quick               # two rounds of 8 steps, nothing written

Random weights, and those of the real model (`smollm2`); batch 1, greedy, float32 activations; embedding and head at 8
bits in the quantised model. Time per step as in benchmarks/speed.py, rounds interleaved; speed-up is the median of the
ratios round by round. `plane_bytes` is what a step reads of the planes alone, from the ledger's own account of a block.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import real_model
from benchmarks.harness import read_result, stamp, write_result
from benchmarks.shapes import SHAPES, model_named, nested_model, random_model
from benchmarks.speed import OURS, compared, our_generate, same_prompts, seconds_per_step
from qs_jax.choices import BITS
from qs_jax.console import reporting_errors
from qs_jax.fitting.grid import COMPANDED
from qs_jax.kernels import is_nested, plane_bytes, weights
from qs_jax.model import Model

PROMPT_TOKENS = 16

WIDE = {**SHAPES["llama-2-7b"], "num_hidden_layers": 2, "vocab_size": 2048}
"""Two layers of Llama-2-7B, and a head cut to the share of the weights that it has there."""

MODELS: dict[str, Callable[[], Model]] = {
    real_model.NAME: partial(model_named, real_model.NAME),
    "gpt2-124m": partial(model_named, "gpt2-124m"),
    "llama 4096 wide": partial(random_model, WIDE, "llama 4096 wide"),
}


def row(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """One shape: a step in float32 and at each precision."""
    model = MODELS[name]()
    nested, companded = nested_model(model), nested_model(model, bend=COMPANDED)
    sides = {OURS: our_generate(model)} | {f"{bits} bits": our_generate(nested, bits=bits) for bits in BITS}
    sides |= {f"{bits} bits, companded": our_generate(companded, bits=bits) for bits in BITS}
    seconds = seconds_per_step(sides, same_prompts(model, 1, PROMPT_TOKENS), steps, rounds)
    block = nested.network.blocks[0]
    scales = sum(k.scales.nbytes // 3 + k.offsets.nbytes // 3 for k in weights(block) if is_nested(k))
    dense = sum(leaf.nbytes for leaf in weights(block) if not is_nested(leaf))
    times = {side: 1 / ratio["speedup"] for side, ratio in compared(seconds).items()}
    return {
        "model": name,
        **stamp(),
        "steps": steps,
        "rounds": rounds,
        "sides": {side: {**found, "speedup": times[side]} for side, found in compared(seconds).items()},
        "block_plane_bytes": {str(bits): plane_bytes(block, bits) - scales - dense for bits in BITS},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds of 8 steps, nothing written")
    arguments = parser.parse_args(argv)
    steps, rounds = (8, 2) if arguments.quick else (arguments.steps, arguments.rounds)
    with reporting_errors(debug=True):
        found = {r["model"]: r for r in read_result("quantized_decode").get("rows", [])}
        for name in arguments.model:
            found[name] = row(name, steps, rounds)
            print(json.dumps(found[name], indent=1), flush=True)
        if not arguments.quick:
            print(write_result("quantized_decode", {"rows": [found[n] for n in MODELS if n in found]}))


if __name__ == "__main__":
    main()
