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

TOLERANCE = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.3, "matryoshka": 1.0}
"""Largest error of a logit, in units of the logits' own standard deviation, by how weights are stored.

A wrong tensor, head or rotary embedding is off by about one and more wherever it matters. Rounding is not: on the two
reference models, SmolLM2-135M and random models of each architecture it reaches at most a tenth of these."""

Tokens = Int[np.ndarray, " tokens"]
Positions = Int[np.ndarray, " positions"]
Logits = Float[np.ndarray, "positions vocab"]


def verify(
    folder: Path, original: Path, golden: Path | None, dtype: str, *, quantised: bool = False, name: str
) -> dict[str, Any]:
    """Compare logits of a converted folder with the best reference at hand; refuse one that computes something else.

    The reference is, in this order: a golden file (tensors `tokens`, `positions`, `logits`), transformers on torch if
    both are installed, or the original's weights in float32 run by this package (which checks storage only, and is
    named as such).

    Args:
        folder: the converted folder.
        original: the Hugging Face folder.
        golden: a file of logits to compare with.
        dtype: how dense weights are stored, in which the converted model is run.
        quantised: whether kernels are codes, which then are read at all their bits.
        name: what the user calls the folder.

    Returns:
        `max_abs_logit_error`, `logit_error_tolerance`, `kl` (mean over positions, nats, of the original's next-token
        distribution from the converted one's), `verified_tokens`, `verified_against` and, where the mathematics was
        not compared with another implementation, `not_verified`.

    Raises:
        CheckpointError: the error is above the tolerance, or the golden file is damaged or does not fit the model.
    """
    model = load(folder, dtype=dtype, compilation_cache=False)
    length = min(PROMPT_TOKENS, model.config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, length).astype(np.int32)
    positions, against, limits = np.arange(length), "transformers", {}
    if golden is not None:
        tokens, positions, expected = _read_golden(golden, model.config.vocab_size)
        against = golden.name
    elif importlib.util.find_spec("torch") is not None:
        expected = _transformers_logits(original, tokens, model.config.model_type)
    else:
        source = load(original, dtype="float32", compilation_cache=False)
        expected = np.asarray(jax.jit(forward)(source.network, jnp.asarray(tokens)[None]))[0]
        against = "the original's weights in float32, run by qs_jax"
        limits = {"not_verified": "the mathematics against transformers: no torch here, and no --golden given"}
    actual = np.asarray(jax.jit(forward)(model.network, jnp.asarray(tokens)[None]))[0][positions]
    actual = actual.astype(np.float32)
    error = float(np.abs(actual - expected).max())
    tolerance = TOLERANCE["matryoshka" if quantised else dtype] * float(expected.std(axis=-1).mean())
    if not error <= tolerance:  # NaN is no small error
        raise CheckpointError(
            f"{name}: not converted: logits differ from {against} by {error:.3g}, more than {tolerance:.3g}; convert "
            "without --verify only if you know why"
        )
    return {
        "max_abs_logit_error": error,
        "logit_error_tolerance": tolerance,
        "kl": _mean_kl(expected, actual),
        "verified_tokens": len(tokens),
        "verified_against": against,
        **limits,
    }


def _transformers_logits(folder: Path, tokens: Tokens, model_type: str) -> Logits:
    """By the architecture's class in transformers: none is looked up in the folder, none of its code is run."""
    import torch
    import transformers

    classes = {
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
    }
    transformers.logging.disable_progress_bar()
    reference = classes[model_type].from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    with torch.inference_mode():
        return reference.eval()(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()


def _read_golden(path: Path, vocab_size: int) -> tuple[Tokens, Positions, Logits]:
    try:
        tensors = load_file(path)
        tokens, positions, logits = (tensors[name] for name in ("tokens", "positions", "logits"))
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is no golden file with tokens, positions and logits ({error})") from None
    if logits.shape != (len(positions), vocab_size) or positions.max() >= len(tokens) or tokens.max() >= vocab_size:
        raise CheckpointError(f"{path}: logits {logits.shape} do not fit a vocabulary of {vocab_size}")
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{path}: logits hold NaN or infinity, which nothing can be compared with; make it again")
    return tokens.astype(np.int32), positions, logits.astype(np.float32)


def _mean_kl(expected: Logits, actual: Logits) -> float:
    """Mean over positions of KL(expected ‖ actual), in nats."""
    p, q = (x - _logsumexp(x) for x in (expected.astype(np.float64), actual.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def _logsumexp(x: np.ndarray) -> np.ndarray:
    peak = x.max(axis=-1, keepdims=True)
    return peak + np.log(np.exp(x - peak).sum(axis=-1, keepdims=True))
