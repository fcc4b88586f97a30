"""The models that speed is measured on: the real one, published shapes with random weights, and the small ones."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import real_model
from qs_jax.choices import BITS
from qs_jax.fitting.grid import EVEN, Bend
from qs_jax.fitting.rounding import round_to_nearest
from qs_jax.kernels import TwofoldKernel, is_nested
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, network_from_arrays, parse_config, random_network

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-124m": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
    "llama-1.1b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
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
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""OpenAI's GPT-2 small, TinyLlama 1.1B, and Llama-2-7B with its context doubled, so that 4,096 tokens leave room."""

NAMES = (real_model.NAME, *SHAPES)
"""What `model_named` knows by name."""


def random_model(raw: dict[str, Any], name: str, dtype: str = "float32") -> Model:
    """A model of a shape, without a tokenizer."""
    config = parse_config(raw, name)
    return Model(config, random_network(config, seed=0, dtype=dtype), None, jnp.dtype(dtype), name)


def nested_model(model: Model, group_size: int = 64, bend: Bend = EVEN) -> Model:
    """The same model with every kernel as nested codes, rounded to nearest; embedding and head are read at 8 bits."""
    to_nested = jax.jit(round_to_nearest, static_argnames=("group_size", "bend"))
    arrays = arrays_by_path(model.network)
    for path, array in arrays.items():
        if path.endswith(".kernel") or path == "embedding.table":
            kernel = to_nested(array, group_size=group_size, bend=bend)
            least = BITS[-1] if path.startswith("blocks.") else BITS[0]
            arrays[path] = replace(kernel, least=least, dtype=model.dtype)
    return replace(model, network=network_from_arrays(model.config, arrays, dtype=model.dtype))


def with_codes(model: Model) -> Model:
    """The same model, dense unless bits are asked for: codes lie beside the weights that `nested_model` replaces."""
    arrays, coded = arrays_by_path(model.network), arrays_by_path(nested_model(model).network)
    both = {path: TwofoldKernel(arrays[path], array) if is_nested(array) else array for path, array in coded.items()}
    return replace(model, network=network_from_arrays(model.config, both, dtype=model.dtype))


def model_named(name: str, dtype: str = "float32") -> Model:
    """A shape by name, the real model as `smollm2`, or a model folder by path."""
    if name in SHAPES:
        return random_model(SHAPES[name], name, dtype)
    return replace(load(real_model.place(name), dtype=dtype), name=name)
