"""A GGUF file's header: metadata, and where each tensor lies (ggml, docs/gguf.md).

Every length, count and offset is compared with the file's size before anything is made of it. The `gguf` package's own
reader does not do that, and takes 2.6 s and 160 MB for a vocabulary of 49,152 tokens; what is taken from the package
is what its types are.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from qs_jax.errors import CheckpointError

Value = str | int | float | bool | list[str] | np.ndarray

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32

_MOST_ENTRIES = 1 << 16
"""Of metadata, and of tensors: what models have, a hundred times over."""
_MOST_ELEMENTS = 1 << 23
"""Of a metadata array; the largest vocabularies have 2^18 tokens."""
_MOST_BYTES = 1 << 20
"""Of a string: chat templates have 2^14."""
_MOST_DIMENSIONS = 4
_LONGEST_NAME = 128
_LARGEST_ALIGNMENT = 1 << 20

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

_LENGTH = struct.Struct("<Q")

PLAIN: Mapping[str, type[np.generic]] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
"""Types whose values lie in the file as they are; all others are blocks."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `shape` as in numpy, the last axis the fastest; `offset` and `size` in bytes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """`data` is the file, mapped; pages of it are read when they are looked at."""

    path: Path
    data: mmap.mmap
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Tensor]


def read_header(path: Path) -> Header:
    """Read everything but the tensors' values.

    Raises:
        CheckpointError: it cannot be read, is no GGUF, or what it says of itself cannot be.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(f"{path}: is no GGUF file; get it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    cursor = _Cursor(path, data, len(_MAGIC))
    version = cursor.number("<I")
    if version not in _VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
            raise CheckpointError(f"{path}: is a big-endian GGUF, which is not read; get the little-endian file")
        raise CheckpointError(f"{path}: is GGUF version {version}, expected 2 or 3; convert the model again")
    tensor_count, entry_count = cursor.count("tensors", _MOST_ENTRIES), cursor.count("metadata", _MOST_ENTRIES)
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key = cursor.text("a metadata key")
        if key in metadata:
            cursor.refuse(f"{key} is there twice")
        metadata[key] = cursor.value(key)
    return Header(path, data, metadata, _tensors(cursor, tensor_count, metadata))


class _Cursor:
    """Reads on from a place in the file, and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap, place: int):
        self.path, self.data, self.place = path, data, place

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}; the file is damaged: get it again")

    def take(self, size: int) -> bytes:
        start, self.place = self.place, self.place + size
        if self.place > len(self.data):
            self.refuse(f"ends at byte {len(self.data)}, in the middle of its header")
        return self.data[start : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, what: str, most: int) -> int:
        found = self.number("<Q")
        if found > most:
            self.refuse(f"says that it has {found} {what}, more than {most}")
        return found

    def text(self, what: str) -> str:
        size = self.count(f"bytes in {what}", _MOST_BYTES)
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")

    def value(self, key: str) -> Value:
        kind = self.number("<I")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text(key)
        if kind != _ARRAY:
            self.refuse(f"{key} has type {kind}, which GGUF has not")
        kind = self.number("<I")
        size = self.count(f"elements in {key}", _MOST_ELEMENTS)
        if kind in _SCALARS:
            form = np.dtype(_SCALARS[kind])
            return np.frombuffer(self.take(size * form.itemsize), form)
        if kind != _STRING:
            self.refuse(f"{key} is an array of type {kind}, expected numbers or strings")
        return self.texts(key, size)

    def texts(self, key: str, number: int) -> list[str]:
        """As `text`, of each of many."""
        data, place, end, found = self.data, self.place, len(self.data), []
        for _ in range(number):
            start = place + _LENGTH.size
            place = start + _LENGTH.unpack_from(data, place)[0] if start <= end else end + 1
            if place > end or place - start > _MOST_BYTES:
                self.refuse(f"{key} does not lie in the file's {end} bytes")
            found.append(data[start:place])
        self.place = place
        try:
            return [text.decode("utf-8") for text in found]
        except UnicodeDecodeError:
            self.refuse(f"{key} is not UTF-8")


def _tensors(cursor: _Cursor, number: int, metadata: Mapping[str, Value]) -> dict[str, Tensor]:
    """Name and place of every tensor; offsets are counted from the first aligned byte after the header."""
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    power = type(alignment) is int and 0 < alignment <= _LARGEST_ALIGNMENT and not alignment & (alignment - 1)
    if not isinstance(alignment, int) or not power:
        cursor.refuse(f"general.alignment is {short(alignment)}, expected a power of two")
    tensors: dict[str, Tensor] = {}
    for _ in range(number):
        name = cursor.text("a tensor's name")
        if name in tensors or not 0 < len(name) <= _LONGEST_NAME:
            cursor.refuse(f"tensor {short(name)} is there twice" if name in tensors else "a tensor's name is too long")
        tensors[name] = _tensor(cursor, name)
    first = -(-cursor.place // alignment) * alignment
    placed = {name: Tensor(t.shape, t.kind, first + t.offset, t.size) for name, t in tensors.items()}
    _refuse_misplaced(cursor, placed, alignment)
    return placed


def _tensor(cursor: _Cursor, name: str) -> Tensor:
    axes = cursor.number("<I")
    if not 0 < axes <= _MOST_DIMENSIONS:
        cursor.refuse(f"tensor {name} has {axes} dimensions, expected 1 to {_MOST_DIMENSIONS}")
    shape = struct.unpack(f"<{axes}Q", cursor.take(8 * axes))[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    if not all(0 < size <= 8 * len(cursor.data) for size in shape):
        cursor.refuse(f"tensor {name} has the shape {shape}, which cannot be")
    kind = _kind(number)
    if kind is None:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has type {number}, which is not read; take the model in another quantisation"
        )
    block, size = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        cursor.refuse(f"tensor {name} has rows of {shape[-1]}, no multiple of {kind.name}'s blocks of {block}")
    return Tensor(shape, kind, offset, prod(shape) // block * size)


@cache
def _kind(number: int) -> GGMLQuantizationType | None:
    """A tensor's type, if its values can be had: not all that have a name can."""
    try:
        kind = GGMLQuantizationType(number)
        _, size = GGML_QUANT_SIZES[kind]
        if kind.name not in PLAIN:
            dequantize(np.zeros((1, size), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return kind


def _refuse_misplaced(cursor: _Cursor, tensors: Mapping[str, Tensor], alignment: int) -> None:
    """No tensor may lie outside the file, on another, or off the file's alignment."""
    for name, tensor in tensors.items():
        if tensor.offset + tensor.size > len(cursor.data):
            cursor.refuse(f"tensor {name} ends at byte {tensor.offset + tensor.size} of {len(cursor.data)}")
        if tensor.offset % alignment:
            cursor.refuse(f"tensor {name} lies at byte {tensor.offset}, no multiple of {alignment}")
    ordered = sorted(tensors.items(), key=lambda entry: entry[1].offset)
    for (one, before), (other, after) in pairwise(ordered):
        if before.offset + before.size > after.offset:
            cursor.refuse(f"tensors {one} and {other} overlap")


def short(value: object) -> str:
    """A value as a message shows it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}…"
