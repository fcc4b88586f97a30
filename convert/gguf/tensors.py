"""Values of a GGUF's tensors, de-quantised a stretch at a time by the `gguf` package."""

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from jaxtyping import Float

from convert.gguf.header import PLAIN, Header, Tensor

_STRETCH = 1 << 18
"""Values that are de-quantised at once; a multiple of every type's block."""


def tensor_values(header: Header, tensor: Tensor) -> Float[np.ndarray, "..."]:
    """A tensor in the type that it is stored in, or blocks as float32; a copy, which no change of the file reaches."""
    if (plain := _plain(tensor)) is not None:
        return np.frombuffer(_bytes(header, tensor), plain).reshape(tensor.shape).copy()
    values = np.empty(_number(tensor), np.float32)
    for start in range(0, len(values), _STRETCH):
        values[start : start + _STRETCH] = _stretch(header, tensor, start)
    return values.reshape(tensor.shape)


def same_values(one: Header, first: Tensor, other: Header, second: Tensor) -> bool:
    """Whether two tensors hold the same values; a stretch of each is in memory at a time."""
    if first.shape != second.shape:
        return False
    if first.kind == second.kind and np.array_equal(_bytes(one, first), _bytes(other, second)):
        return True
    return all(
        np.array_equal(_stretch(one, first, start), _stretch(other, second, start))
        for start in range(0, _number(first), _STRETCH)
    )


def _stretch(header: Header, tensor: Tensor, start: int) -> Float[np.ndarray, " stretch"]:
    stop = min(start + _STRETCH, _number(tensor))
    if (plain := _plain(tensor)) is not None:
        return np.frombuffer(_bytes(header, tensor), plain)[start:stop].astype(np.float32)
    block, size = GGML_QUANT_SIZES[tensor.kind]
    blocks = _bytes(header, tensor)[start // block * size : stop // block * size]
    with np.errstate(all="ignore"):  # damaged scales; what comes of them is refused as no finite number
        return dequantize(blocks[None], tensor.kind)[0]


def _plain(tensor: Tensor) -> np.dtype | None:
    name = tensor.kind.name
    return np.dtype(ml_dtypes.bfloat16) if name == "BF16" else np.dtype(PLAIN[name]) if name in PLAIN else None


def _number(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape))


def _bytes(header: Header, tensor: Tensor) -> np.ndarray:
    return np.frombuffer(header.data, np.uint8, tensor.size, tensor.offset)
