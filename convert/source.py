"""Where weights come from: a Hugging Face folder, a hub id, or a GGUF file."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from convert.folder import FolderSource
from convert.hub import SMALL, fetch
from qs_jax.checkpoint import MANIFEST
from qs_jax.errors import CheckpointError
from qs_jax.files import LENS_FILES, ModelFiles, refuse_what_is_no_file

_OURS = ("policy.json", *LENS_FILES, MANIFEST)
_GGUF = ".gguf"


@runtime_checkable
class Source(Protocol):
    """Name and shape of every tensor of a Hugging Face checkpoint, and the small files beside it; values are read on
    demand.

    `notes` says, one line each, what was chosen where the files contradict each other.
    """

    @property
    def files(self) -> ModelFiles: ...

    notes: list[str]
    raw_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def paths(self) -> list[Path]:
        """Every file that it is read from."""
        ...

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            CheckpointError: it holds a NaN or an infinity, or the file cannot be read.
        """
        ...

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, by a slice for each of its axes.

        Raises:
            CheckpointError: it holds a NaN or an infinity, or the file cannot be read.
        """
        ...

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values."""
        ...


def source_of(files: ModelFiles) -> Source:
    """The weights beside a model's small files, as `locate` found them.

    Raises:
        CheckpointError: no weights, damaged or quantised ones, or files that contradict each other.
        ConfigError: the configuration is missing, or cannot be understood.
    """
    if isinstance(files, Path):
        return FolderSource(files)
    from convert.gguf.files import GgufFile
    from convert.gguf.source import GgufSource

    assert isinstance(files, GgufFile)
    return GgufSource(files)


def locate(path_or_id: str, revision: str | None = None) -> ModelFiles:
    """A local folder as it is, a GGUF file as the folder it stands for, or a hub id downloaded (or found in the hub's
    local cache).

    Of a repository only the files that are read are fetched: configuration, tokenizer, and the weights once.

    Raises:
        CheckpointError: there is no such folder or file, and it is no hub id that can be fetched, or has no
            safetensors.
        ConfigError: a GGUF of an architecture that is not read.
    """
    try:
        path = Path(path_or_id).expanduser()
        if path.is_dir():
            refuse_what_is_no_file(path, (*SMALL, *_OURS))
            return path
        if path.suffix.lower() == _GGUF and path.is_file():
            # the package that knows its types is imported for a GGUF only
            from convert.gguf.files import GgufFile

            return GgufFile(path)
        if path.exists():
            raise CheckpointError(f"{path_or_id}: is a file, expected a model folder, a .gguf file or a hub id")
    except (OSError, RuntimeError):  # a name too long, a user that is not there
        raise CheckpointError(f"{path_or_id}: no such folder") from None
    if path.suffix.lower() == _GGUF:
        raise CheckpointError(f"{path_or_id}: no such file")
    return fetch(path_or_id, revision)
