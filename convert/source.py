"""Where weights come from: a Hugging Face folder or a hub id. Safetensors only, read one tensor at a time."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qs_jax.errors import CheckpointError
from qs_jax.tokenizer import TOKENIZER_FILES

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Source:
    """A Hugging Face folder: its configuration, and name and shape of every tensor; values are read on demand."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files = _weight_files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._home: dict[str, Path] = {}
        for path in sorted(set(self._files.values())) if self._files else [folder / _SINGLE]:
            refuse_link_out(folder, path)
            self._read_header(path)
        absent = sorted(set(self._files) - set(self._home))
        if absent:
            raise CheckpointError(f"{folder / _INDEX}: names tensors that no shard holds ({', '.join(absent[:5])})")

    def _read_header(self, path: Path) -> None:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                part = file.get_slice(name)
                if part.get_dtype() not in _FLOATS and not name.endswith((".attn.bias", ".attn.masked_bias")):
                    raise CheckpointError(
                        f"{path}: tensor {name} is {part.get_dtype()}, expected one of {', '.join(_FLOATS)}"
                    )
                if name in self._home:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._home[name].name}; remove one")
                self._home[name], self.shapes[name] = path, tuple(part.get_shape())

    @property
    def bytes(self) -> int:
        """Size of all weight files."""
        return sum(path.stat().st_size for path in set(self._home.values()))

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            CheckpointError: it holds a NaN or an infinity, or the file cannot be read.
        """
        path = self._home[name]
        with _opened(path) as file:
            tensor = file.get_tensor(name)
        if not np.isfinite(tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; get a sound copy of the weights")
        return tensor


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file, or an empty object where it is absent.

    Raises:
        CheckpointError: the file is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; restore or remove it")
    return value


def locate(path_or_id: str, revision: str | None = None) -> Path:
    """A local folder as it is, or a hub id downloaded (or found in the hub's local cache).

    Raises:
        CheckpointError: there is no such folder, and it is no hub id that can be fetched.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path_or_id}: is a file, expected a model folder or a hub id")
    if not _HUB_ID.fullmatch(path_or_id) or path_or_id.startswith("."):
        raise CheckpointError(f"{path_or_id}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise CheckpointError(
            f"{path_or_id}: is gated; accept its licence on its hub page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{path_or_id}: no such folder and no such model on the hub (or it is private)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{path_or_id}: no such folder, and the hub cannot be reached or refuses ({type(error).__name__})"
        ) from None


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name to shard, from the index; empty for a single file.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or lies outside the folder, a damaged index.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() and not index.is_file():
        return {}
    if not index.is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        advice = (
            "only pickled weights, which are never loaded; save the model as safetensors" if pickled else "no weights"
        )
        raise CheckpointError(f"{folder}: {advice} (looked for {_SINGLE} and {_INDEX})")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: holds no weight_map; restore the file") from None
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {file!r} lies outside the folder or is no safetensors file")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: shard {file} is missing; download it again")
    if not files:
        raise CheckpointError(f"{index}: names no tensors; restore the file")
    return {name: folder / file for name, file in files.items()}


def refuse_link_out(folder: Path, file: Path) -> None:
    """A folder from elsewhere must not make us read what lies outside it; the hub's cache links to its own store.

    Raises:
        CheckpointError: the file is a link out of the folder.
    """
    store = folder.resolve().parents[1] / "blobs" if folder.resolve().parent.name == "snapshots" else folder
    target = file.resolve()
    if not any(target.is_relative_to(place.resolve()) for place in (folder, store)):
        raise CheckpointError(f"{file}: is a link out of its folder; put the file itself there")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: is truncated or no safetensors file ({reason}); download it again") from None
