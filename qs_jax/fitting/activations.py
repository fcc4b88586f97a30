"""What a block's kernels see on calibration text: one pass over it, a batch at a time, sums kept and inputs dropped."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qs_jax.models.base import Block, CausalLM, Hidden
from qs_jax.models.layers import Linear

BATCH = 4
"""Windows that run together."""


class _Recorder(nnx.Module):
    """A projection that also tells what it was given."""

    def __init__(self, linear: Linear, tell: Callable[[Array], None]):
        self.linear = linear
        self.tell = tell

    def __call__(
        self, x: Float[Array, "*rows inputs"], dtype: DTypeLike | None = None
    ) -> Float[Array, "*rows outputs"]:
        self.tell(x)
        return self.linear(x, dtype)


def kernels_of(block: Block) -> dict[str, Any]:
    """The kernels of a block's projections, by the projection's name."""
    return {name: child.kernel.get_value() for name, child in vars(block).items() if isinstance(child, Linear)}


def with_kernels(block: Block, kernels: Mapping[str, Any]) -> Block:
    """A copy of the block with other kernels, dense or nested."""
    graph, state = nnx.split(block)
    copy = nnx.merge(graph, state)
    for name, kernel in kernels.items():
        getattr(copy, name).kernel = nnx.Param(kernel)
    return copy


def run(block: Block, hidden_states: Hidden) -> Hidden:
    """What leaves the block, every window from its first position."""
    positions = jnp.broadcast_to(jnp.arange(hidden_states.shape[1]), hidden_states.shape[:2])
    return block.run(hidden_states, positions, ()).hidden_states


_run = jax.jit(run)


def run_all(block: Block, hidden_states: Hidden) -> Hidden:
    """The same for any number of windows."""
    return jnp.concatenate([_run(block, batch) for batch in batches(hidden_states)])


@jax.jit
def embedded(model: CausalLM, tokens: Int[Array, "windows tokens"]) -> Hidden:
    """What enters the first block, every window from its first position."""
    return model.embed(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape))


def batches(hidden_states: Hidden) -> Iterator[Hidden]:
    """The windows, a few at a time."""
    for start in range(0, len(hidden_states), BATCH):
        yield hidden_states[start : start + BATCH]


def hessians(block: Block, hidden_states: Hidden) -> dict[str, Float[Array, "inputs inputs"]]:
    """For every projection, the mean over tokens of x xᵀ of its inputs x. Projections that share inputs share it."""
    total: dict[str, Array] = {}
    for batch in batches(hidden_states):
        new = _outer_products(block, batch)
        total = {name: total[name] + new[name] for name in new} if total else new
    shared = {name: sum_ / (hidden_states.shape[0] * hidden_states.shape[1]) for name, sum_ in total.items()}
    return {name: shared[first] for name, first in _sources(block, hidden_states[:1]).items()}


def _record(block: Block, hidden_states: Hidden) -> dict[str, Array]:
    seen: dict[str, Array] = {}
    copy = with_kernels(block, {})
    for name in kernels_of(copy):
        setattr(copy, name, _Recorder(getattr(copy, name), lambda x, name=name: seen.update({name: x})))
    run(copy, hidden_states)
    return seen


def _sources(block: Block, hidden_states: Hidden) -> dict[str, str]:
    """For every projection, the first one that has the very same input."""
    first: dict[str, str] = {}

    def trace(block: Block, hidden_states: Hidden) -> Array:
        seen = _record(block, hidden_states)
        names = list(seen)
        first.update({n: next(m for m in names if seen[m] is seen[n]) for n in names})
        return hidden_states

    jax.eval_shape(trace, block, hidden_states)
    return first


@jax.jit
def _outer_products(block: Block, hidden_states: Hidden) -> dict[str, Float[Array, "inputs inputs"]]:
    products: dict[str, Array] = {}
    done: list[Array] = []
    for name, x in _record(block, hidden_states).items():
        if not any(x is other for other in done):
            done.append(x)
            rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            products[name] = rows.T @ rows
    return products
