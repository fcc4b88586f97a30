"""Where weights come from: a Hugging Face folder or a hub id. Read one tensor at a time."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.weight_files import INDEX, SINGLE, Place, equal_tensors, no_weights, opened, weight_files
from qs_jax.checkpoint import MANIFEST, is_converted
from qs_jax.config import read_config_json, refuse_quantised
from qs_jax.errors import CheckpointError
from qs_jax.files import read_json, refuse_link_out, refuse_what_is_no_file
from qs_jax.lens import LENS_FILE
from qs_jax.tokenizer_files import TOKENIZER_FILES

_FLOATS = ("F64", "F32", "F16", "BF16")
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""What AutoGPTQ, AutoAWQ and ModelOpt leave beside weights that they have quantised."""

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
_OURS = ("policy.json", LENS_FILE, MANIFEST)
_SHARDS = "model-*-of-*.safetensors"
_TIMEOUT_S = 10.0


class Source:
    """A Hugging Face folder: name and shape of every tensor; values are read on demand.

    `notes` says, one line each, what was chosen where the folder's files contradict each other.

    Raises:
        CheckpointError: no weights, damaged or quantised ones, or files that contradict each other.
        ConfigError: `config.json` is missing, or says that the weights are quantised.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes: list[str] = []
        if is_converted(folder):
            raise CheckpointError(f"{folder}: is converted already; give the folder that it was made from")
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
                self.notes.append(f"{self.folder}: {name} is {kept}, as the file's metadata says")

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
        if not np.isfinite(tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; get a sound copy of the weights")
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values; a few rows of each are in memory at a time."""
        shape = self.shapes[one]
        return shape == self.shapes[other] and equal_tensors(self._home[one], self._home[other], shape)


def locate(path_or_id: str, revision: str | None = None) -> Path:
    """A local folder as it is, or a hub id downloaded (or found in the hub's local cache).

    Of a repository only the files that are read are fetched: configuration, tokenizer, and the weights once.

    Raises:
        CheckpointError: there is no such folder, and it is no hub id that can be fetched, or has no safetensors.
    """
    try:
        folder = Path(path_or_id).expanduser()
        if folder.is_dir():
            refuse_what_is_no_file(folder, (*_SMALL, *_OURS))
            return folder
        if folder.exists():
            raise CheckpointError(f"{path_or_id}: is a file, expected a model folder or a hub id")
    except (OSError, RuntimeError):  # a name too long, a user that is not there
        raise CheckpointError(f"{path_or_id}: no such folder") from None
    if not _HUB_ID.fullmatch(path_or_id) or path_or_id.startswith("."):
        raise CheckpointError(f"{path_or_id}: no such folder")
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return _fetch(path_or_id, revision)
    except GatedRepoError:
        raise CheckpointError(
            f"{path_or_id}: is gated; accept its licence on its hub page and log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{path_or_id}: no such folder and no such model on the hub (or it is private)") from None
    except HFValidationError:
        raise CheckpointError(f"{path_or_id}: no such folder, and no id that a model on the hub can have") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{path_or_id}: no such folder, and the hub cannot be reached or refuses ({type(error).__name__})"
        ) from None


def _fetch(repository: str, revision: str | None) -> Path:
    """The snapshot's folder, with the files that are read."""
    from huggingface_hub import snapshot_download

    names = _listed(repository, revision)
    if names is None:
        patterns = [*_SMALL, SINGLE, _SHARDS]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    if SINGLE not in names and INDEX not in names:
        raise CheckpointError(f"{repository}: {no_weights(names)}")
    small = [name for name in _SMALL if name in names and (name != INDEX or SINGLE not in names)]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
    weights: list[str] = [SINGLE]
    if SINGLE not in names:
        shards: Any = read_json(folder / INDEX).get("weight_map")
        weights = sorted({str(file) for file in shards.values()}) if isinstance(shards, dict) else [_SHARDS]
    return Path(snapshot_download(repository, revision=revision, allow_patterns=[*small, *weights]))


def _listed(repository: str, revision: str | None) -> Sequence[str] | None:
    """The names of a repository's files; None where the hub cannot be asked, and the local cache may still help."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_S).siblings
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except Exception:  # what a network raises is its client's own, which has changed before
        return None
    return [file.rfilename for file in found or ()]
