"""Typed reads from a GGUF's metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf.header import Value, short
from qs_jax.errors import ConfigError, QsJaxError


@dataclass(frozen=True)
class Entries:
    """Metadata by key; those of the architecture's own are asked for without its name, which stands before them.

    Every read raises `error` where an entry is missing that must be there, or is of another type.
    """

    path: Path
    architecture: str
    metadata: Mapping[str, Value]
    error: type[QsJaxError] = ConfigError

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; one for every layer counts where they are all the same."""
        value = self._found(key, default)
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.integer) and value.size:
            if (value != value[0]).any():
                raise self.error(f"{self.path}: {self._full(key)} differs between layers, which is not implemented")
            value = int(value[0])
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._fail(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._found(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fail(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._found(key, default)
        if not isinstance(value, str):
            raise self._fail(key, value, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._found(key, default)
        if not isinstance(value, bool):
            raise self._fail(key, value, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._found(key, None)
        if not isinstance(value, list):
            raise self._fail(key, value, "an array of strings")
        return value

    def has(self, key: str) -> bool:
        return self._full(key) in self.metadata

    def token_id(self, key: str) -> int | None:
        """The id of a special token, where one is named."""
        return self.integer(f"tokenizer.ggml.{key}") if self.has(f"tokenizer.ggml.{key}") else None

    def _full(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.")) else f"{self.architecture}.{key}"

    def _found(self, key: str, default: Any) -> Any:
        value = self.metadata.get(self._full(key), default)
        if value is None:
            raise self.error(f"{self.path}: {self._full(key)} is missing; the file is damaged or holds no whole model")
        return value

    def _fail(self, key: str, value: Any, expected: str) -> QsJaxError:
        return self.error(f"{self.path}: {self._full(key)} is {short(value)}, expected {expected}")
