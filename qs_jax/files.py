"""Files that appear whole or not at all, and small JSON files."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qs_jax.errors import CheckpointError


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, beside the file, then rename: a killed process leaves the old file or the new.

    Raises:
        OSError: nothing can be written there; what was begun is taken away again.
    """
    partial = _partial(path)
    try:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def remove_whole(path: Path) -> None:
    """Remove a file, and what a killed process began to write in its place."""
    for file in (path, _partial(path)):
        file.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
