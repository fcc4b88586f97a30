"""GPT-2: layer norms, learned positions, a two-matrix feed-forward, tied head (Radford et al., 2019)."""

from types import MappingProxyType

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.config_reader import ConfigReader
from qs_jax.errors import ConfigError
from qs_jax.models.base import Block, CausalLM, Heads, Hidden, Positions
from qs_jax.models.layers import ACTIVATIONS, Embedding, Init, LayerNorm, Linear

SUPPLIED = MappingProxyType(
    {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
)
"""What Hugging Face's `GPT2Config` supplies where `config.json` says nothing."""

_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Read a GPT-2 `config.json`.

    Raises:
        ConfigError: a size is absurd or said twice, or an option that changes the mathematics is set.
    """
    reader = reader.with_aliases(_ALIASES)
    reader.refuse("add_cross_attention", False)
    source = reader.source
    hidden, heads = reader.integer("n_embd"), reader.integer("n_head")
    if hidden % heads:
        raise ConfigError(f"{source}: n_embd={hidden} is not a multiple of n_head={heads}")
    vocab_size = reader.integer("vocab_size")
    return ModelConfig(
        model_type="gpt2",
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=reader.integer("n_inner", 4 * hidden),
        num_hidden_layers=reader.layers("n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=reader.integer("n_positions"),
        norm_epsilon=reader.number("layer_norm_epsilon"),
        activation=reader.activation("activation_function", "gelu_new"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", True),
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        rope=None,
        eos_token_ids=reader.token_ids("eos_token_id", vocab_size),
        bos_token_id=reader.token_id("bos_token_id", vocab_size),
        pad_token_id=reader.token_id("pad_token_id", vocab_size),
        attention_scale=None if reader.flag("scale_attn_weights", True) else 1.0,
        attention_scale_by_layer=reader.flag("scale_attn_by_inverse_layer_idx", False),
    )


class GPT2Block(Block):
    def __init__(self, config: ModelConfig, layer: int, *, init: Init):
        super().__init__(config, layer, init=init)
        hidden, inner, epsilon = config.hidden_size, config.intermediate_size, config.norm_epsilon
        residual_std = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        self.input_norm = LayerNorm(hidden, epsilon=epsilon, init=init)
        self.mlp_norm = LayerNorm(hidden, epsilon=epsilon, init=init)
        self.up = Linear(hidden, inner, bias=True, init=init)
        self.down = Linear(inner, hidden, bias=True, init=init, std=residual_std)

    def attention_norm(self, hidden_states: Hidden) -> Hidden:
        return self.input_norm(hidden_states)

    def place(self, heads: Heads, positions: Positions) -> Heads:
        return heads

    def mlp(self, hidden_states: Hidden) -> Hidden:
        x = self.mlp_norm(hidden_states)
        return self.down(ACTIVATIONS[self.config.activation](self.up(x, jnp.float32)).astype(x.dtype))


class GPT2(CausalLM):
    def __init__(self, config: ModelConfig, *, init: Init):
        super().__init__(config, init=init)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, init=init, std=0.01)
        self.blocks = nnx.List([GPT2Block(config, layer, init=init) for layer in range(config.num_hidden_layers)])
        self.output_norm = LayerNorm(config.hidden_size, epsilon=config.norm_epsilon, init=init)

    def embed(self, tokens: Int[Array, "batch tokens"], positions: Positions) -> Hidden:
        return self.embedding(tokens) + self.position_embedding(positions)

    def final_norm(self, hidden_states: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        return self.output_norm(hidden_states)
