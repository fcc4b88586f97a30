"""Small random models with a healthy spread of logits: they prove plumbing, not quality."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from qs_jax.fitting.rounding import round_to_nearest
from qs_jax.kernels import TwofoldKernel
from qs_jax.lens import DirectLens, DirectMap, Lens, with_direct_lens, with_lens
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, forward, network_from_arrays, parse_config, random_network
from qs_jax.tokenizer import Tokenizer

NO_IDS = {"bos_token_id": None, "eos_token_id": None}
"""Rows of random models end at no token; left out, Hugging Face's own ids would be supplied."""

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        **NO_IDS,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        **NO_IDS,
    },
}

CONFIGS["mistral"] = {**CONFIGS["llama"], "model_type": "mistral", "sliding_window": 400}
CONFIGS["qwen2"] = {**CONFIGS["llama"], "model_type": "qwen2", "tie_word_embeddings": True}

_random = np.random.default_rng(0)
PROMPTS = [_random.integers(0, 97, length).tolist() for length in (40, 5, 200)]

SAMPLING = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "seed": 3}

LENS_RANK = 8

NAMED = {"bos_token": "<s>"}
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"

_forward = jax.jit(forward)


@cache
def tiny_model(name: str, layers: int = 2, *, tokenizer: bool = False) -> Model:
    """A random model; matrices eight times the usual size, so that tokens differ."""
    config = replace(parse_config(CONFIGS[name], name), num_hidden_layers=layers)
    network = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim == 2 else leaf, random_network(config, seed=0))
    own = tiny_tokenizer() if tokenizer else None
    return Model(config, network, own, jnp.dtype("float32"), f"tiny {name} of {layers} layers")


def reference_logits(model: Model, tokens: list[int]) -> Float[np.ndarray, "tokens vocab"]:
    """Logits of one sequence by the plain forward pass. Padded on the right, which nothing before it can see."""
    padded = np.zeros((1, model.config.max_position_embeddings), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(model.network, padded))[0, : len(tokens)]


def character_tokenizer() -> Backend:
    """One token per printable ASCII character, in order, then <s> and </s>: 97 in all, as many as the tiny models have.

    Every text longer than a character lies over several tokens.
    """
    characters = {chr(code): code - 32 for code in range(32, 127)}
    backend = Backend(models.BPE(vocab={**characters, "<s>": 95, "</s>": 96}, merges=[]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@cache
def tiny_tokenizer() -> Tokenizer:
    return Tokenizer(character_tokenizer(), named=NAMED, chat_template=CHAT_TEMPLATE)


def with_random_lens(model: Model) -> Model:
    """The model with a lens that changes states visibly: it proves plumbing, not quality."""
    rng, layers, hidden = np.random.default_rng(3), model.config.num_hidden_layers - 1, model.config.hidden_size
    shapes = (layers, LENS_RANK, hidden), (layers, hidden, LENS_RANK), (layers, hidden)
    lens = Lens(*(rng.normal(0, 0.1, shape) for shape in shapes))
    return replace(model, network=with_lens(model.network, lens), name=f"{model.name} with a lens")


def with_random_direct_lens(model: Model, stop: int, rank: int = LENS_RANK) -> Model:
    """The model with a direct lens for tokens that stop after so many layers, which looks back to the embedding, and
    tokens of all kinds of rarity from 0 to 12."""
    rng, config = np.random.default_rng(4), model.config
    layers, features = config.num_hidden_layers - stop, 2 * config.num_key_value_heads * config.head_dim
    shapes = (rank, 2 * config.hidden_size), (layers, features, rank), (layers, features)
    one = DirectMap((0, stop), *(rng.normal(0, 0.3, shape) for shape in shapes))
    lens = DirectLens((one,), rng.uniform(0, 12, config.vocab_size))
    return replace(model, network=with_direct_lens(model.network, lens), name=f"{model.name} with a direct lens")


def quantised(model: Model, *, keep_dense: bool = False) -> Model:
    """The model with every block's kernels quantised, or codes beside them."""
    arrays = {**arrays_by_path(model.network)}
    for path, array in arrays.items():
        if path.startswith("blocks.") and array.ndim == 2:
            codes = round_to_nearest(array, group_size=16)
            arrays[path] = TwofoldKernel(array, codes) if keep_dense else codes
    network = network_from_arrays(model.config, arrays, dtype=model.dtype)
    name = f"{model.name} with codes" if keep_dense else f"quantised {model.name}"
    return replace(model, network=network, name=name)


def narrowed(model: Model) -> Model:
    """The model with every weight, and so every state, in bfloat16."""
    dtype = jnp.dtype("bfloat16")
    network = jax.tree.map(lambda leaf: leaf.astype(dtype), model.network)
    return replace(model, network=network, dtype=dtype, name=f"{model.name} in bfloat16")
