"""Qwen2 and Qwen2.5: Llama's module with biases on queries, keys and values alone (arXiv 2407.10671)."""

from types import MappingProxyType

from qs_jax.config import ModelConfig
from qs_jax.config_reader import ConfigReader
from qs_jax.errors import ConfigError
from qs_jax.models import llama

_WINDOW = 4096
_FIRST_WINDOWED_LAYER = 28
"""Defaults of Hugging Face's `Qwen2Config`."""

_KINDS = ("full_attention", "sliding_attention")


SUPPLIED = MappingProxyType(
    {
        **llama.SUPPLIED,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "bos_token_id": None,
        "eos_token_id": None,
    }
)
"""What Hugging Face's `Qwen2Config` supplies where `config.json` says nothing."""


def config_from_hf(reader: ConfigReader) -> ModelConfig:
    """Read a Qwen2 `config.json`. Where a layer has a sliding window, the context ends where it would hide tokens.

    Raises:
        ConfigError: a size is absurd, or an option that changes the mathematics is set.
    """
    return llama.family_config(
        reader,
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=False,
        context=reader.context(window=_window(reader)),
    )


def _window(reader: ConfigReader) -> int | None:
    """The sliding window, if any layer has one."""
    layers = reader.layers("num_hidden_layers")
    kinds = reader.raw.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind not in _KINDS for kind in kinds)):
        raise ConfigError(f"{reader.source}: layer_types holds others than {' and '.join(_KINDS)}, not implemented")
    if not reader.flag("use_sliding_window", False):
        return None
    first = reader.integer("max_window_layers", _FIRST_WINDOWED_LAYER, minimum=0)
    windowed = "sliding_attention" in kinds if kinds is not None else first < layers
    return reader.sliding_window(_WINDOW) if windowed else None
