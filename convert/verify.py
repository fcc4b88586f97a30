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

from convert.parts import hf_config
from convert.reading import read_network
from qs_jax.choices import FULL
from qs_jax.config import read_config_json
from qs_jax.errors import CheckpointError
from qs_jax.files import ModelFiles
from qs_jax.kernels import at_bits, has_planes
from qs_jax.models import forward
from qs_jax.models.base import CausalLM

PROMPT_TOKENS = 500

TOLERANCE = 5e-3
"""Largest error of any logit, in units of the logits' own standard deviation, where both sides have the same weights.

Measured on SmolLM2-135M, the reference models and stories3M: 0.0006 at most. Reading them wrongly costs more: a tenth
of the epsilon 0.006 to 0.16, half the rotary base 1.1 to 16, the rows of one query kernel turned over 0.7 to 18
(`python -m benchmarks.verification_gate`)."""

ROUGH_TOLERANCE = {"float16": 0.1, "bfloat16": 0.5, "matryoshka": 1.0}
"""The same of the median position, where the reference has weights that were not rounded or quantised.

Measured on the same models: 0.02, 0.15 and 0.23 at most. Single positions may be off by 20 on SmolLM2, so that this
sees a wrong rotary embedding or head, but not every mistake."""

Tokens = Int[np.ndarray, " tokens"]
Positions = Int[np.ndarray, " positions"]
Logits = Float[np.ndarray, "positions vocab"]


def verify(
    folder: Path, original: ModelFiles, golden: Path | None, dtype: str, *, quantised: bool = False, name: str
) -> dict[str, Any]:
    """Compare logits of a converted folder with the best reference at hand; refuse one that computes something else.

    The reference is, in this order: a golden file (tensors `tokens`, `positions`, `logits`), transformers on torch if
    both are installed, or the original's weights run by this package (which checks storage only, and is named as such).
    Both sides compute in float32. The last two take the original's weights rounded to `dtype` as they are stored, so
    that no rounding is between them and the converted ones; codes are compared with the original's weights. Codes
    beside dense weights are compared as well, as roughly as codes alone.

    Args:
        folder: the converted folder.
        original: the Hugging Face folder, or the GGUF file.
        golden: a file of logits to compare with.
        dtype: how dense weights are stored.
        quantised: whether kernels are codes alone, which are read at all their bits.
        name: what the user calls the folder.

    Returns:
        `max_abs_logit_error`, `logit_error` (what is compared with the tolerance, in the logits' standard deviations)
        and `logit_error_tolerance`, `kl` (mean over positions, nats, of the reference's next-token distribution from
        the converted one's), `codes_logit_error` of codes beside dense weights, `verified_tokens`, `verified_against`
        and, where the mathematics was not compared with another implementation, `not_verified`.

    Raises:
        CheckpointError: the error is above the tolerance, or the golden file is damaged or does not fit the model.
    """
    config = hf_config(original)
    length = min(PROMPT_TOKENS, config.max_position_embeddings)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, length).astype(np.int32)
    positions, against, unsaid = np.arange(length), "transformers", {}
    if golden is not None:
        tokens, positions, expected = _read_golden(golden, config.vocab_size, config.max_position_embeddings)
        against = golden.name
    elif not (absent := _absent(original)):
        expected = _transformers_logits(original, tokens, config.model_type, "float32" if quantised else dtype)
    else:
        expected = _own_logits(original, tokens, "float32" if quantised else dtype)
        against = "the original's weights, run by qs_jax"
        unsaid = {"not_verified": f"the mathematics against transformers: no {absent} here, and no --golden given"}
    network = read_network(folder, jnp.dtype("float32"), [])
    actual = _logits(network, tokens)[positions]
    rough = "matryoshka" if quantised else dtype if golden is not None and dtype != "float32" else None
    error = _refuse_other(actual, expected, rough, f"{name}: not converted: logits differ from {against}")
    beside: dict[str, float] = {}
    if has_planes(network) and not quantised:
        codes = _logits(at_bits(network, FULL), tokens)[positions]
        complaint = f"{name}: not converted: the codes' logits differ from {against}"
        beside["codes_logit_error"] = _refuse_other(codes, expected, "matryoshka", complaint)
    return {
        "max_abs_logit_error": float(np.abs(actual - expected).max()),
        "logit_error": error,
        "logit_error_tolerance": ROUGH_TOLERANCE[rough] if rough else TOLERANCE,
        "kl": _mean_kl(expected, actual),
        **beside,
        "verified_tokens": len(tokens),
        "verified_against": against,
        **unsaid,
    }


