"""What the host costs between chunks of decode steps.

    python -m benchmarks.host_overhead           # writes benchmarks/results/host_overhead.json
    python -m benchmarks.host_overhead --quick

`generate` runs 32 steps per call of the compiled program and `stream` 8, on the same weights and prompt. A step costs
t + h / chunk, t on the device and h once per chunk on the host, so the difference of the two gives h. Rounds are
interleaved; the estimate is taken round by round.

Prediction, before the first run: under 0.5 ms per chunk, 0.1 % of a step of a GPT-2-124M shape on CPU.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.harness import interleaved, summary, write_result
from benchmarks.shapes import NAMES, SHAPES, model_named, random_model
from benchmarks.speed import same_prompts
from qs_jax.generation import generate, stream

CHUNKS = {"generate": 32, "stream": 8}
STEPS = 128


def host_seconds_per_chunk(by_32: float, by_8: float) -> float:
    """h from the seconds per step at either chunk size."""
    return (by_8 - by_32) / (1 / CHUNKS["stream"] - 1 / CHUNKS["generate"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-124m", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="two rounds on two layers, nothing written")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else 7
    small = {**SHAPES["gpt2-124m"], "n_layer": 2}
    model = random_model(small, "two layers") if arguments.quick else model_named(arguments.model)
    prompts = same_prompts(model, 1, 32)
    calls: dict[str, Callable[..., Any]] = {
        "generate": lambda n: generate(model, prompts, max_new_tokens=n, eos_token_id=[]),
        "stream": lambda n: list(stream(model, prompts, max_new_tokens=n, eos_token_id=[])),
    }
    candidates = {f"{name}/{n}": lambda call=call, n=n: call(n) for name, call in calls.items() for n in (STEPS + 1, 1)}
    seconds = interleaved(candidates, rounds)
    steps = {
        name: [(a - b) / STEPS for a, b in zip(seconds[f"{name}/{STEPS + 1}"], seconds[f"{name}/1"], strict=True)]
        for name in calls
    }
    chunk = [host_seconds_per_chunk(a, b) for a, b in zip(steps["generate"], steps["stream"], strict=True)]
    share = statistics.median(h / CHUNKS["generate"] / t for h, t in zip(chunk, steps["generate"], strict=True))
    result = {"step": {name: summary(v) for name, v in steps.items()}, "host_per_chunk": summary(chunk), "share": share}
    print(result)
    if not arguments.quick:
        settings = {"shape": SHAPES["gpt2-124m"], "dtype": "float32", "steps": STEPS, "rounds": rounds}
        print(write_result("host_overhead", {"settings": settings, "chunks": CHUNKS, **result}))


if __name__ == "__main__":
    main()
