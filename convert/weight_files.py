"""Which files of a folder hold its weights, and how one of them is opened. Safetensors only."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from qs_jax.errors import CheckpointError
from qs_jax.files import LENS_FILES, LONGEST_NAME

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "only pickled weights, which are never loaded"

_ROWS = 4096
"""Rows of two tensors that are compared at once."""

Place = tuple[Path, str]
"""A file, and the name that a tensor has in it."""


def weight_files(folder: Path, notes: list[str]) -> dict[str, Path]:
    """Tensor name to shard, from the index; empty for a single file, which wins over an index as in transformers.

    Raises:
        CheckpointError: no safetensors, a shard that is missing or lies outside the folder, a damaged index.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        if index.is_file():
            notes.append(f"{folder}: {SINGLE} is read, {INDEX} beside it is not, as in transformers")
        _note_unread(folder, {SINGLE}, notes)
        return {}
    if not index.is_file():
        raise CheckpointError(f"{folder}: {no_weights(_names(folder))}")
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{index}: holds no weight_map; restore the file") from None
    for file in sorted(set(files.values())):
        if Path(file).name != file or not file.endswith(".safetensors") or len(file.encode()) > LONGEST_NAME:
            raise CheckpointError(f"{index}: shard {file!r} lies outside the folder or is no safetensors file")
        if not (folder / file).is_file():
            only_pickled = not any((folder / other).is_file() for other in files.values())
            pickled = f"; there are {PICKLED}" if only_pickled and holds_pickles(_names(folder)) else ""
            raise CheckpointError(f"{folder}: shard {file} is missing{pickled}; download it again")
    if not files:
        raise CheckpointError(f"{index}: names no tensors; restore the file")
    _note_unread(folder, set(files.values()), notes)
    return {name: folder / file for name, file in files.items()}


def refuse_gguf_inside(folder: Path) -> None:
    """A GGUF is a model of its own, also where it lies in a folder: of several, which one is not ours to choose.

    Raises:
        CheckpointError: the folder has GGUF files and no other weights.
    """
    names = _names(folder)
    found = sorted(name for name in names if name.lower().endswith(".gguf"))
    if found and not {SINGLE, INDEX} & set(names):
        which = "it" if len(found) == 1 else "one of them"
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{folder}: has no safetensors, but {', '.join(found[:3])}{more}; give the path of {which}"
        )


def no_weights(names: Iterable[str]) -> str:
    """What to say of a folder or repository with these files, none of which can be read."""
    names = list(names)
    if any(name.lower().endswith(".gguf") for name in names):
        return f"no safetensors, but GGUF files (looked for {SINGLE} and {INDEX}); fetch one of them and give its path"
    advice = f"{PICKLED}; save the model as safetensors" if holds_pickles(names) else "no weights"
    return f"{advice} (looked for {SINGLE} and {INDEX})"


def holds_pickles(names: Iterable[str]) -> bool:
    return any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names)


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def _note_unread(folder: Path, read: set[str], notes: list[str]) -> None:
    known = {*read, *LENS_FILES}
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in known)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        notes.append(f"{folder}: {', '.join(others[:3])}{more} beside the weights: not read")


def require_finite(tensor: np.ndarray, path: Path, name: str) -> None:
    """Refuse weights that no product survives.

    Raises:
        CheckpointError: the tensor holds a NaN or an infinity.
    """
    if not np.isfinite(_wide(tensor)).all():
        raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; get a sound copy of the weights")


def equal_tensors(one: Place, other: Place, shape: tuple[int, ...]) -> bool:
    """Whether two tensors of a shape, each given by file and name, hold the same values."""
    if one == other:
        return True
    with opened(one[0]) as first, opened(other[0]) as second:
        ours, theirs = first.get_slice(one[1]), second.get_slice(other[1])
        if not shape:
            return bool(first.get_tensor(one[1]) == second.get_tensor(other[1]))
        return all(
            np.array_equal(_wide(ours[row:end]), _wide(theirs[row:end]))
            for row in range(0, shape[0], _ROWS)
            for end in [min(row + _ROWS, shape[0])]
        )


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: is truncated or no safetensors file ({reason}); download it again") from None
