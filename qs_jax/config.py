"""Model configuration: one frozen, hashable dataclass for every architecture."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qs_jax.errors import ConfigError
from qs_jax.files import ModelFiles

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
RopeType = Literal["default", "linear", "llama3"]

_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how positions beyond the training context are scaled."""

    theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a decoder's computation. Static: part of every compiled program's key.

    `attention_bias` is that of queries, keys and values, `attention_output_bias` that of attention's last projection.
    `max_position_embeddings` is the longest context in which the model computes what it was trained to: no longer than
    a sliding window, where there is one, because within it every token still sees all others.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_epsilon: float
    activation: Activation
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    rope: RopeConfig | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    attention_scale: float | None = None
    attention_scale_by_layer: bool = False

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head as stored: a multiple of 64, so that the head divides among cores.

        The rows beyond `vocab_size` are zeros that no token id reaches; their logits are cut off.
        """
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def scale(self, layer: int) -> float:
        """Factor on the attention logits of `layer`; 1/√head_dim unless the configuration says otherwise."""
        base = self.attention_scale if self.attention_scale is not None else 1.0 / math.sqrt(self.head_dim)
        return base / (layer + 1) if self.attention_scale_by_layer else base


def refuse_quantised(raw: Mapping[str, Any], source: str) -> None:
    """Raise if the weights are codes in somebody else's format.

    Raises:
        ConfigError: it names the format.
    """
    found = next((raw[key] for key in _QUANTISED if raw.get(key)), None)
    if found is not None:
        kind = found.get("quant_method") or found.get("quant_algo") if isinstance(found, dict) else None
        raise ConfigError(
            f"{source}: the weights are quantised ({kind or 'quantization'}), a format that is not read; take the "
            "unquantised model, and --quantize matryoshka for fewer bits"
        )


_QUANTISED = ("quantization_config", "quantization", "compression_config")
"""Keys that transformers, MLX and compressed-tensors write into `config.json`."""


def read_config_json(folder: ModelFiles) -> dict[str, Any]:
    """Parse `folder/config.json`.

    Raises:
        ConfigError: the file is missing, not JSON, or not an object.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no config.json; give a Hugging Face or converted model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({type(error).__name__}); restore the file") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}, expected an object")
    return raw
