"""Two working trees side by side: is the one as fast as the other?

    python -m benchmarks.checkouts ../before . --models reference_models/llama gpt2-124m

A process of each tree starts in turn, warm: each tree has a compilation cache of its own, which a first, uncounted
process fills. Then both stay, and requests of 128 + 64 tokens (`--tokens`) take turns, seconds apart. Per model: a
decode step, a prompt, tracing and lowering of all programs that a request needs, and a start until the first request is
done. Ratios are of the second tree to the first, pair by pair; the result names the commits.
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

START, REQUEST = ("trace_s", "start_s"), ("decode_ms_per_step", "prefill_s")

WORKER = """
import json, sys
import jax
seconds = []
def listen(event, duration, **_):
    if event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"):
        seconds.append(duration)
jax.monitoring.register_event_duration_secs_listener(listen)
from benchmarks.shapes import model_named
from qs_jax.generation import generate
model = model_named(sys.argv[1])
prompts = [list(range(10, 10 + int(sys.argv[3])))]
for _ in sys.stdin:
    seconds.clear()
    timing = generate(model, prompts, policy=sys.argv[2], max_new_tokens=65, eos_token_id=[]).timing
    step = 1e3 * timing["decode_s"] / timing["decode_steps"]
    figures = {"trace_s": sum(seconds), "decode_ms_per_step": step, "prefill_s": timing["prefill_s"]}
    print(json.dumps(figures), flush=True)
"""


class Worker:
    """A process of a tree, which imports what lies there."""

    def __init__(self, tree: Path, model: str, policy: str, tokens: int, cache: Path):
        environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        place = str(Path.cwd() / model) if (Path.cwd() / model).is_dir() else model
        started = time.perf_counter()
        self._process = subprocess.Popen(
            (sys.executable, "-c", WORKER, place, policy, str(tokens)),
            cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.start = {**self.request(), "start_s": time.perf_counter() - started}

    def request(self) -> dict[str, float]:
        """One request, timed by the process itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def commit(tree: Path) -> str:
    """Of a tree; a plus says that it holds changes besides."""
    git = ("git", "-C", str(tree))
    name = subprocess.run((*git, "rev-parse", "--short", "HEAD"), check=True, capture_output=True, text=True).stdout
    changed = subprocess.run((*git, "diff", "--quiet", "HEAD"), check=False).returncode
    return name.strip() + ("+" if changed else "")


def compare(
    trees: list[Path], model: str, policy: str, tokens: int, starts: int, turns: int, caches: Path
) -> dict[str, Any]:
    """Every figure of both trees, and the ratio of the second to the first."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in (*START, *REQUEST)}
    for start in range(starts + 1):
        workers = [Worker(tree, model, policy, tokens, caches / str(side)) for side, tree in enumerate(trees)]
        for side, worker in enumerate(workers) if start else ():
            for name in START:
                found[name][side].append(worker.start[name])
        for turn in range(turns if start else 0):
            for side in (0, 1) if turn % 2 else (1, 0):
                figures = workers[side].request()
                for name in REQUEST:
                    found[name][side].append(figures[name])
        for worker in workers:
            worker.end()
        print(f"{model}, {policy}: start {start} of {starts}", file=sys.stderr)
    result: dict[str, Any] = {}
    for name, (before, after) in found.items():
        scale = 1e-3 if name in REQUEST[:1] else 1.0  # all in seconds
        sides = [summary([scale * value for value in side]) for side in (before, after)]
        result[name] = {"before": sides[0], "after": sides[1], "ratio": median_ratio(after, before)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs=2, type=Path, help="the tree to compare with, and the one in question")
    parser.add_argument("--models", nargs="+", default=["reference_models/llama", "gpt2-124m"])
    parser.add_argument("--policies", nargs="+", default=["off"])
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--starts", type=int, default=5, help="of both processes")
    parser.add_argument("--turns", type=int, default=10, help="requests of each process")
    parser.add_argument("--name", default="checkouts", help="of the result file")
    options = parser.parse_args()
    trees = [tree.resolve() for tree in options.trees]
    with tempfile.TemporaryDirectory() as caches:
        results = {
            f"{Path(model).name}, {policy}": compare(
                trees, model, policy, options.tokens, options.starts, options.turns, Path(caches)
            )
            for model in options.models
            for policy in options.policies
        }
    path = write_result(
        options.name, {"commits": [commit(tree) for tree in trees], "prompt_tokens": options.tokens, "results": results}
    )
    for name, figures in results.items():
        print(name, {figure: round(values["ratio"], 3) for figure, values in figures.items()})
    print(path)


if __name__ == "__main__":
    main()
