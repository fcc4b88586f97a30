"""A study's result as `qs-jax eval --ablate` writes it, for what shows one."""

from typing import Any

DEPTH = 6
HOSTILE = '<script>alert("x")</script>'
LEDGER = {"flops_reduction": 0.31, "bytes_reduction": 0.1, "kv_slots": 70, "kv_slots_off": 100}


def scored(name: str, kind: str, saved: float, rise: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "mechanisms": [],
        "perplexity": 4.0 + rise,
        "perplexity_off": 4.0,
        "perplexity_increase": rise,
        "perplexity_increase_interval": [rise - 0.05, rise + 0.07],
        "flops_reduction": saved,
        "bytes_reduction": saved / 3,
        "kv_reduction": 0.0,
        "top1_agreement": 0.9,
        "kl_nats": 0.01,
        "prefill_s_per_batch": 0.1,
        "decode_s_per_batch": 0.2,
    }


def result() -> dict[str, Any]:
    sample = {
        "depth": DEPTH,
        "prompt": ["", "Once", " upon", HOSTILE, "\n\n"],
        "prompt_layers_run": [6, 4, 3, 3, 6],
        "prompt_fused_with": [-1, -1, 3, -1, -1],
        "text": [" a", " time"],
        "layers_run": [6, 5],
        "bits": [8.0, 4.0],
        "logprobs": [-0.5, -1.25],
    }
    rows = [
        scored("off", "off", 0.0, 0.0),
        scored("calibrated +0.2", "calibrated", 0.31, 0.12),
        scored("prompt stops after 4", "baseline", 0.27, 0.08),
        scored("halting", "ablation", 0.2, 0.3),
        scored("halting + kv_skipping", "ablation", 0.2, 40.0),
    ]
    return {
        **scored("judged", "calibrated", 0.31, 0.12),
        "model": f"model {HOSTILE}",
        "text": "stories.json",
        "policy": {"name": "calibrated +0.2"},
        "protocol": {"name": "prefix", "prefix": 5, "window": 2, "batch": 8, "windows": 40},
        "tokens_scored": 80,
        "bits_per_byte": 0.7,
        "bits_per_byte_off": 0.69,
        "ledger": LEDGER,
        "layers_histogram": [0, 0, 0, 30, 10, 0, 60],
        "samples": [sample],
        "table": rows,
        "oracle": {"layers_share": 0.877, "settled_early": 0.5},
    }
