"""Nested kernels in a converted folder: arrays by module path, and what the manifest says of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qs_jax.errors import CheckpointError
from qs_jax.matryoshka.kernel import NestedKernel, abstract_kernel

FORMAT = 2
"""Of codes in words; 1 was 32-bit words."""

LEAVES = ("high", "middle", "low", "scales", "offsets")
"""The arrays of a kernel; `blocks.0.q.kernel` stores `blocks.0.q.kernel.high` and so on."""

_DENSE = "dense"
"""Likewise the dense weights, where they are kept beside the codes."""


@dataclass(frozen=True)
class StoredKernel:
    """One quantised kernel as the manifest describes it.

    `errors` holds, per precision, the relative squared error of the weights and, where text was given, of the layer's
    output.
    """

    shape: tuple[int, int]
    group_size: int
    bend: tuple[float, ...]
    least: int
    errors: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: NestedKernel, errors: dict[str, Any]) -> "StoredKernel":
        return cls(kernel.shape, kernel.group_size, kernel.bend, kernel.least, errors)

    def abstract(self, dtype: jnp.dtype) -> NestedKernel:
        """The kernel with shapes in place of arrays."""
        return replace(
            abstract_kernel(self.shape, self.group_size), bend=self.bend, least=self.least, dtype=jnp.dtype(dtype)
        )


@dataclass(frozen=True)
class StoredKernels:
    """All quantised kernels by path; `dense` if each has its dense weights beside it."""

    kernels: Mapping[str, StoredKernel] = field(default_factory=dict)
    dense: bool = False


def dense_path(path: str) -> str:
    """Where the dense weights of a quantised kernel are stored."""
    return f"{path}.{_DENSE}"


def split_path(path: str, stored: StoredKernels) -> tuple[str, str | None]:
    """The weight that a stored array belongs to, and which of a kernel's arrays it is; None for dense weights."""
    whole, _, leaf = path.rpartition(".")
    if whole not in stored.kernels:
        return path, None
    return whole, None if leaf == _DENSE else leaf


def kernel_arrays(path: str, kernel: NestedKernel) -> dict[str, np.ndarray]:
    """The arrays to store, by path."""
    return {f"{path}.{leaf}": np.asarray(getattr(kernel, leaf)) for leaf in LEAVES}


def to_manifest(kernels: Mapping[str, StoredKernel], method: str, dense: np.dtype | None = None) -> dict[str, Any]:
    """The manifest's entry. Bits per weight count planes, scales and offsets, padding included.

    `dense` is the type of the weights kept beside the codes, if they are. `bytes` are what the codes take on disk and
    in memory, those under `dense` what these weights take beside them, if they are loaded in the type they have.
    """
    abstract = [kernel.abstract(jnp.dtype("float32")) for kernel in kernels.values()]
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    size = sum(kernel.size for kernel in abstract)
    return {
        "format": FORMAT,
        "method": method,
        "bits_per_weight": 8 * stored / max(1, size),
        "bytes": stored,
        **({} if dense is None else {_DENSE: {"dtype": dense.name, "bytes": size * dense.itemsize}}),
        "kernels": {path: asdict(kernel) for path, kernel in kernels.items()},
    }


def from_manifest(entry: Mapping[str, Any] | None, source: str) -> StoredKernels:
    """What the folder says it holds; nothing for a folder without quantised weights.

    Raises:
        CheckpointError: the entry is damaged or of another format.
    """
    if entry is None:
        return StoredKernels()
    try:
        if (found := entry.get("format", 1)) != FORMAT:
            raise CheckpointError(
                f"{source}: its codes are of format {found!r}, this version reads {FORMAT}; convert the model again"
            )
        kernels = {
            str(path): StoredKernel(
                shape=(int(raw["shape"][0]), int(raw["shape"][1])),
                group_size=int(raw["group_size"]),
                bend=tuple(map(float, raw["bend"])),
                least=int(raw["least"]),
                errors=dict(raw["errors"]),
            )
            for path, raw in entry["kernels"].items()
        }
        return StoredKernels(kernels, dense=_DENSE in entry and int(entry[_DENSE]["bytes"]) >= 0)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        raise CheckpointError(f"{source}: its quantization entry is damaged; convert the model again") from None


def expand(shapes: Mapping[str, Any], stored: StoredKernels, source: str) -> dict[str, Any]:
    """Shapes of every stored array: quantised kernels in place of plain ones, or beside them.

    Raises:
        CheckpointError: a kernel is described that the model does not have.
    """
    expanded = dict(shapes)
    for path, kernel in stored.kernels.items():
        plain = expanded.pop(path, None)
        if plain is None or plain.shape != kernel.shape:
            raise CheckpointError(f"{source}: quantised kernel {path} {kernel.shape} does not fit config.json")
        abstract = kernel.abstract(plain.dtype)
        expanded |= {f"{path}.{leaf}": getattr(abstract, leaf) for leaf in LEAVES}
        if stored.dense:
            expanded[dense_path(path)] = plain
    return expanded


def collect(arrays: dict[str, Any], stored: StoredKernels, dtype: jnp.dtype) -> dict[str, NestedKernel]:
    """The inverse of `expand` with arrays for shapes: takes out what belongs to nested kernels, and puts them
    together."""
    collected: dict[str, NestedKernel] = {}
    for path, kernel in stored.kernels.items():
        leaves = {leaf: arrays.pop(f"{path}.{leaf}") for leaf in LEAVES}
        collected[path] = replace(kernel.abstract(dtype), **leaves)
    return collected
