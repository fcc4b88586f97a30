"""How decoding scales: time against tokens generated, context, batch and layers; compilation and memory as well.

    python -m benchmarks.scaling layers        # one axis; adds to results/scaling.json, draws docs/scaling.png
    python -m benchmarks.scaling --quick       # two small points, nothing written

GPT-2-124M shape, float32, random weights. Every point is a process of its own, so that compilation is cold and the
peak of resident memory its own; times are medians of three runs.

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

from benchmarks.harness import RESULTS, environment, write_result
from benchmarks.plots import Panel, draw
from benchmarks.shapes import SHAPES, random_model
from qs_jax.evaluation.benchmark import benchmark

DOCS = Path(__file__).parents[1] / "docs"
BASE = {"layers": 12, "batch": 1, "prompt_tokens": 32, "new_tokens": 64}
AXES: dict[str, tuple[str, Sequence[int]]] = {
    "tokens": ("new_tokens", (64, 128, 256, 512)),
    "context": ("prompt_tokens", (32, 128, 256, 512, 896)),
    "batch": ("batch", (1, 2, 4, 8, 16, 32)),
    "layers": ("layers", (3, 6, 12, 24)),
}
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
    parser.add_argument("axis", nargs="*", choices=[[], *AXES], help="which axes; none: all")
    parser.add_argument("--point", type=json.loads, help="measure one point and print it; for the processes' own use")
    parser.add_argument("--quick", action="store_true", help="two small points, nothing written")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments.point)))
        return
    if arguments.quick:
        print(*(measured_apart({**BASE, "layers": layers, "new_tokens": 32}) for layers in (1, 2)), sep="\n")
        return
    path = RESULTS / "scaling.json"
    axes = json.loads(path.read_text("utf-8"))["axes"] if path.is_file() else {}
    for axis in arguments.axis or AXES:
        axes[axis] = [{**measured_apart(point), "date": environment()["date"]} for point in points(axis)]
        print(axis, *axes[axis], sep="\n")
        write_result("scaling", {"shape": SHAPES["gpt2-124m"], "base": BASE, "axes": axes})
    print(draw(panels(axes), DOCS / "scaling.png"))


if __name__ == "__main__":
    main()
