"""How decoding scales: time against tokens generated, context, batch and layers; compilation and memory as well.

    python -m benchmarks.scaling layers        # one axis; adds to results/scaling.json, draws docs/scaling.png
    python -m benchmarks.scaling flat          # what tokens generated cost at the same context, in one process
    python -m benchmarks.scaling --quick       # two small points, nothing written

GPT-2-124M shape, float32, random weights. Every point is a process of its own, so that compilation is cold and the
peak of resident memory its own; times are medians of three runs. `flat` sets 512 generated tokens beside 64, from the
same prompt and from one so long that the mean context is the same, in interleaved rounds.

Prediction, before the first run: time per token is flat in tokens generated but for attention over a growing cache
(under 10 % from 64 to 512 tokens); linear in layers, plus the head; sublinear in the batch until products stop being
bound by memory, at 8 rows or so; compilation is linear in layers and indifferent to all else.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, median_ratio, read_result, summary, write_result
from benchmarks.plots import Panel, draw
from benchmarks.shapes import SHAPES, random_model
from benchmarks.speed import same_prompts
from qs_jax.evaluation.benchmark import benchmark
from qs_jax.generation import generate
from qs_jax.model import Model

DOCS = Path(__file__).parents[1] / "docs"
BASE = {"layers": 12, "batch": 1, "prompt_tokens": 32, "new_tokens": 64}
AXES: dict[str, tuple[str, Sequence[int]]] = {
    "tokens": ("new_tokens", (64, 128, 256, 512)),
    "context": ("prompt_tokens", (32, 128, 256, 512, 896)),
    "batch": ("batch", (1, 2, 4, 8, 16, 32)),
    "layers": ("layers", (3, 6, 12, 24)),
}
FLAT = {"short": (32, 64), "long": (32, 512), "same context": (256, 64)}
"""Prompt and new tokens."""
_KEPT = ("decode_ms_per_step", "prefill_s", "compile_s", "peak_rss_mb")


def measure(point: Mapping[str, int]) -> dict[str, float]:
    """One point, in this process."""
    model = random_model({**SHAPES["gpt2-124m"], "n_layer": point["layers"]}, "scaling")
    sizes: dict[str, Any] = {name: value for name, value in point.items() if name != "layers"}
    figures = benchmark(model, **sizes)
    return {name: figures[name] for name in _KEPT}


def measured_apart(point: Mapping[str, int]) -> dict[str, Any]:
    """One point, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--point", json.dumps(dict(point))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {**point, **json.loads(output.splitlines()[-1])}


def points(axis: str) -> list[dict[str, int]]:
    """The base point with one setting varied."""
    name, values = AXES[axis]
    return [{**BASE, name: value} for value in values]


def flatness(rounds: int = 5) -> dict[str, Any]:
    """Milliseconds per step of every side, and how much more 512 tokens take than 64: medians round by round."""
    model = random_model(SHAPES["gpt2-124m"], "scaling")
    seconds: dict[str, list[float]] = {name: [] for name in FLAT}
    for number in range(rounds + 1):
        for name, lengths in FLAT.items():
            found = _step_seconds(model, *lengths)
            if number:  # the first round compiles
                seconds[name].append(found)
    return {
        "sides": {name: summary(found) for name, found in seconds.items()},
        "growth": median_ratio(seconds["long"], seconds["short"]) - 1,
        "growth_at_same_context": median_ratio(seconds["long"], seconds["same context"]) - 1,
        "lengths": FLAT,
        "date": environment()["date"],
    }


def _step_seconds(model: Model, prompt_tokens: int, new_tokens: int) -> float:
    timing = generate(
        model, same_prompts(model, 1, prompt_tokens), max_new_tokens=new_tokens + 1, eos_token_id=[]
    ).timing
    return timing["decode_s"] / timing["decode_steps"]


def panels(axes: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Panel]:
    """Per axis time per step, then compilation and memory over all axes that were measured."""
    result = []
    for axis, rows in axes.items():
        name = AXES[axis][0]
        x = [row[name] for row in rows]
        label = name.replace("_", " ")
        step = {"step": (x, [row["decode_ms_per_step"] for row in rows])}
        result.append(Panel(f"decoding against {label}", label, "ms per step", step, log_x=True, from_zero=True))
        compiling = {"compile, s": (x, [row["compile_s"] for row in rows])}
        memory = {"peak memory, GB": (x, [row["peak_rss_mb"] / 1e3 for row in rows])}
        title = f"compilation and memory against {label}"
        result.append(Panel(title, label, "s, GB", {**compiling, **memory}, log_x=True, from_zero=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axis", nargs="*", choices=[[], *AXES, "flat"], help="which axes, or flat; none: all")
    parser.add_argument("--point", type=json.loads, help="measure one point and print it; for the processes' own use")
    parser.add_argument("--quick", action="store_true", help="two small points, nothing written")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments.point)))
        return
    if arguments.quick:
        print(*(measured_apart({**BASE, "layers": layers, "new_tokens": 32}) for layers in (1, 2)), sep="\n")
        return
    result = {"axes": {}, **read_result("scaling")}
    result |= {"shape": SHAPES["gpt2-124m"], "base": BASE}
    for axis in arguments.axis or [*AXES, "flat"]:
        if axis == "flat":
            result["flatness"] = flatness()
            print(result["flatness"])
        else:
            result["axes"][axis] = [{**measured_apart(point), "date": environment()["date"]} for point in points(axis)]
            print(axis, *result["axes"][axis], sep="\n")
        write_result("scaling", result)
    print(draw(panels(result["axes"]), DOCS / "scaling.png"))


if __name__ == "__main__":
    main()
