"""Mistral: Llama's module without biases, within its sliding window (arXiv 2310.06825)."""

from collections.abc import Mapping
from typing import Any

from qs_jax.config import ConfigReader, ModelConfig
from qs_jax.models import llama

_WINDOW = 4096
"""Hugging Face's `MistralConfig` where `sliding_window` is not written at all; later releases write null."""


def config_from_hf(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Read a Mistral `config.json`. The context ends where the sliding window would begin to hide tokens.

    Raises:
        ConfigError: a size is missing or absurd, or an option that changes the mathematics is set.
    """
    reader = ConfigReader(raw, source)
    return llama.family_config(
        reader,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        context=reader.context(window=reader.sliding_window(_WINDOW)),
    )
