"""Weights of a GGUF, by the names and in the layout of Hugging Face's checkpoints. Read one tensor at a time."""

from pathlib import Path

import numpy as np

from convert.gguf.files import GgufFile
from convert.gguf.header import Header, Tensor
from convert.gguf.metadata import FACTORS
from convert.gguf.names import Place, place_of, unpaired
from convert.gguf.tensors import same_values, tensor_values
from convert.weight_files import require_finite
from qs_jax.errors import CheckpointError


class GgufSource:
    """A GGUF as `convert.source.Source`.

    Raises:
        CheckpointError: two of its tensors are one.
        ConfigError: metadata that cannot be understood.
    """

    def __init__(self, file: GgufFile):
        self.files = file
        self.raw_config = file.config
        self.notes = file.notes
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._whole: tuple[str, np.ndarray] | None = None
        self._home: dict[str, tuple[Header, Tensor, Place]] = {}
        for name, (header, tensor) in file.tensors.items():
            if name == FACTORS:  # the configuration says it
                continue
            place = place_of(file.table, name)
            if place.name in self._home:
                raise CheckpointError(
                    f"{header.path}: tensor {name} is {place.name}, which is there; get the file again"
                )
            if place.heads:
                self._refuse_torn_heads(name, tensor, header.path, self.raw_config[place.heads])
            self._home[place.name] = header, tensor, place
            self.shapes[place.name] = tensor.shape[::-1] if place.transposed else tensor.shape

    @staticmethod
    def _refuse_torn_heads(name: str, tensor: Tensor, path: Path, heads: int) -> None:
        if heads < 1 or tensor.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{path}: tensor {name} {tensor.shape} is no {heads} heads of pairs; get the file again"
            )

    @property
    def paths(self) -> list[Path]:
        return [header.path for header in self.files.headers]

    @property
    def bytes(self) -> int:
        """Size of all parts."""
        return sum(len(header.data) for header in self.files.headers)

    def read(self, name: str) -> np.ndarray:
        """One tensor, de-quantised to float32 if it is quantised.

        Raises:
            CheckpointError: it holds a NaN or an infinity.
        """
        header, tensor, place = self._home[name]
        values = tensor_values(header, tensor)
        require_finite(values, header.path, name)
        if place.heads:
            values = values[unpaired(len(values), self.raw_config[place.heads])]
        return values.T if place.transposed else values

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, which is de-quantised whole: once for parts that are asked for in a row.

        Raises:
            CheckpointError: it holds a NaN or an infinity.
        """
        if self._whole is None or self._whole[0] != name:
            self._whole = None  # of two tensors one at a time is in memory
            self._whole = name, self.read(name)
        return self._whole[1][index]

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; a few of each are in memory at a time."""
        return same_values(*self._home[one][:2], *self._home[other][:2])
