"""Files that appear whole or not at all."""

from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text beside the file, then rename it over: a killed process leaves the old file or the new one.

    Raises:
        OSError: nothing can be written there; what was begun is taken away again.
    """
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
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
