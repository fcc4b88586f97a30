"""The layers both architectures are made of. Norms in float32, products in the dtype of the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qs_jax.config import Activation
from qs_jax.kernels import as_kernel

STATE_EPSILON = 1e-6
"""Of states that the direct lens reads."""

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Init(Protocol):
    """Makes the weights that a new module holds."""

    def normal(self, *shape: int, std: float = 0.02) -> Any: ...

    def full(self, value: float, *shape: int) -> Any: ...


@dataclass(frozen=True)
class RandomInit:
    """Weights as at the start of training."""

    dtype: jnp.dtype
    rngs: nnx.Rngs

    def normal(self, *shape: int, std: float = 0.02) -> Array:
        return (std * jax.random.normal(self.rngs.params(), shape, jnp.float32)).astype(self.dtype)

    def full(self, value: float, *shape: int) -> Array:
        return jnp.full(shape, value, self.dtype)


@dataclass(frozen=True)
class AbstractInit:
    """Shapes in place of weights: nothing is computed, nor traced as `nnx.eval_shape` would."""

    dtype: jnp.dtype

    def normal(self, *shape: int, std: float = 0.02) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.dtype)

    def full(self, value: float, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.dtype)


class Linear(nnx.Module):
    """A dense projection; the kernel is stored (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, init: Init, std: float = 0.02):
        self.kernel = nnx.Param(init.normal(outputs, inputs, std=std))
        self.bias = nnx.Param(init.full(0.0, outputs)) if bias else None

    def __call__(
        self, x: Float[Array, "*rows inputs"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*rows outputs"]:
        """Of `dtype`, that of `x` unless given."""
        y = as_kernel(self.kernel.get_value()).matmul(x)
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
        down, up = as_kernel(self.down.get_value()), as_kernel(self.up.get_value())
        return x + up.matmul(down.matmul(x).astype(x.dtype)).astype(x.dtype) + self.bias[...]


class DirectKv(nnx.Module):
    """Keys and values of all layers that a token skips, straight from states that it showed before: these are brought
    together once (`latent`), and every layer reads its own of that (`features`).

    `inputs` says after how many layers the states are taken; the last is where the token stops.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        down: Float[Array, "rank states"],
        up: Sequence[Float[Array, "features rank"]],
        bias: Sequence[Float[Array, " features"]],
    ):
        self.inputs = inputs
        self.down = nnx.Param(down)
        self.up, self.bias = (nnx.List([nnx.Param(part) for part in whole]) for whole in (up, bias))

    @property
    def stop(self) -> int:
        """After how many layers."""
        return self.inputs[-1]

    def latent(self, states: Sequence[Float[Array, "*rows hidden"]]) -> Float[Array, "*rows rank"]:
        """What is kept of a token, from its states after as many layers as `inputs` says."""
        x = jnp.concatenate([normal(state, STATE_EPSILON) for state in states], axis=-1)
        return as_kernel(self.down.get_value()).matmul(x).astype(x.dtype)

    def features(self, layer: int, latent: Float[Array, "*rows rank"]) -> Float[Array, "*rows features"]:
        """Keys, without positions, and after them values, in a layer (counted from 0)."""
        up, bias = self.up[layer - self.stop], self.bias[layer - self.stop]
        return as_kernel(up.get_value()).matmul(latent).astype(latent.dtype) + bias[...]


class Embedding(nnx.Module):
    """A lookup table (entries, features)."""

    def __init__(self, entries: int, features: int, *, init: Init, std: float = 0.02):
        self.table = nnx.Param(init.normal(entries, features, std=std))

    def __call__(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
        return as_kernel(self.table.get_value()).rows(ids)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias (arXiv 1607.06450)."""

    def __init__(self, features: int, *, epsilon: float, init: Init):
        self.scale = nnx.Param(init.full(1.0, features))
        self.bias = nnx.Param(init.full(0.0, features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normal * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with scale (arXiv 1910.07467)."""

    def __init__(self, features: int, *, epsilon: float, init: Init):
        self.scale = nnx.Param(init.full(1.0, features))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows features"]) -> Float[Array, "*rows features"]:
        return normal(x, self.epsilon) * self.scale[...]


def normal(x: Float[Array, "*rows features"], epsilon: float) -> Float[Array, "*rows features"]:
    """Features at a mean square of 1."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
