"""Two working trees side by side: is the one as fast as the other?

    python -m benchmarks.checkouts ../before . --models reference_models/llama gpt2-124m --rounds 7

Processes of the two trees take turns, each with a compilation cache of its own that its first, uncounted process fills.
Per model: a decode step, a prompt, tracing and lowering of all programs that a request needs, and the start of a whole
process. Ratios are of the second tree to the first, round by round; the result names the commits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import median_ratio, summary, write_result

FIGURES = ("decode_ms_per_step", "prefill_s", "trace_s", "process_s")

WORKER = """
import json, sys
import jax
seconds = []
def listen(event, duration, **_):
    if event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"):
        seconds.append(duration)
jax.monitoring.register_event_duration_secs_listener(listen)
from benchmarks.shapes import model_named
from qs_jax.evaluation.benchmark import benchmark
from qs_jax.generation import generate
model = model_named(sys.argv[1])
seconds.clear()
generate(model, [[1] * 128], max_new_tokens=65, eos_token_id=[])
traced = sum(seconds)
figures = benchmark(model, policy=sys.argv[2], repeats=5)
print(json.dumps({"trace_s": traced, **{n: figures[n] for n in ("decode_ms_per_step", "prefill_s")}}))
"""


def measure(tree: Path, model: str, policy: str, cache: Path) -> dict[str, float]:
    """One process of a tree, with whatever its working folder imports."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache)}
    if (Path.cwd() / model).is_dir():
        model = str(Path.cwd() / model)
    started = time.perf_counter()
    command = [sys.executable, "-c", WORKER, model, policy]
    found = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return {**json.loads(found.stdout), "process_s": time.perf_counter() - started}


def commit(tree: Path) -> str:
    """Of a tree; a plus says that it holds changes besides."""
    git = ("git", "-C", str(tree))
    name = subprocess.run((*git, "rev-parse", "--short", "HEAD"), check=True, capture_output=True, text=True).stdout
    changed = subprocess.run((*git, "diff", "--quiet", "HEAD"), check=False).returncode
    return name.strip() + ("+" if changed else "")


def compare(trees: list[Path], model: str, policy: str, rounds: int, caches: Path) -> dict[str, Any]:
    """Every figure of both trees, and the ratio of the second to the first."""
    found: list[list[dict[str, float]]] = [[], []]
    for turn in range(rounds + 1):
        for side, tree in enumerate(trees):
            figures = measure(tree, model, policy, caches / str(side))
            if turn:
                found[side].append(figures)
            print(f"{model}, {policy}, round {turn}, {tree}: {figures}", file=sys.stderr)
    result: dict[str, Any] = {}
    for name in FIGURES:
        before, after = ([figures[name] for figures in side] for side in found)
        scale = 1e-3 if name.endswith("ms_per_step") else 1.0  # all in seconds
        sides = [summary([scale * value for value in side]) for side in (before, after)]
        result[name] = {"before": sides[0], "after": sides[1], "ratio": median_ratio(after, before)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path, help="the tree to compare with, and the one in question")
    parser.add_argument("--models", nargs="+", default=["reference_models/llama", "gpt2-124m"])
    parser.add_argument("--policies", nargs="+", default=["off"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="checkouts", help="of the result file")
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.trees]
    with tempfile.TemporaryDirectory() as caches:
        results = {
            f"{Path(model).name}, {policy}": compare(trees, model, policy, options.rounds, Path(caches))
            for model in options.models
            for policy in options.policies
        }
    path = write_result(options.name, {"commits": [commit(tree) for tree in trees], "results": results})
    for name, figures in results.items():
        print(name, {figure: round(values["ratio"], 3) for figure, values in figures.items()})
    print(path)


if __name__ == "__main__":
    main()
