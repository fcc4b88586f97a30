"""Llama: RMS norms, rotary positions, grouped-query attention, SwiGLU (arXiv 2302.13971, 2307.09288, 2407.21783).

Mistral and Qwen2 run the same module; their files say how their configurations differ.
"""

from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.config_reader import ConfigReader
from qs_jax.errors import ConfigError
from qs_jax.models.base import Block, CausalLM, Heads, Hidden, Positions
from qs_jax.models.layers import ACTIVATIONS, Init, Linear, RMSNorm
from qs_jax.models.rope import inverse_frequencies, rotate

SUPPLIED = MappingProxyType(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
)
"""What Hugging Face's `LlamaConfig` supplies where `config.json` says nothing."""


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Read a Llama `config.json`.

    Raises:
        ConfigError: a size is absurd, or an option that changes the mathematics is set.
    """
    reader.refuse("sliding_window")
    bias = reader.flag("attention_bias", False)
    return family_config(
        reader,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=reader.flag("mlp_bias", False),
        context=reader.context(),
    )


def family_config(
    reader: ConfigReader, *, attention_bias: bool, attention_output_bias: bool, mlp_bias: bool, context: int
) -> ModelConfig:
    """What all architectures that run this module name alike in `config.json`; they differ in biases and context.

    Raises:
        ConfigError: a size is missing or absurd, or an option that changes the mathematics is set.
    """
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    kv_heads, head_dim = reader.key_value_heads(heads), reader.integer("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise ConfigError(
            f"{reader.source}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    if head_dim % 2:
        raise ConfigError(f"{reader.source}: head_dim={head_dim} is odd; rotary positions need an even one")
    vocab_size = reader.integer("vocab_size")
    return ModelConfig(
        model_type=reader.raw["model_type"],
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.layers("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        norm_epsilon=reader.number("rms_norm_eps"),
        activation=reader.activation("hidden_act", "silu"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_output_bias=attention_output_bias,
        mlp_bias=mlp_bias,
        rope=reader.rope(),
        eos_token_ids=reader.token_ids("eos_token_id", vocab_size),
        bos_token_id=reader.token_id("bos_token_id", vocab_size),
        pad_token_id=reader.token_id("pad_token_id", vocab_size),
    )


class LlamaBlock(Block):
    def __init__(self, config: ModelConfig, layer: int, *, init: Init):
        super().__init__(config, layer, init=init)
        hidden, inner, epsilon, bias = (
            config.hidden_size,
            config.intermediate_size,
            config.norm_epsilon,
            config.mlp_bias,
        )
        residual_std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        self.input_norm = RMSNorm(hidden, epsilon=epsilon, init=init)
        self.mlp_norm = RMSNorm(hidden, epsilon=epsilon, init=init)
        self.gate = Linear(hidden, inner, bias=bias, init=init)
        self.up = Linear(hidden, inner, bias=bias, init=init)
        self.down = Linear(inner, hidden, bias=bias, init=init, std=residual_std)

    def attention_norm(self, hidden_states: Hidden) -> Hidden:
        return self.input_norm(hidden_states)

    def place(self, heads: Heads, positions: Positions) -> Heads:
        assert self.config.rope is not None
        return rotate(heads, positions, inverse_frequencies(self.config.rope, self.config.head_dim))

    def mlp(self, hidden_states: Hidden) -> Hidden:
        x = self.mlp_norm(hidden_states)
        gated = ACTIVATIONS[self.config.activation](self.gate(x, jnp.float32)) * self.up(x, jnp.float32)
        return self.down(gated.astype(x.dtype))


class Llama(CausalLM):
    def __init__(self, config: ModelConfig, *, init: Init):
        super().__init__(config, init=init)
        self.blocks = nnx.List([LlamaBlock(config, layer, init=init) for layer in range(config.num_hidden_layers)])
        self.output_norm = RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, init=init)

    def embed(self, tokens: Int[Array, "batch tokens"], positions: Positions) -> Hidden:
        return self.embedding(tokens)

    def final_norm(self, hidden_states: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        return self.output_norm(hidden_states)
