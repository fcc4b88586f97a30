"""How far logits of a 500-token prompt move by rounding, by codes, and by reading a model wrongly: what `qs-convert
--verify` must let pass, and what it must refuse.

    python -m benchmarks.verification_gate smollm2 reference_models/llama ...
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typer.testing import CliRunner

import convert.cli
import qs_jax
from benchmarks import real_model
from benchmarks.harness import write_result
from convert.verify import PROMPT_TOKENS
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, forward, network_from_arrays


def changes(model: Model) -> Iterator[tuple[str, Callable[[], Model]]]:
    """What may happen to a model, right and wrong."""
    arrays = arrays_by_path(model.network)

    def read_as(**config: Any) -> Model:
        changed = replace(model.config, **config)
        return replace(model, network=network_from_arrays(changed, arrays, dtype=model.dtype))

    def turned_over() -> Model:
        name = next(path for path in arrays if path.endswith("blocks.1.q.kernel"))
        other = {**arrays, name: arrays[name][::-1]}
        return replace(model, network=network_from_arrays(model.config, other, dtype=model.dtype))

    yield "float16", lambda: qs_jax.load(model.name, dtype="float16")
    yield "bfloat16", lambda: qs_jax.load(model.name, dtype="bfloat16")
    yield "codes, 8 bits", lambda: quantised(model.name)
    if rope := model.config.rope:
        yield "half the rotary base", lambda: read_as(rope=replace(rope, theta=rope.theta / 2))
        yield "rotary positions halved", lambda: read_as(rope=replace(rope, rope_type="linear", factor=2.0))
    yield "a tenth of the epsilon", lambda: read_as(norm_epsilon=model.config.norm_epsilon / 10)
    yield "rows of one query kernel turned over", turned_over


def quantised(folder: str) -> Model:
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "codes"
        result = CliRunner().invoke(convert.cli.app, [folder, str(target), "--quantize", "matryoshka"])
        assert result.exit_code == 0, result.stderr
        return qs_jax.load(target, dtype="float32")


def measure(folder: str) -> dict[str, dict[str, float]]:
    """Per change, the largest error of a logit and that of the median position, in standard deviations of logits."""
    model = qs_jax.load(real_model.place(folder), dtype="float32")
    length = min(PROMPT_TOKENS, model.config.max_position_embeddings)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (1, length)), jnp.int32)

    def logits(other: Model) -> np.ndarray:
        return np.asarray(jax.jit(forward)(other.network, tokens))[0].astype(np.float32)

    expected = logits(model)
    spread, found = float(expected.std(axis=-1).mean()), {}
    for name, change in changes(model):
        errors = np.abs(logits(change()) - expected).max(axis=-1) / spread
        found[name] = {"largest": float(errors.max()), "median_position": float(np.median(errors))}
        print(f"{Path(folder).name:12} {name:40} {errors.max():9.4f} {np.median(errors):9.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="smollm2, or folders of models")
    results = {Path(folder).name: measure(folder) for folder in parser.parse_args().models}
    print(write_result("verification_gate", {"models": results}))


if __name__ == "__main__":
    main()
