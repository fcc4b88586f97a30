"""A Hugging Face folder's weights. Read one tensor at a time."""

from pathlib import Path

import numpy as np

from convert.weight_files import (
    INDEX,
    SINGLE,
    Place,
    equal_tensors,
    opened,
    refuse_gguf_inside,
    require_finite,
    weight_files,
)
from qs_jax.checkpoint import is_converted
from qs_jax.config import read_config_json, refuse_quantised
from qs_jax.errors import CheckpointError
from qs_jax.files import refuse_link_out

_FLOATS = ("F64", "F32", "F16", "BF16")
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What AutoGPTQ, AutoAWQ and ModelOpt leave beside weights that they have quantised."""


class FolderSource:
    """A Hugging Face folder: name and shape of every tensor; values are read on demand.

    `notes` says, one line each, what was chosen where the folder's files contradict each other.

    Raises:
        CheckpointError: no weights, damaged or quantised ones, or files that contradict each other.
        ConfigError: `config.json` is missing, or says that the weights are quantised.
    """

    def __init__(self, folder: Path):
        self.files = folder
        self.notes: list[str] = []
        if is_converted(folder):
            raise CheckpointError(f"{folder}: is converted already; give the folder that it was made from")
        refuse_gguf_inside(folder)
        self.raw_config = read_config_json(folder)
        refuse_quantised(self.raw_config, str(folder / "config.json"))
        if found := next((name for name in _QUANTISED_FILES if (folder / name).is_file()), None):
            refuse_quantised({"quantization": True}, str(folder / found))
        self._files = weight_files(folder, self.notes)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._home: dict[str, Place] = {}
        self._shared: dict[str, str] = {}
        for path in sorted(set(self._files.values())) if self._files else [folder / SINGLE]:
            refuse_link_out(folder, path)
            self._read_header(path)
        self._add_shared()
        absent = sorted(set(self._files) - set(self._home))
        if absent:
            raise CheckpointError(f"{folder / INDEX}: names tensors that no shard holds ({', '.join(absent[:5])})")

    def _read_header(self, path: Path) -> None:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                part = file.get_slice(name)
                if part.get_dtype() not in _FLOATS and not name.endswith(_BUFFERS):
                    raise CheckpointError(
                        f"{path}: tensor {name} is {part.get_dtype()}, expected one of {', '.join(_FLOATS)}; quantised "
                        "weights of other formats are not read: take the unquantised model"
                    )
                shape = tuple(part.get_shape())
                if name in self._home:
                    self._accept_twin(name, path, shape)
                    continue
                self._home[name], self.shapes[name] = (path, name), shape
            self._shared |= {kept: other for kept, other in (file.metadata() or {}).items() if kept != "format"}

    def _accept_twin(self, name: str, path: Path, shape: tuple[int, ...]) -> None:
        """A tensor that stands in two files, which is harmless where it is the same in both."""
        before, _ = self._home[name]
        if shape != self.shapes[name] or not equal_tensors((before, name), (path, name), shape):
            raise CheckpointError(f"{path}: tensor {name} is also in {before.name} and differs there; remove one")
        self.notes.append(f"{path}: tensor {name} is also in {before.name}, the same")

    def _add_shared(self) -> None:
        """Tensors that the file leaves out because they are another one's memory, as safetensors' own metadata says."""
        for name, kept in self._shared.items():
            if name not in self._home and kept in self._home:
                self._home[name], self.shapes[name] = self._home[kept], self.shapes[kept]
                self.notes.append(f"{self.files}: {name} is {kept}, as the file's metadata says")

    @property
    def paths(self) -> list[Path]:
        return sorted(self.files.iterdir())

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(path.stat().st_size for path in {path for path, _ in self._home.values()})

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            CheckpointError: it holds a NaN or an infinity, or the file cannot be read.
        """
        path, stored = self._home[name]
        with opened(path) as file:
            tensor = file.get_tensor(stored)
        require_finite(tensor, path, name)
        return tensor

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, and no more of the file than that.

        Raises:
            CheckpointError: it holds a NaN or an infinity, or the file cannot be read.
        """
        path, stored = self._home[name]
        with opened(path) as file:
            part = file.get_slice(stored)[index]
        require_finite(part, path, name)
        return part

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; a few rows of each are in memory at a time."""
        shape = self.shapes[one]
        return shape == self.shapes[other] and equal_tensors(self._home[one], self._home[other], shape)
