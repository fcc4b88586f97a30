"""Mistral: Llama's module without biases, within its sliding window (arXiv 2310.06825)."""

from types import MappingProxyType

from qs_jax.config import ModelConfig
from qs_jax.config_reader import ConfigReader
from qs_jax.models import llama

_WINDOW = 4096
"""Hugging Face's `MistralConfig` where `sliding_window` is not written at all; later releases write null."""


SUPPLIED = MappingProxyType(
    {
        **llama.SUPPLIED,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    }
)
"""What Hugging Face's `MistralConfig` supplies where `config.json` says nothing."""


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Read a Mistral `config.json`. The context ends where the sliding window would begin to hide tokens.

    Raises:
        ConfigError: a size is absurd, or an option that changes the mathematics is set.
    """
    return llama.family_config(
        reader,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        context=reader.context(window=reader.sliding_window(_WINDOW)),
    )
