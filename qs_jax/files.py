"""Files that appear whole or not at all."""

from contextlib import suppress
from pathlib import Path


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
