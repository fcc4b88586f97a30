"""A GGUF's metadata as the `config.json` and `generation_config.json` that it stands for."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from convert.gguf.entries import Entries
from qs_jax.config import RopeConfig
from qs_jax.errors import ConfigError
from qs_jax.models.rope import inverse_frequencies

Shapes = Mapping[str, tuple[int, ...]]
"""Of the file's tensors, by their names in it."""

FACTORS = "rope_freqs.weight"
_LOW, _HIGH, _CONTEXT = 1.0, 4.0, 8192
"""Of every Llama 3 with scaled positions; a file has the factors that follow from them."""
_NEAR = 1e-4
"""Relative error of factors that are the same: they are stored in 32 bits."""

_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""What ends a text, a turn and a message."""

_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_SAMPLING |= {"penalty_repeat": "repetition_penalty"}


def config_of(
    entries: Entries, shapes: Shapes, factors: Callable[[], np.ndarray], *, tied: bool, notes: list[str]
) -> dict[str, Any]:
    """What `config.json` would say.

    Args:
        entries: the file's metadata.
        shapes: of its tensors.
        factors: reads `rope_freqs.weight`.
        tied: whether the head is the embedding.
        notes: takes a line for what was decided that the file leaves open.

    Raises:
        ConfigError: something is missing, or asks for mathematics that is not implemented.
    """
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ConfigError(f"{entries.path}: holds no token_embd.weight, a matrix; it is no whole language model")
    if entries.integer("expert_count", 0):
        raise ConfigError(f"{entries.path}: is a mixture of experts, which is not implemented; take a dense model")
    said = entries.integer("vocab_size", embedding[0])
    if said != embedding[0]:
        notes.append(
            f"{entries.path}: {entries.architecture}.vocab_size is {said}, but token_embd.weight has {embedding[0]} "
            "rows, which count"
        )
    common = {
        "vocab_size": embedding[0],
        "tie_word_embeddings": tied,
        "bos_token_id": entries.token_id("bos_token_id"),
        "eos_token_id": entries.token_id("eos_token_id"),
        "pad_token_id": entries.token_id("padding_token_id"),
    }
    own = _gpt2(entries) if entries.architecture == "gpt2" else _llama(entries, shapes, factors)
    return {**own, **common}


def generation_config_of(entries: Entries) -> dict[str, Any]:
    """What `generation_config.json` would say: every end of text that the file names, and its settings of sampling."""
    ends = dict.fromkeys(end for key in _ENDS if (end := entries.token_id(key)) is not None)
    said: dict[str, Any] = {"bos_token_id": entries.token_id("bos_token_id"), "eos_token_id": list(ends) or None}
    said["pad_token_id"] = entries.token_id("padding_token_id")
    for theirs, name in _SAMPLING.items():
        if entries.has(key := f"general.sampling.{theirs}"):
            said[name] = entries.integer(key) if name == "top_k" else entries.number(key)
    return {name: value for name, value in said.items() if value is not None}


def _gpt2(entries: Entries) -> dict[str, Any]:
    hidden = entries.integer("embedding_length")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": entries.integer("block_count"),
        "n_head": entries.integer("attention.head_count"),
        "n_embd": hidden,
        "n_inner": entries.integer("feed_forward_length", 4 * hidden),
        "n_positions": entries.integer("context_length"),
        "layer_norm_epsilon": entries.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _llama(entries: Entries, shapes: Shapes, factors: Callable[[], np.ndarray]) -> dict[str, Any]:
    hidden, heads = entries.integer("embedding_length"), entries.integer("attention.head_count")
    head_dim = entries.integer("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := entries.integer(key, head_dim)) != head_dim:
            raise ConfigError(
                f"{entries.path}: {entries.architecture}.{key} is {size}, expected {head_dim}, the size of a head; "
                "another is not implemented"
            )
    kind = entries.architecture
    windowed = {}
    if entries.has("attention.sliding_window"):
        kind = "mistral" if kind == "llama" else kind
        windowed = {"sliding_window": entries.integer("attention.sliding_window")}
        windowed |= {"use_sliding_window": True, "max_window_layers": 0} if kind == "qwen2" else {}
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "num_hidden_layers": entries.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": entries.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": entries.integer("feed_forward_length"),
        "max_position_embeddings": entries.integer("context_length"),
        "rms_norm_eps": entries.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        **{name: tensor in shapes for name, tensor in biases.items()},
        "rope_parameters": _rope(entries, head_dim, factors if FACTORS in shapes else None),
        **windowed,
    }


def _rope(entries: Entries, head_dim: int, factors: Callable[[], np.ndarray] | None) -> dict[str, Any]:
    """How positions are rotated. Llama 3's scaling is in a file only as what each frequency is divided by."""
    theta = entries.number("rope.freq_base", 10000.0)
    kind = entries.text("rope.scaling.type", "linear" if entries.has("rope.scale_linear") else "none")
    if factors is not None:
        if kind != "none":
            raise ConfigError(f"{entries.path}: rotary scaling is {kind}, and {FACTORS} scales too; not implemented")
        return _scaled(entries, theta, head_dim, factors())
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind != "linear":
        raise ConfigError(f"{entries.path}: rotary scaling {kind!r} is not implemented; take a model without it")
    factor = entries.number("rope.scaling.factor", entries.number("rope.scale_linear", 1.0))
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _scaled(entries: Entries, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """The scaling that gives these factors.

    Raises:
        ConfigError: it is neither none nor Llama 3's.
    """
    if factors.shape == (head_dim // 2,) and np.isfinite(factors).all() and theta > 0 and (factors >= 1).all():
        factor, context = float(factors.max()), entries.integer("rope.scaling.original_context_length", _CONTEXT)
        plain = RopeConfig(theta)
        scaled = RopeConfig(theta, "llama3", factor, _LOW, _HIGH, context)
        if factor == 1.0:
            return {"rope_type": "default", "rope_theta": theta}
        expected = inverse_frequencies(plain, head_dim) / inverse_frequencies(scaled, head_dim)
        if np.allclose(factors, expected, rtol=_NEAR):
            return {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": context,
            }
    raise ConfigError(f"{entries.path}: {FACTORS} scales positions otherwise than Llama 3 does; not implemented")
