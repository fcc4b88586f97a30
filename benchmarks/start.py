"""From the shell to the last of 30 tokens: what a person waits for who runs one command.

    python -m benchmarks.start                # SmolLM2; adds to benchmarks/results/start.json
    python -m benchmarks.start --dtype bfloat16
    python -m benchmarks.start --quick        # one round, nothing written
    python -m benchmarks.start --trace llama-2-7b    # of a shape, without its weights: tracing and lowering alone
    python -m benchmarks.start --fit lens            # how much of it is compiling; or calibrate: long
    python -m benchmarks.start --fit calibrate --max-tokens 1024    # shorter: less of it is not compiling

Whole processes, in turn: `qs-jax generate` with nothing compiled (cold), the same with what that left in the
compilation cache (warm), and transformers' greedy `generate` of the same folder if torch is there. Of ours the phases
are those of `timing`; `imports_s` is what is left of the process. The first round, which fills the disk's cache, is not
counted.

Prediction, before equal layers were traced once: loading 1 s without traced initialisers, in place of 3; tracing less
than 1; warm 5 s in all. Outcome: docs/speed.md, docs/tried.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import real_model
from benchmarks.harness import read_result, stamp, write_result
from benchmarks.quality import WIKITEXT_TRAIN
from benchmarks.shapes import SHAPES
from qs_jax.adaptive.binding import dense
from qs_jax.console import reporting_errors
from qs_jax.engine.decode import Controls, begin, decode_chunk
from qs_jax.engine.prefill import first_capacity
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.stage import Entering, run_stage
from qs_jax.generation import CHUNK
from qs_jax.models import abstract_network, parse_config
from qs_jax.token_set import token_set
from reference_models.data import text_folder

PROMPT, NEW_TOKENS, ROUNDS = "The capital of France is", 30, 5
PROMPT_TOKENS = 1024
"""Of a shape whose programs are traced."""

_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtype, prompt, new = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
ids = tokenizer(prompt, return_tensors="pt").input_ids
with torch.inference_mode():
    print(tokenizer.decode(model.generate(ids, max_new_tokens=int(new), min_new_tokens=int(new), do_sample=False)[0]))
"""


def ours(folder: Path, dtype: str, cache: str) -> dict[str, float]:
    """Seconds of one `qs-jax generate`, and of its phases."""
    command = [sys.executable, "-m", "qs_jax", "generate", str(folder), "--prompt", PROMPT, "--dtype", dtype, "--json"]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    environ = {**os.environ, "QS_JAX_COMPILATION_CACHE": cache}
    started = time.perf_counter()
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout
    whole = time.perf_counter() - started
    timing = json.loads(printed)["timing"]
    phases = {name: timing[name] for name in ("load_s", "trace_s", "compile_s", "prefill_s", "decode_s")}
    return {"whole_s": whole, "imports_s": whole - timing["load_s"] - timing["total_s"], **phases}


def theirs(folder: Path, dtype: str) -> dict[str, float]:
    """Seconds of one process that does the same with transformers."""
    command = [sys.executable, "-c", _TRANSFORMERS, str(folder), dtype, PROMPT, str(NEW_TOKENS)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {"whole_s": time.perf_counter() - started}


def measured(folder: Path, dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of every side, in turn."""
    found: dict[str, list[dict[str, float]]] = {}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as cache:
            sides = {"cold": ours(folder, dtype, cache), "warm": ours(folder, dtype, cache)}
        if find_spec("torch"):
            sides["transformers"] = theirs(folder, dtype)
        for name, seconds in sides.items() if turn else ():
            found.setdefault(name, []).append(seconds)
    return {name: {k: statistics.median(row[k] for row in rows) for k in rows[0]} for name, rows in found.items()}


def traced(shape: str, dtype: str, rounds: int) -> dict[str, float]:
    """Median seconds to trace and lower each program of a dense request, by its name; the weights are shapes."""
    config = parse_config(SHAPES[shape], shape)
    network, policy = abstract_network(config, dtype=dtype), dense(config)
    controls = Controls(Sampling.of(), token_set(config.eos_token_ids), policy)
    row, prompt = np.ones(1, np.int32), np.zeros((1, PROMPT_TOKENS), np.int32)
    entering = Entering(prompt, np.asarray(0, np.int32), row * PROMPT_TOKENS, policy.protection)
    capacity = first_capacity(PROMPT_TOKENS, NEW_TOKENS, CHUNK, config.max_position_embeddings)
    layers = {"start": 0, "stop": config.num_hidden_layers, "capacity": capacity}
    found: dict[str, list[float]] = {"run_stage": [], "begin": [], "decode_chunk": []}

    def timed(program: Any, *args: Any, **static: Any) -> Any:
        started = time.perf_counter()
        lowered = program.trace(*args, **static)
        lowered.lower()
        found[program.__name__].append(time.perf_counter() - started)
        return lowered.out_info

    none = np.zeros((1, 0), bool)
    for _ in range(rounds):
        jax.clear_caches()
        staged = timed(run_stage, network, entering, None, None, None, policy, **layers)
        state, _ = timed(begin, staged.logits, row, row, np.zeros((1, 2), np.int32), none, row - 2, controls)
        timed(decode_chunk, network, replace(state, cache=staged.cache), np.zeros((CHUNK, 1), np.int32), controls)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def fitted(folder: Path, command: str, dtype: str, tokens: int | None) -> dict[str, float]:
    """Seconds of a fit on WikiText's training part with nothing compiled, and of compiling within it."""
    with tempfile.TemporaryDirectory() as work:
        asked = [sys.executable, "-m", "qs_jax", command, str(folder), "--text", str(text_folder() / WIKITEXT_TRAIN)]
        asked += ["--dtype", dtype, "--out", str(Path(work) / "out"), "--json"]
        asked += ["--max-tokens", str(tokens)] if tokens else []
        environ = {**os.environ, "QS_JAX_COMPILATION_CACHE": work}
        printed = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True, env=environ).stdout
    return json.loads(printed)["timing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=real_model.NAME, help="smollm2, or a folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="one round, nothing written")
    parser.add_argument("--trace", choices=tuple(SHAPES), metavar="SHAPE", help="trace and lower a shape's programs")
    parser.add_argument("--fit", choices=("lens", "calibrate"), help="one such command, and its time of compiling")
    parser.add_argument("--max-tokens", type=int, help="of such a command; by default its own")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else ROUNDS
    with reporting_errors(debug=True):
        if arguments.trace:
            sides = traced(arguments.trace, arguments.dtype, rounds)
        elif arguments.fit:
            place, tokens = real_model.place(arguments.model), arguments.max_tokens
            sides = {arguments.fit: fitted(place, arguments.fit, arguments.dtype, tokens)}
        else:
            sides = measured(real_model.place(arguments.model), arguments.dtype, rounds)
    row: dict[str, Any] = {"sides": sides, "max_tokens": arguments.max_tokens} if arguments.fit else {"sides": sides}
    row |= stamp()
    print(json.dumps(row, indent=1))
    if not arguments.quick:
        kept, kind = read_result("start"), "traced" if arguments.trace else "fits" if arguments.fit else "rows"
        name = " ".join([arguments.trace or arguments.model, arguments.dtype, *filter(None, [arguments.fit])])
        rows = {**kept.get(kind, {}), name: row}
        print(write_result("start", {**kept, kind: rows}))


if __name__ == "__main__":
    main()
