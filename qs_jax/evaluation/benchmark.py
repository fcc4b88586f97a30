"""How fast does a model decode here, and how close is that to what the memory allows?"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.policy import Policy
from qs_jax.errors import GenerationError
from qs_jax.generation import CHUNK, generate, not_finite
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model

try:
    import resource
except ImportError:  # not on Windows
    resource = None

_PROBE_MEGABYTES = 256


def bandwidth_probe() -> tuple[Callable[[], None], int]:
    """A matrix-vector product that reads a matrix far larger than the caches, compiled, and the bytes it reads."""
    columns = 4096
    rows = _PROBE_MEGABYTES * 2**20 // (4 * columns)
    matrix = jnp.ones((rows, columns), jnp.float32)
    vector = jnp.ones((columns,), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)
    product(matrix, vector).block_until_ready()
    return lambda: product(matrix, vector).block_until_ready(), matrix.nbytes


def measured_bandwidth(repeats: int = 10) -> float:
    """Bytes per second that the probe reads: the median of several."""
    probe, size = bandwidth_probe()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        probe()
        seconds.append(time.perf_counter() - started)
    return size / statistics.median(seconds)


def benchmark(
    model: Model,
    *,
    policy: str | Path | Policy = "off",
    bits: int | None = None,
    exact: bool = False,
    draft: str | Sequence[str] = "auto",
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Time prefill and decoding of random prompts, compilation apart; medians over `repeats` runs.

    Raises:
        PolicyError: the policy cannot be read or does not fit the model.
        GenerationError: the model has no planes to read at `bits`, or its logits are not finite in its dtype.

    Returns:
        The figures of the command line's JSON contract. `decode_ms_per_step` is for the whole batch,
        `tokens_per_second` counts all rows while decoding, `bandwidth_gb_s` is bytes per second of the weights that
        dense decoding at `bits` would read (a policy that skips weights can exceed the memory's), and
        `bandwidth_fraction` sets that against a matrix-vector product measured in the same process. In exact mode a
        step is a pass of the model, a round or a plain step, and of the text of random prompts little can be said in
        general: `benchmarks` has prompts.
    """
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt_tokens)).tolist()

    config = GenerationConfig(
        policy, bits, new_tokens + 1, eos_token_id=[], use_model_defaults=False, exact=exact, draft=draft
    )
    first = generate(model, prompts, config)
    if "not_finite" in first.finish_reasons:
        raise GenerationError(not_finite(model))
    compile_s = first.timing["compile_s"]
    ceiling = measured_bandwidth()
    outputs = [generate(model, prompts, config) for _ in range(repeats)]
    step = statistics.median(o.timing["decode_s"] / o.timing["decode_steps"] for o in outputs)
    speed = statistics.median(batch * new_tokens / o.timing["decode_s"] for o in outputs)
    bandwidth = Costs.of(model.network).step_bytes(bits) / step
    return {
        "tokens_per_second": speed if exact else batch / step,
        "decode_ms_per_step": 1e3 * step,
        "prefill_s": statistics.median(o.timing["prefill_s"] for o in outputs),
        "compile_s": compile_s,
        "bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_fraction": bandwidth / ceiling,
        "peak_rss_mb": peak_rss_mb(),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "chunk": CHUNK,
        "policy": Policy.of(config.policy).to_json(),
        "dtype": str(model.dtype),
        "bits": bits,
        "device": jax.devices()[0].device_kind,
        "ledger": outputs[0].ledger,
        **{name: outputs[0].timing[name] for name in ("rounds", "drafted", "accepted", "fallback") if exact},
    }


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, in megabytes; None where the system does not say."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
