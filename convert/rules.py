"""A converter is a table: a Hugging Face tensor name, where it goes in the module, and how it is laid out.

Kernels are stored (outputs, inputs), as in torch's `Linear`; only GPT-2's `Conv1D` kernels are transposed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from qs_jax.config import ModelConfig

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One tensor of a Hugging Face checkpoint and the module paths it fills.

    `{layer}` in names and paths stands for every layer. Several paths share the tensor's outputs in equal parts.
    `transposed` marks kernels stored (inputs, outputs); `padded` marks those whose rows are padded with zeros to
    the module's vocabulary size.
    """

    name: str
    paths: tuple[str, ...]
    transposed: bool = False
    padded: bool = False

    def at(self, layer: int) -> "Rule":
        fill = {"layer": layer}
        return replace(self, name=self.name.format(**fill), paths=tuple(path.format(**fill) for path in self.paths))

    def to_module(self, tensor: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        """Arrays for the module, by path; `rows` is the module's total number of outputs."""
        array = tensor.T if self.transposed else tensor
        if self.padded:
            array = np.pad(array, ((0, rows - array.shape[0]), (0, 0)))
        return dict(zip(self.paths, np.split(array, len(self.paths)), strict=True))

    def from_module(self, arrays: Mapping[str, np.ndarray], vocab_size: int) -> np.ndarray:
        """The inverse of `to_module`."""
        array = np.concatenate([arrays[path] for path in self.paths])
        array = array[:vocab_size] if self.padded else array
        return np.ascontiguousarray(array.T if self.transposed else array)


@dataclass(frozen=True)
class Table:
    """An architecture's rules. `prefix` may stand before every name but `unprefixed`; `ignored` names are buffers;
    `embedding` is the table's name, which a tied head shares."""

    prefix: str
    rules: Callable[[ModelConfig], Iterable[Rule]]
    embedding: str
    unprefixed: tuple[str, ...] = (HEAD,)
    ignored: tuple[str, ...] = ()

    def find(self, names: Iterable[str], bare: str) -> str | None:
        """The tensor of that name, with or without the prefix."""
        return next((name for name in names if self.bare(name) == bare), None)

    def bare(self, name: str) -> str:
        """A tensor's name without the prefix."""
        return name.removeprefix(self.prefix)

    def full(self, name: str) -> str:
        """A rule's name with the prefix, where it stands before it."""
        return name if name in self.unprefixed else self.prefix + name
