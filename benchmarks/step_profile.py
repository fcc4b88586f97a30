"""Where the time of a decode step goes: milliseconds per step by kind of operation and shape of its result.

    python -m benchmarks.step_profile                             # GPT-2-124M shape, float32, batch 1
    python -m benchmarks.step_profile --batch 32 --dtype bfloat16 # adds to benchmarks/results/step_profile.json
    python -m benchmarks.step_profile --model smollm2 --drafts 2  # a round of exact mode, none of its drafts right
    python -m benchmarks.step_profile --quick                     # few steps, nothing written

Runs one request under JAX's profiler and sums what the backend reports for the compiled decode loop. Operations that
run side by side are each counted in full, so that the sum exceeds the time of a step; tracing slows both.
"""

import argparse
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks.break_even import decoded, script
from benchmarks.harness import read_result, stamp, write_result
from benchmarks.shapes import NAMES, model_named
from benchmarks.speed import PROMPT_TOKENS, our_generate, same_prompts
from qs_jax.model import Model


def request(model: Model, batch: int, tokens: int, steps: int, drafts: int) -> Callable[[], Any]:
    """Something that takes so many plain steps behind a prompt, or rounds of so many drafts that are all wrong."""
    prompts = same_prompts(model, batch, tokens)
    if not drafts:
        return partial(our_generate(model), prompts, steps + 1)
    text = decoded(model, prompts[0], steps + 1).tokens
    return partial(
        decoded, model, prompts[0], steps + 1, script(prompts[0], text, 0.0, model.config.vocab_size), drafts
    )


def traced(folder: Path, run: Callable[[], Any], program: str, steps: int) -> dict[str, float]:
    """Milliseconds per step of every operation of the decode loop, by its name in the compiled program."""
    run()
    with jax.profiler.trace(str(folder)):
        run()
    (file,) = folder.rglob("*.xplane.pb")
    spent: defaultdict[str, float] = defaultdict(float)
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if program in str(dict(event.stats).get("hlo_module", "")):
                    spent[event.name] += event.duration_ns / 1e6 / steps
    return dict(spent)


def by_kind(spent: dict[str, float], program: str) -> list[dict[str, Any]]:
    """Operations that differ only in their number taken together, longest first.

    Args:
        spent: milliseconds by name, such as "dot.12".
        program: the compiled program as text, in which `dot.12 = f32[2,384,1]{…} …` tells the result's shape.
    """
    shapes = dict(re.findall(r"%([\w.-]+) = \(?(\w+\[[\d,]*\])", program))
    together: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for name, ms in spent.items():
        together[re.sub(r"\.\d+$", "", name), shapes.get(name, "")].append(ms)
    longest = sorted(together.items(), key=lambda item: -sum(item[1]))
    return [{"kind": kind, "result": shape, "count": len(ms), "ms": sum(ms)} for (kind, shape), ms in longest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-124m", choices=NAMES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--drafts", type=int, default=0, help="rounds of so many in place of steps; batch 1")
    parser.add_argument("--prompt", type=int, default=PROMPT_TOKENS, help="tokens of it")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--show", type=int, default=16, help="longest kinds to print")
    parser.add_argument("--quick", action="store_true", help="4 steps, nothing written")
    arguments = parser.parse_args()
    steps, program = 4 if arguments.quick else arguments.steps, "exact_chunk" if arguments.drafts else "decode_chunk"
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*{program}.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
        run = request(
            model_named(arguments.model, arguments.dtype), arguments.batch, arguments.prompt, steps, arguments.drafts
        )
        spent = traced(Path(folder) / "trace", run, program, steps)
        texts = [path.read_text("utf-8") for path in Path(folder).glob("*after_optimizations.txt")]
    kinds = by_kind(spent, "\n".join(texts))
    print("| operation | result | times | ms per step |\n|---|---|---|---|")
    for row in kinds[: arguments.show]:
        print(f"| {row['kind']} | {row['result']} | {row['count']} | {row['ms']:.2f} |")
    print(f"| all | | {len(spent)} | {sum(spent.values()):.2f} |")
    if not arguments.quick:
        rows = read_result("step_profile").get("profiles", {})
        kind = f"{arguments.drafts} drafts" if arguments.drafts else f"batch {arguments.batch}"
        behind = f" after {arguments.prompt} tokens" if arguments.prompt != PROMPT_TOKENS else ""
        key = f"{arguments.model} {arguments.dtype} {kind}{behind}"
        facts = {"steps": steps, **stamp()}
        rows[key] = {**facts, "total_ms": sum(spent.values()), "kinds": kinds[: arguments.show]}
        print(write_result("step_profile", {"profiles": rows}))


if __name__ == "__main__":
    main()
