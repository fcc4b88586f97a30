"""Dense decoding of a random GPT-2-124M shape against transformers on torch, in one run.

    python -m benchmarks.dense_decode            # writes benchmarks/results/dense_decode.json
    python -m benchmarks.dense_decode --quick    # fewer rounds, nothing written; peers only if installed

Both sides decode the same number of tokens from random prompts, greedily, float32, all cores. Time per step is
(time of a long request - time of a one-token request) / steps, so that prefill and fixed costs cancel on both sides;
rounds are interleaved and the ratio is the median of the ratios round by round.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.harness import environment, interleaved, median_ratio, summary, write_result
from qs_jax.adaptive.ledger import Costs
from qs_jax.evaluation.benchmark import measured_bandwidth
from qs_jax.generation import generate
from qs_jax.loading import Model
from qs_jax.models import parse_config, random_network

GPT2_124M = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
}
PROMPT_TOKENS = 32


def our_request(model: Model, prompts: list[list[int]]) -> Callable[[int], Any]:
    return lambda new_tokens: generate(model, prompts, max_new_tokens=new_tokens, eos_token_id=[])


def transformers_request(prompts: list[list[int]], threads: int) -> Callable[[int], Any] | None:
    """The same request through transformers' `generate`, or None where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(threads)
    shape = {key: value for key, value in GPT2_124M.items() if key != "model_type"}
    peer: Any = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    tokens = torch.tensor(prompts)
    mask = torch.ones_like(tokens)

    def request(new_tokens: int) -> Any:
        with torch.inference_mode():
            return peer.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
            )

    return request


def per_step(requests: dict[str, Callable[[int], Any]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per decode step of every side, one figure per round."""
    candidates = {}
    for name, request in requests.items():
        candidates[f"{name}/long"] = lambda request=request: request(steps + 1)
        candidates[f"{name}/short"] = lambda request=request: request(1)
    seconds = interleaved(candidates, rounds)
    return {
        name: [
            (long - short) / steps
            for long, short in zip(seconds[f"{name}/long"], seconds[f"{name}/short"], strict=True)
        ]
        for name in requests
    }


def measure(model: Model, batch: int, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    """One batch size: our time per step, the peer's, and our share of the measured bandwidth."""
    rng = np.random.default_rng(batch)
    prompts = rng.integers(0, GPT2_124M["vocab_size"], (batch, PROMPT_TOKENS)).tolist()
    requests = {"qs_jax": our_request(model, prompts)}
    peer = transformers_request(prompts, threads)
    if peer:
        requests["transformers"] = peer
    bandwidth_before = measured_bandwidth()
    seconds = per_step(requests, steps, rounds)
    bandwidth = statistics.median([bandwidth_before, measured_bandwidth()])
    costs = Costs.of(model.network)
    ours = statistics.median(seconds["qs_jax"])
    reached = (costs.layers * costs.block_bytes + costs.head_bytes) / ours
    return {
        "batch": batch,
        "step": {name: summary(values) for name, values in seconds.items()},
        "tokens_per_second": {name: batch / statistics.median(values) for name, values in seconds.items()},
        "speedup": median_ratio(seconds["transformers"], seconds["qs_jax"]) if peer else None,
        "bandwidth_gb_s": reached / 1e9,
        "measured_bandwidth_gb_s": bandwidth / 1e9,
        "bandwidth_fraction": reached / bandwidth,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The result as the Markdown table that README shows."""
    lines = [
        "| batch | qs_jax, ms/step | transformers, ms/step | qs_jax, tokens/s | speed-up | of measured bandwidth |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = row["step"].get("transformers")
        lines.append(
            f"| {row['batch']} | {row['step']['qs_jax']['median_ms']:.1f} | "
            f"{peer['median_ms'] if peer else float('nan'):.1f} | {row['tokens_per_second']['qs_jax']:.1f} | "
            f"{row['speedup'] or float('nan'):.2f} × | {row['bandwidth_fraction']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of 16 steps, nothing written")
    arguments = parser.parse_args()
    steps, rounds = (16, 2) if arguments.quick else (64, 7)
    config = parse_config(GPT2_124M, "GPT-2 124M")
    model = Model(config, random_network(config, seed=0), None, jnp.dtype(jnp.float32), "random GPT-2 124M")
    rows = [measure(model, batch, steps, rounds, environment()["cores"]) for batch in (1, 2, 8)]
    print(table(rows))
    if not arguments.quick:
        settings = {"shape": GPT2_124M, "dtype": "float32", "prompt_tokens": PROMPT_TOKENS}
        settings |= {"steps": steps, "rounds": rounds}
        print(write_result("dense_decode", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
