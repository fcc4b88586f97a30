"""How much memory does converting and loading a model of a billion parameters take?

    python -m benchmarks.large_conversion           # writes benchmarks/results/large_conversion.json
    python -m benchmarks.large_conversion --quick   # a small model, nothing written

Writes a random Llama itself (1.1 billion parameters, bfloat16, one shard per block), converts it with the command
line and loads the result, each in a process of its own, and reports every process's peak resident memory.

Bounds: conversion takes at most 4 × the largest block + 500 MB over a bare interpreter's peak, whatever the size of
the model; loading takes that much over the model's own bytes. The largest block is the largest part of the model
(here the embedding) as stored.

Prediction, before the first run: conversion holds (one part at a time, its float32 copy and Orbax's buffers: about
3 × the largest block, and 400 MB for jax and Orbax themselves); loading holds, closely.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import write_result

SHAPE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
QUICK = {"vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}

MB = 2**20
ALLOWANCE_MB = 500
BLOCKS = 4

LOAD = "import sys, qs_jax; qs_jax.load(sys.argv[1], compilation_cache=False)"
IMPORTS = "import jax, convert.cli, convert.pipeline, qs_jax.loading; jax.numpy.zeros(1).block_until_ready()"


def blocks(shape: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a Hugging Face Llama, block by block."""
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    narrow = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield {"model.embed_tokens.weight": (vocab, hidden)}
    sizes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden)}
    sizes |= {"self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden)}
    sizes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    for layer in range(shape["num_hidden_layers"]):
        yield {f"model.layers.{layer}.{name}.weight": size for name, size in {**sizes, **norms}.items()}
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A sharded folder of random bfloat16 weights; one block is in memory at a time."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    rng = np.random.default_rng(0)
    homes: dict[str, str] = {}
    for number, sizes in enumerate(blocks(shape)):
        shard = f"model-{number:05}.safetensors"
        tensors = {
            name: (0.02 * rng.standard_normal(size, np.float32)).astype(ml_dtypes.bfloat16)
            for name, size in sizes.items()
        }
        save_file(tensors, folder / shard)
        homes |= dict.fromkeys(sizes, shard)
    index = {"metadata": {}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def measured(*arguments: str) -> dict[str, Any]:
    """Run Python with these arguments; its stdout, seconds, and peak resident memory in MB.

    This process must stay small: a child's peak counts the parent's memory at the fork.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"error: {' '.join(arguments[:2])} … failed with status {process.returncode}")
    divisor = MB if sys.platform == "darwin" else 2**10
    return {"out": out, "seconds": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / divisor}


def measure(shape: dict[str, Any], work: Path) -> dict[str, Any]:
    """Write, convert and load; peaks in MB, with their bounds."""
    sizes = [sum(rows * (columns[0] if columns else 1) for rows, *columns in block.values()) for block in blocks(shape)]
    largest_mb, model_mb = 4 * max(sizes) / MB, 4 * sum(sizes) / MB
    free_mb = shutil.disk_usage(work).free / MB
    if free_mb < 2 * model_mb:
        raise SystemExit(f"error: {work}: {free_mb:.0f} MB free, {2 * model_mb:.0f} needed; set TMPDIR to another disk")
    measured("-m", "benchmarks.large_conversion", "--write", str(work / "hf"), *(["--quick"] if shape != SHAPE else []))
    bare, imports = measured("-c", "pass"), measured("-c", IMPORTS)
    convert = measured("-m", "convert.cli", str(work / "hf"), str(work / "converted"), "--json")
    report = json.loads(convert["out"])
    assert report["parameters"] == sum(sizes)
    load = measured("-c", LOAD, str(work / "converted"))
    overhead_mb = BLOCKS * largest_mb + ALLOWANCE_MB
    return {
        "parameters": report["parameters"],
        "model_mb": model_mb,
        "largest_block_mb": largest_mb,
        "interpreter_mb": bare["peak_mb"],
        "interpreter_with_imports_mb": imports["peak_mb"],
        "convert": _against(convert, bare, overhead_mb),
        "load": _against(load, bare, model_mb + overhead_mb),
    }


def _against(run: dict[str, Any], bare: dict[str, Any], bound_mb: float) -> dict[str, Any]:
    over = run["peak_mb"] - bare["peak_mb"]
    figures = {"seconds": run["seconds"], "peak_mb": run["peak_mb"], "over_interpreter_mb": over, "bound_mb": bound_mb}
    return {**figures, "within_bound": over <= bound_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, nothing written")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = {**SHAPE, **QUICK} if arguments.quick else SHAPE
    if arguments.write:
        write_model(arguments.write, shape)
        return
    with tempfile.TemporaryDirectory() as work:
        result = measure(shape, Path(work))
    for step in ("convert", "load"):
        figures = result[step]
        print(
            f"{step}: {figures['over_interpreter_mb']:.0f} MB over the interpreter's peak "
            f"(bound {figures['bound_mb']:.0f} MB), {figures['seconds']:.0f} s"
        )
    if not arguments.quick:
        settings = {"shape": SHAPE, "stored": "float32", "source": "bfloat16, one shard per block"}
        print(write_result("large_conversion", {"settings": settings, "result": result}))


if __name__ == "__main__":
    main()
