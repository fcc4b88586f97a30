"""Model configuration: one frozen, hashable dataclass for every architecture, read strictly from `config.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qs_jax.errors import ConfigError

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu"]
RopeType = Literal["default", "linear", "llama3"]

_LARGEST_INTEGER = 2**31 - 1
_VOCAB_MULTIPLE = 64
_MOST_LAYERS = 1024


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


class ConfigReader:
    """Typed reads from a raw `config.json`: a missing or absurd value is a one-line `ConfigError`, never a default.

    A default is used only where the caller names it, which the architecture files do where Hugging Face's own
    configuration class documents one.
    """

    def __init__(self, raw: Mapping[str, Any], source: str):
        self.raw = raw
        self.source = source

    def _fail(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {self.raw.get(key)!r}, expected {expected}")

    def _present(self, key: str, *, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.source}: {key} is missing; add it to config.json")
            return default
        return value

    def integer(self, key: str, default: Any = None, *, minimum: int = 1, maximum: int = _LARGEST_INTEGER) -> int:
        value = self._present(key, default=_REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._fail(key, f"a whole number from {minimum} to {maximum}")
        return value

    def layers(self, key: str) -> int:
        """A number of layers; an absurd one is refused before a network of that depth is laid out."""
        return self.integer(key, maximum=_MOST_LAYERS)

    def context(self, *, window: int | None = None) -> int:
        """The longest context: `max_position_embeddings`, or the sliding window if that is shorter.

        A window hides a token from those `window` positions later, so that no context up to its length is touched by
        it. Longer requests are refused like any beyond the context; a rolling cache is not implemented.
        """
        positions = self.integer("max_position_embeddings")
        return positions if window is None else min(positions, window)

    def sliding_window(self, default: int) -> int | None:
        """`sliding_window` in tokens: the default where it is absent, none where it is null."""
        written = "sliding_window" in self.raw
        return None if written and self.raw["sliding_window"] is None else self.integer("sliding_window", default)

    def number(self, key: str, default: Any = None) -> float:
        value = self._present(key, default=_REQUIRED if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self._fail(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._present(key, default=default)
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> Any:
        value = self._present(key, default=_REQUIRED if default is None else default)
        if value not in choices:
            raise self._fail(key, "one of " + ", ".join(choices))
        return value

    def refuse(self, key: str, *accepted: Any) -> None:
        """Raise unless `key` is absent, null or one of `accepted`: an option that changes the mathematics."""
        if self.raw.get(key) is not None and self.raw[key] not in accepted:
            raise ConfigError(f"{self.source}: {key}={self.raw[key]!r} is not implemented; convert a model without it")

    def token_id(self, key: str, vocab_size: int) -> int | None:
        ids = self.token_ids(key, vocab_size)
        return ids[0] if ids else None

    def token_ids(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """A token id or a list of them, as `eos_token_id` may be. Ids outside the vocabulary are refused."""
        value = self.raw.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in values):
            raise self._fail(key, f"token ids from 0 to {vocab_size - 1}")
        return tuple(values)

    def rope(self) -> RopeConfig:
        """Read `rope_theta` and `rope_scaling`, or the newer `rope_parameters` that holds both."""
        parameters = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(parameters, dict):
            raise ConfigError(f"{self.source}: rope_parameters is {parameters!r}, expected an object")
        merged = {"rope_theta": self.raw.get("rope_theta"), **parameters}
        if merged["rope_theta"] is None:
            raise ConfigError(f"{self.source}: rope_theta is missing, at the top level and in rope_parameters; add it")
        merged.setdefault("rope_type", merged.get("type", "default"))
        merged.setdefault("partial_rotary_factor", self.raw.get("partial_rotary_factor"))
        reader = ConfigReader(merged, f"{self.source}: rope_parameters")
        reader.refuse("partial_rotary_factor", 1)
        rope_type = reader.choice("rope_type", ("default", "linear", "llama3"))
        if rope_type == "default":
            return RopeConfig(reader.number("rope_theta"))
        if rope_type == "linear":
            return RopeConfig(reader.number("rope_theta"), "linear", reader.number("factor"))
        return RopeConfig(
            reader.number("rope_theta"),
            "llama3",
            reader.number("factor"),
            reader.number("low_freq_factor"),
            reader.number("high_freq_factor"),
            reader.integer("original_max_position_embeddings"),
        )


_REQUIRED = object()


def read_config_json(folder: Path) -> dict[str, Any]:
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
