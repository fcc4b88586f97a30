"""A converted folder on disk: one Orbax checkpoint per part of the model, configuration, tokenizer, manifest.

The only module that knows Orbax. A part is the first component of a module path (`embedding`, `blocks.3`, …), so
that saving needs one part in memory at a time, and loading a few.
"""

import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from qs_jax.errors import CheckpointError
from qs_jax.files import LONGEST_NAME

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MANIFEST = "manifest.json"
FORMAT = 1

_WEIGHTS = "weights"
_PARTIAL, _REPLACED = ".partial", ".replaced"
_HASH_BLOCK = 1 << 20
_READERS = 4

Arrays = Mapping[str, np.ndarray]


def part_of(path: str) -> str:
    """The part that a module path belongs to: `blocks.3.q.kernel` to `blocks.3`."""
    first, second, *_ = path.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def is_converted(folder: Path) -> bool:
    """Whether we made it; other programs leave a manifest beside safetensors, too."""
    return (folder / MANIFEST).is_file() and (
        (folder / _WEIGHTS).is_dir() or not any(folder.glob("model*.safetensors"))
    )


@contextmanager
def replacing(target: Path, *, overwrite: bool, marker: str = MANIFEST) -> Iterator[Path]:
    """A temporary folder beside the target that takes its place when the block ends well, and vanishes otherwise.

    Only an empty folder or one that holds the file `marker`, which says that we wrote it, is ever replaced.

    Raises:
        CheckpointError: the target exists and `overwrite` is false, or nothing can be written beside it.
    """
    try:
        there = target.exists()
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror}); choose another place") from None
    if there and not overwrite:
        raise CheckpointError(f"{target}: exists already; give another folder or --overwrite")
    if there and not (target / marker).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: holds no {marker}, so it is never overwritten; remove it yourself")
    # named before it exists, so that no interrupt comes between making it and being bound to remove it
    work, held = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}"), None
    try:
        _make(work, target)
        held = _hold(work)
        yield work
        _sync(work)
        work.chmod(0o755)
        _swap(work, target, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}); nothing was changed") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if held is not None:
            os.close(held)


def _make(work: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        work.mkdir(mode=0o700)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror}); choose another place") from None


def _hold(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; None where somebody holds it, it is gone, or the system has no
    such locks: nothing that a killed process left is swept there, as it might be a living one's."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(target: Path) -> None:
    """Take away what a killed process left beside the target; put back what it had moved aside."""
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}.*")):
        if left.suffix not in (_PARTIAL, _REPLACED) or (held := _hold(left)) is None:
            continue
        if left.suffix == _REPLACED and not target.exists():
            left.rename(target)
        else:
            shutil.rmtree(left, ignore_errors=True)
        os.close(held)


def _swap(work: Path, target: Path, *, overwrite: bool) -> None:
    """Put `work` in the target's place. What was there is moved aside first and comes back if that fails."""
    if not target.exists():
        work.rename(target)
        return
    if not overwrite:
        raise CheckpointError(f"{target}: appeared while converting; give another folder or --overwrite")
    aside = work.with_suffix(_REPLACED)
    target.rename(aside)
    try:
        work.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_part(folder: Path, part: str, arrays: Arrays) -> None:
    """Save the arrays of one part, by module path.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    try:
        # In a thread of its own: an interrupt waits for Orbax's writers here, so that nothing comes after the clean-up.
        with _quiet_orbax() as orbax, ThreadPoolExecutor(1) as writer:
            tree = unflatten_dict(dict(arrays), sep=".")
            writer.submit(orbax.save_pytree, (folder / _WEIGHTS / part).absolute(), tree).result()
    except Exception as error:  # Orbax and TensorStore raise almost anything on a full disk
        raise CheckpointError(f"{folder / _WEIGHTS / part}: cannot be written ({_reason(error)})") from error


def read_parts(folder: Path, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Load all parts, a few at a time, straight into device arrays of the given shapes and dtypes, by module path.

    Where a shape has a sharding, each device of it gets its part; else they go to the default device.

    Raises:
        CheckpointError: a part is missing, unreadable or of other shapes.
    """
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, shape in shapes.items():
        wanted = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shape.sharding or place)
        parts.setdefault(part_of(path), {})[path] = wanted

    def read(part: str) -> dict[str, jax.Array]:
        try:
            tree = orbax.load_pytree((folder / _WEIGHTS / part).absolute(), unflatten_dict(parts[part], sep="."))
        except Exception as error:  # Orbax and TensorStore raise almost anything on a damaged store
            raise CheckpointError(
                f"{folder / _WEIGHTS / part}: cannot be loaded ({_reason(error)}); convert again"
            ) from error
        return cast(dict[str, jax.Array], flatten_dict(tree, sep="."))

    # several processes read in step: Orbax has them wait for each other
    readers = _READERS if jax.process_count() == 1 else 1
    with _quiet_orbax() as orbax, ThreadPoolExecutor(readers) as pool:
        return {path: array for part in pool.map(read, sorted(parts)) for path, array in part.items()}


def _reason(error: BaseException) -> str:
    """The beginning of a message and its end, where TensorStore names the operating system's error."""
    text = " ".join(str(error).split())
    return text if len(text) < 200 else f"{text[:80]} … {text[-110:]}"


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write `manifest.json`: the facts given, versions, and size and SHA-256 of every other file."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    versions = {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")}
    payload = {"format": FORMAT, **facts, "versions": versions, "files": files}
    (folder / MANIFEST).write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Read the manifest and, if asked, compare every file with its size and checksum.

    Raises:
        CheckpointError: the manifest is damaged or of another format, or a file is missing or changed.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CheckpointError(f"{path}: is damaged; convert the model again") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}; convert again")
    for name, (size, digest) in files.items() if verify else ():
        file, parts = folder / name, Path(name).parts
        if Path(name).is_absolute() or ".." in parts or any(len(part.encode()) > LONGEST_NAME for part in parts):
            raise CheckpointError(f"{path}: names a file outside the folder ({name!r}); convert the model again")
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing; convert the model again")
        if file.stat().st_size != size or _sha256(file) != digest:
            raise CheckpointError(f"{file}: is not as converted (checksum differs); convert the model again")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
        return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Make every file durable before the folder is renamed into place, where the system lets a reader do that."""
    if os.name != "posix":
        return
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _quiet_orbax() -> Iterator[Any]:
    """Orbax, without its log lines and deprecation warnings: the user's terminal is for the user."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orbax.checkpoint.experimental.v1 as orbax

        yield orbax
