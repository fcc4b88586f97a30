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


def kernel_arrays(path: str, kernel: NestedKernel) -> dict[str, np.ndarray]:
    """The arrays to store, by path."""
    return {f"{path}.{leaf}": np.asarray(getattr(kernel, leaf)) for leaf in LEAVES}


def to_manifest(kernels: Mapping[str, StoredKernel], method: str) -> dict[str, Any]:
    """The manifest's entry. Bits per weight count planes, scales and offsets, padding included."""
    abstract = [kernel.abstract(jnp.dtype("float32")) for kernel in kernels.values()]
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    return {
        "format": FORMAT,
        "method": method,
        "bits_per_weight": 8 * stored / max(1, sum(kernel.size for kernel in abstract)),
        "bytes": stored,
        "kernels": {path: asdict(kernel) for path, kernel in kernels.items()},
    }


def from_manifest(entry: Mapping[str, Any] | None, source: str) -> dict[str, StoredKernel]:
    """The kernels by path; empty for a folder without quantised weights.

    Raises:
        CheckpointError: the entry is damaged or of another format.
    """
    try:
        if entry is not None and (found := entry.get("format", 1)) != FORMAT:
            raise CheckpointError(
                f"{source}: its codes are of format {found!r}, this version reads {FORMAT}; convert the model again"
            )
        return {
            str(path): StoredKernel(
                shape=(int(raw["shape"][0]), int(raw["shape"][1])),
                group_size=int(raw["group_size"]),
                bend=tuple(map(float, raw["bend"])),
                least=int(raw["least"]),
                errors=dict(raw["errors"]),
            )
            for path, raw in (entry or {"kernels": {}})["kernels"].items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise CheckpointError(f"{source}: its quantization entry is damaged; convert the model again") from None


def expand(shapes: Mapping[str, Any], kernels: Mapping[str, StoredKernel], source: str) -> dict[str, Any]:
    """Shapes of every stored array: quantised kernels in place of plain ones.

    Raises:
        CheckpointError: a kernel is described that the model does not have.
    """
    expanded = dict(shapes)
    for path, kernel in kernels.items():
        plain = expanded.pop(path, None)
        if plain is None or plain.shape != kernel.shape:
            raise CheckpointError(f"{source}: quantised kernel {path} {kernel.shape} does not fit config.json")
        abstract = kernel.abstract(plain.dtype)
        expanded |= {f"{path}.{leaf}": getattr(abstract, leaf) for leaf in LEAVES}
    return expanded


def collect(arrays: Mapping[str, Any], kernels: Mapping[str, StoredKernel], dtype: jnp.dtype) -> dict[str, Any]:
    """The inverse of `expand` with arrays for shapes: nested kernels put together, everything else as it is."""
    collected = dict(arrays)
    for path, kernel in kernels.items():
        leaves = {leaf: collected.pop(f"{path}.{leaf}") for leaf in LEAVES}
        collected[path] = replace(kernel.abstract(dtype), **leaves)
    return collected
