"""Quantization on the way from a source to a converted folder: part by part, in the order in which the model runs."""

import re
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.defaults import CODEBOOK, GROUP_SIZE
from qs_jax.choices import BITS, METHODS, not_among
from qs_jax.errors import ConfigError
from qs_jax.fitting.grid import CODEBOOKS
from qs_jax.fitting.rounding import relative_errors, round_to_nearest
from qs_jax.matryoshka.codec import BLOCK
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.matryoshka.stored import StoredKernel, dense_path, kernel_arrays, to_manifest

_NEVER = re.compile("(?!)")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantise.

    Attributes:
        method: one of METHODS.
        group_size: inputs that share a scale and an offset; a multiple of 8.
        exclude: module paths that match this stay dense; by default none, as 8 bits of embedding and head cost nothing
            that can be measured (docs/quantization.md).
        pin: module paths that match this are always read at 8 bits; None for none but embedding and head.
        codebook: one of CODEBOOKS.
        keep_dense: whether dense weights are stored beside the codes.
    """

    method: str = METHODS[0]
    group_size: int = GROUP_SIZE
    exclude: re.Pattern[str] = _NEVER
    pin: re.Pattern[str] = _NEVER
    codebook: str = CODEBOOK
    keep_dense: bool = False

    @classmethod
    def of(
        cls,
        *,
        method: str | None = None,
        group_size: int = GROUP_SIZE,
        exclude: str | None = None,
        pin: str | None = None,
        text: bool = False,
        codebook: str = CODEBOOK,
        keep_dense: bool = False,
    ) -> "QuantizeOptions":
        """Check what the user asked for; by default the best method there is, with text or without.

        Raises:
            ConfigError: an unknown method or codebook, a method that needs text without text, a group size that is no
                multiple of 8, or no regular expression.
        """
        method = method or (METHODS[-1] if text else METHODS[0])
        if method not in METHODS:
            raise ConfigError(not_among("--method", method, METHODS))
        if text != (method != METHODS[0]):
            advice = "takes no --calibration-text" if text else "needs --calibration-text"
            raise ConfigError(f"--method {method} {advice}")
        if group_size < BLOCK or group_size % BLOCK:
            raise ConfigError(f"--group-size is {group_size}, expected a multiple of {BLOCK}")
        if codebook not in CODEBOOKS:
            raise ConfigError(not_among("--codebook", codebook, CODEBOOKS))
        patterns = _pattern("--exclude", exclude), _pattern("--pin", pin)
        return cls(method, group_size, *patterns, codebook, keep_dense)

    def selects(self, path: str, array: np.ndarray) -> bool:
        """Whether an array is quantised: kernels and the embedding, unless excluded."""
        weight = path.endswith(".kernel") or path == "embedding.table"
        return weight and array.ndim == 2 and not self.exclude.search(path)

    def least(self, path: str) -> int:
        """Fewest bits at which a kernel may be read."""
        pinned = not path.startswith("blocks.") or self.pin.search(path)
        return BITS[0] if pinned else BITS[-1]


class Quantizer:
    """Turns a part's arrays into what is stored: nested kernels where the options say so."""

    def __init__(self, options: QuantizeOptions):
        self.options = options
        self.kernels: dict[str, StoredKernel] = {}

    def store(self, part: str, arrays: Arrays, dense: Arrays) -> Arrays:
        """What is stored of a part, by path: `dense` are its arrays in the type in which weights are stored."""
        plain, stored = self(part, arrays)
        beside = {dense_path(path): dense[path] for path in arrays.keys() - plain} if self.options.keep_dense else {}
        return {path: dense[path] for path in plain} | stored | beside

    def __call__(self, part: str, arrays: Arrays) -> tuple[Set[str], Arrays]:
        """Which arrays of a part are not quantised, and the codes of the others."""
        stored: Arrays = {}
        chosen = [path for path, array in arrays.items() if self.options.selects(path, array)]
        for path in chosen:
            array = arrays[path]
            weights = jnp.asarray(np.asarray(array, np.float32))
            kernel = replace(self._round(weights), least=self.options.least(path))
            self.kernels[path] = StoredKernel.of(kernel, self.errors(weights, kernel))
            stored |= kernel_arrays(path, kernel)
        return arrays.keys() - set(chosen), stored

    def done(self) -> None:
        """The conversion is complete."""

    def manifest(self, dtype: str) -> dict[str, Any]:
        """What the manifest says about it, once every part is done; `dtype` is that of dense weights."""
        return to_manifest(self.kernels, self.options.method, np.dtype(dtype) if self.options.keep_dense else None)

    @staticmethod
    def errors(weights: jax.Array, kernel: NestedKernel) -> dict[str, Any]:
        """What the manifest says of a kernel: per precision, the relative squared error of its weights."""
        return {"weights": relative_errors(weights, kernel)}

    def _round(self, weights: jax.Array) -> NestedKernel:
        return _ROUND(weights, group_size=self.options.group_size, bend=CODEBOOKS[self.options.codebook])


_ROUND = jax.jit(round_to_nearest, static_argnames=("group_size", "bend"))


def _pattern(option: str, text: str | None) -> re.Pattern[str]:
    if text is None:
        return _NEVER
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{option} is {text!r}, which is no regular expression ({error})") from None
