"""Weights straight from a source's files onto the devices of a mesh: of every array each process reads its own parts.

No device ever holds more than its shard, and no process more at once than the parts of one array that its devices hold
(of a GGUF one whole tensor, as its blocks are de-quantised together).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from convert.parts import Parts, stored_as
from convert.rules import Rule
from convert.source import Source
from qs_jax.sharding import Layout

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StoredArray:
    """A module's array where it lies: a share of a tensor's outputs, perhaps transposed, perhaps fewer than are wanted.

    Each part is read once, however many devices ask for it.
    """

    source: Source
    tensor: str
    rule: Rule
    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    _parts: dict[tuple[tuple[int, int], ...], np.ndarray] = field(default_factory=dict)

    def part(self, index: Index | None) -> np.ndarray:
        """As much of it as an index of slices asks for.

        Raises:
            CheckpointError: a weight is not finite, or too large for the dtype.
        """
        assert index is not None
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True))
        if bounds not in self._parts:
            self._parts[bounds] = stored_as(self._read(*bounds), self.dtype, self.path)
        return self._parts[bounds]

    def _read(self, outputs: tuple[int, int], *inputs: tuple[int, int]) -> np.ndarray:
        first, stop = outputs
        shape = self.source.shapes[self.tensor]
        offset = self.shape[0] * self.rule.paths.index(self.path)
        there = shape[-1 if self.rule.transposed else 0]
        index = slice(offset + first, min(offset + stop, there)), *(slice(*bounds) for bounds in inputs)
        if index[0].start >= there:
            return np.zeros((stop - first, *(end - start for start, end in inputs)), np.float32)
        part = self.source.read_part(self.tensor, index[::-1] if self.rule.transposed else index)
        part = part.T if self.rule.transposed else part
        missing = stop - first - part.shape[0]
        return np.pad(part, ((0, missing), *[(0, 0)] * len(inputs))) if missing else part


def stored_arrays(parts: Parts, dtype: jnp.dtype) -> Iterator[StoredArray]:
    """Every array of the module.

    Raises:
        CheckpointError: the source does not fit its configuration.
    """
    parts.plan.raise_if_incomplete(str(parts.source.files))
    for tensor, rule in parts.plan.tensors:
        for path in rule.paths:
            yield StoredArray(parts.source, tensor, rule, path, parts.shapes[path], dtype)


def read_sharded(parts: Parts, layout: Layout, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """All arrays by module path, each laid out as its table says.

    Raises:
        CheckpointError: the source does not fit its configuration, or cannot be read.
    """
    arrays: dict[str, jax.Array] = {}
    for stored in stored_arrays(parts, dtype):
        place = layout.weight(stored.path, stored.shape)
        arrays[stored.path] = jax.make_array_from_callback(stored.shape, place, stored.part)
    return arrays
