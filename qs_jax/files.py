"""Files that appear whole or not at all, small JSON files, and where what can be made again is kept."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qs_jax.errors import CheckpointError
from qs_jax.hosts import is_first

LONGEST_NAME = 255
"""Bytes that a file's name may have."""

LENS_FILE = "lens.safetensors"
DIRECT_LENS_FILE = "direct_lens.safetensors"
LENS_FILES = (LENS_FILE, DIRECT_LENS_FILE)
"""Names in a model's folder, where `qs_jax.load` finds them."""


@runtime_checkable
class SmallFile(Protocol):
    """As much of a `pathlib.Path` as is asked of a model's small files."""

    def is_file(self) -> bool: ...

    def read_text(self, encoding: str | None = None) -> str: ...

    def read_bytes(self) -> bytes: ...


@runtime_checkable
class ModelFiles(Protocol):
    """A model's folder, or what stands for one: its small files by name. Its `str` is what the user gave."""

    def __truediv__(self, name: str, /) -> SmallFile: ...


def cache_folder() -> Path:
    """Ours in the user's cache folder: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qs_jax"


def read_json(path: SmallFile) -> dict[str, Any]:
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


def refuse_link_out(folder: Path, file: Path) -> None:
    """A folder from elsewhere must not make us read what lies outside it; the hub's cache links to its own store.

    Raises:
        CheckpointError: the file is a link out of the folder.
    """
    store = folder.resolve().parents[1] / "blobs" if folder.resolve().parent.name == "snapshots" else folder
    target = file.resolve()
    if not any(target.is_relative_to(place.resolve()) for place in (folder, store)):
        raise CheckpointError(f"{file}: is a link out of its folder; put the file itself there")


def refuse_what_is_no_file(folder: Path, names: Iterable[str]) -> None:
    """Of the files of a folder from elsewhere: none may be a link out of it, nor a pipe that is never written to.

    Raises:
        CheckpointError: it names the file.
    """
    for file in (folder / name for name in names):
        if file.is_symlink():
            refuse_link_out(folder, file)
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file}: is no file; put the file itself there")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, beside the file, then rename: a killed process leaves the old file or the new.
    Of several processes the first writes.

    Raises:
        OSError: nothing can be written there; what was begun is taken away again.
    """
    if not is_first():
        return
    partial = _partial(path)
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_whole(path: Path) -> None:
    """Remove a file, and what a killed process began to write in its place; of several processes the first does."""
    if not is_first():
        return
    for file in (path, _partial(path)):
        file.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
