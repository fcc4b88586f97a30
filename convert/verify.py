"""Does the converted folder compute what the original computes? Logits on a 500-token prompt.

Short prompts cannot see an error in the rotary embedding; a long one can.
"""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qs_jax.errors import CheckpointError
from qs_jax.loading import load
from qs_jax.models import forward

PROMPT_TOKENS = 500

Tokens = Int[np.ndarray, " tokens"]
Positions = Int[np.ndarray, " positions"]
Logits = Float[np.ndarray, "positions vocab"]


def verify(folder: Path, original: Path, golden: Path | None, dtype: str) -> dict[str, Any]:
    """Compare logits of a converted folder with the best reference at hand.

    The reference is, in this order: a golden file (tensors `tokens`, `positions`, `logits`), transformers on torch if
    both are installed, or the original's weights in float32 run by this package (which checks storage only, and is
    named as such).

    Returns:
        `max_abs_logit_error`, `kl` (mean over positions, nats, of the original's next-token distribution from the
        converted one's), `verified_tokens` and `verified_against`.

    Raises:
        CheckpointError: the golden file is damaged or does not fit the model.
    """
    model = load(folder, dtype=dtype, compilation_cache=False)
    length = min(PROMPT_TOKENS, model.config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, length).astype(np.int32)
    positions, against = np.arange(length), "transformers"
    if golden is not None:
        tokens, positions, expected = _read_golden(golden, model.config.vocab_size)
        against = golden.name
    elif importlib.util.find_spec("torch") is not None:
        expected = _transformers_logits(original, tokens)
    else:
        source = load(original, dtype="float32", compilation_cache=False)
        expected = np.asarray(jax.jit(forward)(source.network, jnp.asarray(tokens)[None]))[0]
        against = "the original's weights in float32, run by qs_jax"
    actual = np.asarray(jax.jit(forward)(model.network, jnp.asarray(tokens)[None]))[0][positions]
    return {
        "max_abs_logit_error": float(np.abs(actual - expected).max()),
        "kl": _mean_kl(expected, actual),
        "verified_tokens": len(tokens),
        "verified_against": against,
    }


def _transformers_logits(folder: Path, tokens: Tokens) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return reference(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()


def _read_golden(path: Path, vocab_size: int) -> tuple[Tokens, Positions, Logits]:
    try:
        tensors = load_file(path)
        tokens, positions, logits = (tensors[name] for name in ("tokens", "positions", "logits"))
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is no golden file with tokens, positions and logits ({error})") from None
    if logits.shape != (len(positions), vocab_size) or positions.max() >= len(tokens) or tokens.max() >= vocab_size:
        raise CheckpointError(f"{path}: logits {logits.shape} do not fit a vocabulary of {vocab_size}")
    return tokens.astype(np.int32), positions, logits.astype(np.float32)


def _mean_kl(expected: Logits, actual: Logits) -> float:
    """Mean over positions of KL(expected ‖ actual), in nats."""
    p, q = (x - _logsumexp(x) for x in (expected.astype(np.float64), actual.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _logsumexp(x: np.ndarray) -> np.ndarray:
    peak = x.max(axis=-1, keepdims=True)
    return peak + np.log(np.exp(x - peak).sum(axis=-1, keepdims=True))
