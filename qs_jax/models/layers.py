"""The layers both architectures are made of. Norms in float32, products in the dtype of the weights."""

import math
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qs_jax.config import Activation
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.matryoshka.linear import nested_product

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

_FEW_ROWS = 64
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Kernel = Float[Array, "outputs inputs"] | NestedKernel
"""Weights of a projection: plain, or quantised and read at a precision of their own."""


def project(
    x: Float[Array, "*rows inputs"], kernel: Kernel, dtype: DTypeLike | None = None
) -> Float[Array, "*rows outputs"]:
    """`x @ kernel.T`, arranged on CPU for how many rows there are (measured in benchmarks/kernel_layout.py).

    Sums are float32 whatever the operands; the result is of `dtype`, that of `x` unless given.
    """
    if isinstance(kernel, NestedKernel):
        y = nested_product(x, kernel)
    else:
        rows = x.reshape(-1, x.shape[-1])
        y = jax.lax.platform_dependent(rows, kernel, cpu=_project_on_cores, default=_project)
        y = y.reshape(*x.shape[:-1], kernel.shape[0])
    return y.astype(x.dtype if dtype is None else dtype)


def _project(x: Float[Array, "rows inputs"], kernel: Float[Array, "outputs inputs"]) -> Float[Array, "rows outputs"]:
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _project_on_cores(
    x: Float[Array, "rows inputs"], kernel: Float[Array, "outputs inputs"]
) -> Float[Array, "rows outputs"]:
    """A handful of rows go through a product batched over one block of outputs per core.

    XLA's CPU backend divides a small product badly among cores; a batch it divides well, and reads the weights up
    to twice as fast. Prefill-sized products are better left whole. One row of a narrower type than float32 goes as two:
    a product of one is not among those the backend has a kernel for.
    """
    outputs, inputs = kernel.shape
    blocks = math.gcd(outputs, 1 << (_CORES.bit_length() - 1))
    rows = x.shape[0]
    if rows == 1 and x.dtype != jnp.float32:
        x = jnp.concatenate([x, x])
    if rows > _FEW_ROWS or blocks == 1:
        return _project(x, kernel)[:rows]
    spread = jnp.broadcast_to(x, (blocks, *x.shape))
    kernel = kernel.reshape(blocks, outputs // blocks, inputs)
    y = jnp.einsum("nri,noi->rno", spread, kernel, preferred_element_type=jnp.float32)
    return y.reshape(x.shape[0], outputs)[:rows]


class Linear(nnx.Module):
    """A dense projection; the kernel is stored (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs, std: float = 0.02):
        self.kernel = nnx.Param(_normal(rngs, (outputs, inputs), std, dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "*rows inputs"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*rows outputs"]:
        """Of `dtype`, that of `x` unless given."""
        y = project(x, self.kernel.get_value(), jnp.float32)
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype if dtype is None else dtype)


class Shortcut(nnx.Module):
    """A stand-in for a whole layer: the state, and an affine map of it of low rank."""

    def __init__(
        self, down: Float[Array, "rank hidden"], up: Float[Array, "hidden rank"], bias: Float[Array, " hidden"]
    ):
        self.down, self.up, self.bias = nnx.Param(down), nnx.Param(up), nnx.Param(bias)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        return x + project(project(x, self.down.get_value()), self.up.get_value()) + self.bias[...]


class Embedding(nnx.Module):
    """A lookup table (entries, features)."""

    def __init__(self, entries: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, std: float = 0.02):
        self.table = nnx.Param(_normal(rngs, (entries, features), std, dtype))

    def __call__(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
        table = self.table.get_value()
        return table.rows(ids) if isinstance(table, NestedKernel) else jnp.take(table, ids, axis=0, mode="clip")


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias (arXiv 1607.06450)."""

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with scale (arXiv 1910.07467)."""

    def __init__(self, features: int, *, epsilon: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return normal.astype(x.dtype) * self.scale[...]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Array:
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