def _refuse_other(actual: Logits, expected: Logits, rough: str | None, complaint: str) -> float:
    """The error in the logits' standard deviations: the largest, or that of the median position where it is `rough`.

    Raises:
        CheckpointError: it is above the tolerance.
    """
    errors = np.abs(actual - expected).max(axis=-1)
    largest = float(np.median(errors) if rough else errors.max())
    error = largest / float(expected.std(axis=-1).mean()) if largest else 0.0
    tolerance = ROUGH_TOLERANCE[rough] if rough else TOLERANCE
    if not error <= tolerance:  # NaN is no small error
        raise CheckpointError(
            f"{complaint} by {error:.3g} standard deviations, more than {tolerance:g}; the folder is read wrongly or "
            "is not what it says"
        )
    return error


def _absent(original: ModelFiles) -> str:
    """What transformers would need to read the original and is not installed; nothing where all of it is."""
    needed = ("torch",) if isinstance(original, Path) else ("torch", "accelerate")
    return " and no ".join(name for name in needed if importlib.util.find_spec(name) is None)


def _own_logits(files: ModelFiles, tokens: Tokens, dtype: str) -> Logits:
    """By this package in float32, of weights rounded to the dtype."""
    network = read_network(files, jnp.dtype(dtype), [])
    network = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == dtype else leaf, network)
    return _logits(network, tokens)


def _logits(network: CausalLM, tokens: Tokens) -> Logits:
    return np.asarray(jax.jit(forward)(network, jnp.asarray(tokens)[None]))[0].astype(np.float32)


def _transformers_logits(original: ModelFiles, tokens: Tokens, model_type: str, dtype: str) -> Logits:
    """By the architecture's class in transformers, in float32, of weights rounded to the dtype.

    No class is looked up in the folder, and none of its code is run. Of a GGUF it reads the tensors by itself, but not
    the metadata: it passes over scaled rotary positions and GPT-2's context.
    """
    import torch
    import transformers

    classes = {
        "gpt2": transformers.GPT2LMHeadModel,
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
    }
    transformers.logging.disable_progress_bar()
    kind = classes[model_type]
    place: dict[str, Any] = {"pretrained_model_name_or_path": original}
    if not isinstance(original, Path):
        file, config = Path(str(original)), kind.config_class.from_dict(read_config_json(original))
        place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "config": config}
    reference = kind.from_pretrained(
        **place,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    with torch.inference_mode():
        # the class's own `float` refuses what came from a GGUF
        return torch.nn.Module.float(reference).eval()(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()


def _read_golden(path: Path, vocab_size: int, context: int) -> tuple[Tokens, Positions, Logits]:
    try:
        tensors = load_file(path)
        tokens, positions, logits = (tensors[name] for name in ("tokens", "positions", "logits"))
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is no golden file with tokens, positions and logits ({error})") from None
    for name, array, below in (("tokens", tokens, vocab_size), ("positions", positions, len(tokens.ravel()))):
        whole = np.issubdtype(array.dtype, np.integer) and array.ndim == 1 and array.size
        if not whole or array.min() < 0 or array.max() >= below:
            raise CheckpointError(f"{path}: {name} are no list of whole numbers from 0 to {below - 1}; make it again")
    if len(tokens) > context:
        raise CheckpointError(f"{path}: {len(tokens)} tokens are more than the model's context of {context}")
    if logits.shape != (len(positions), vocab_size):
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
