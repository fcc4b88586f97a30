"""The KV cache: per layer and row, compacted slots. A token that writes nothing in a layer takes no slot there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.errors import require
from qs_jax.models.attention import Segment
from qs_jax.sharding import laid_out, mesh_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys (rotary position applied), values, each slot's position, and how many slots each row has filled.

    Slots 0 to length - 1 hold tokens in the order they were written; what lies beyond is never read. `bias`, where
    fused tokens are to weigh as their members did, is added to the attention logits of each slot.
    """

    keys: Float[Array, "batch kv_heads capacity head_dim"]
    values: Float[Array, "batch kv_heads capacity head_dim"]
    positions: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]
    bias: Float[Array, "batch capacity"] | None = None

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def validate(self, *, rising: bool = False) -> None:
        """Check what is promised above, on the host and on concrete arrays: for tests.

        `rising` asks also that positions rise from slot to slot, which holds unless prompt tokens that halted are
        still given to deeper layers: those come after the ones that went on.

        Raises:
            StateError: it names what does not hold.
        """
        own = jax.device_get(self)
        batch, _, capacity, _ = own.keys.shape
        require(own.values.shape == own.keys.shape, f"values are {own.values.shape}, keys {own.keys.shape}")
        require(own.lengths.shape == (batch,), f"lengths are {own.lengths.shape} for {batch} rows")
        for name in ("positions", "bias"):
            part = getattr(own, name)
            require(part is None or part.shape == (batch, capacity), f"{name} do not fit {batch} rows of {capacity}")
        inside = ((own.lengths >= 0) & (own.lengths <= capacity)).all()
        require(bool(inside), f"lengths are {own.lengths.tolist()} of {capacity} slots")
        filled = np.arange(capacity) < own.lengths[:, None]
        for name in ("keys", "values"):
            finite = np.isfinite(getattr(own, name).astype(np.float32)).all(axis=(1, 3))
            require(bool(finite[filled].all()), f"{name} are not finite in a filled slot")
        require(own.bias is None or bool(np.isfinite(own.bias[filled]).all()), "bias is not finite in a filled slot")
        require(bool((own.positions[filled] >= 0).all()), "a filled slot has a negative position")
        steps = np.diff(own.positions, axis=1)[filled[:, 1:]]
        require(not rising or bool((steps > 0).all()), "positions do not rise from slot to slot")


Cache = tuple[LayerCache, ...]


def bucket(length: int, limit: int, *, smallest: int = 64, per_octave: int = 1) -> int:
    """The first of smallest, 2 · smallest, 4 · smallest, … that holds `length`, but no more than `limit`.

    `per_octave` evenly spaced sizes instead of one between each power of two and the next waste less, and compile
    more programs.
    """
    size = smallest
    while size < length:
        size *= 2
    finer = next(
        (n for n in range(size // 2, size, max(1, size // (2 * per_octave))) if n >= max(length, smallest)), size
    )
    return min(finer, limit)


def allocate(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, *, biased: bool = False) -> LayerCache:
    """One layer's empty cache."""
    heads, head_dim = config.num_key_value_heads, config.head_dim
    return LayerCache(
        keys=jnp.zeros((batch, heads, capacity, head_dim), dtype),
        values=jnp.zeros((batch, heads, capacity, head_dim), dtype),
        positions=jnp.zeros((batch, capacity), jnp.int32),
        lengths=jnp.zeros((batch,), jnp.int32),
        bias=jnp.zeros((batch, capacity), jnp.float32) if biased else None,
    )


def segment(layer: LayerCache) -> Segment:
    """What later tokens may look at: every filled slot. Slots hold only the past, so no causal mask is needed."""
    slots = jnp.arange(layer.capacity, dtype=jnp.int32)
    seen = (slots < layer.lengths[:, None])[:, None, :]
    return laid_out(Segment(layer.keys, layer.values, seen, layer.bias), like=layer.keys)


@jax.jit
def append(
    layer: LayerCache,
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int[Array, "batch tokens"],
    writes: Bool[Array, "batch tokens"],
    bias: Float[Array, "batch tokens"] | None = None,
) -> LayerCache:
    """Write tokens into the next free slots; tokens that do not write, or find no slot left, change nothing.

    Tokens without a bias, in a layer that has one, get 0. Traced once for all layers that are alike.
    """
    slots = layer.lengths[:, None] + jnp.cumsum(writes, axis=1, dtype=jnp.int32) - 1
    slots = jnp.where(writes, slots, layer.capacity)
    write, write_heads = _OF_ROWS if mesh_of(layer.keys) is not None else (_with_tokens, _with_slots)
    added = writes.sum(axis=1, dtype=jnp.int32)
    if layer.bias is not None and bias is not None:
        layer = replace(layer, bias=write(layer.bias, slots, bias))
    layer = replace(
        layer,
        keys=write_heads(layer.keys, slots, k),
        values=write_heads(layer.values, slots, v),
        positions=write(layer.positions, slots, positions),
        lengths=jnp.minimum(layer.lengths + added, layer.capacity),
    )
    return laid_out(layer, like=layer.keys)


def _rows_of(slots: Int[Array, "batch tokens"]) -> Int[Array, "batch 1"]:
    return jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]


def _with_tokens(old: Array, slots: Int[Array, "batch tokens"], new: Array) -> Array:
    """What is one number per token."""
    return old.at[_rows_of(slots), slots].set(new, mode="drop")


def _with_slots(
    slotted: Float[Array, "batch kv_heads capacity head_dim"],
    slots: Int[Array, "batch tokens"],
    new: Float[Array, "batch tokens kv_heads head_dim"],
) -> Float[Array, "batch kv_heads capacity head_dim"]:
    """`new` at `slots`, dropped where there is no such slot.

    Narrow floats are written by their bits: XLA's CPU backend scatters them by way of float32, the whole cache there
    and back. For a single token it is faster still to choose between old and new in every slot.
    """
    new, dtype = new.astype(slotted.dtype), slotted.dtype
    if dtype.itemsize != 2:
        return _scattered(slotted, new, slots)
    old_bits, new_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (slotted, new))
    write = partial(_scattered, slots=slots)
    if new.shape[1] == 1:
        bits = jax.lax.platform_dependent(old_bits, new_bits, cpu=partial(_chosen, slots=slots), default=write)
    else:
        bits = write(old_bits, new_bits)
    return jax.lax.bitcast_convert_type(bits, dtype)


def _scattered(slotted: Array, new: Array, slots: Array) -> Array:
    return slotted.at[_rows_of(slots), :, slots].set(new, mode="drop")


def _chosen(slotted: Array, new: Array, slots: Array) -> Array:
    here = jnp.arange(slotted.shape[2], dtype=jnp.int32) == slots
    return jnp.where(here[:, None, :, None], new.swapaxes(1, 2), slotted)


def _with_tokens_of_row(old: Array, slots: Int[Array, " tokens"], new: Array) -> Array:
    return old.at[slots].set(new.astype(old.dtype), mode="drop")


def _with_slots_of_row(old: Array, slots: Int[Array, " tokens"], new: Array) -> Array:
    return old.at[:, slots].set(new.swapaxes(0, 1).astype(old.dtype), mode="drop")


_OF_ROWS = jax.vmap(_with_tokens_of_row), jax.vmap(_with_slots_of_row)
"""On a mesh: functions of one row, so that the partitioner sees that rows stay where they are."""


def grow(cache: Cache, capacities: Sequence[int]) -> Cache:
    """The same slots with room for more, layer by layer."""

    def wider(layer: LayerCache, capacity: int) -> LayerCache:
        extra = capacity - layer.capacity
        return replace(
            layer,
            keys=jnp.pad(layer.keys, ((0, 0), (0, 0), (0, extra), (0, 0))),
            values=jnp.pad(layer.values, ((0, 0), (0, 0), (0, extra), (0, 0))),
            positions=jnp.pad(layer.positions, ((0, 0), (0, extra))),
            bias=None if layer.bias is None else jnp.pad(layer.bias, ((0, 0), (0, extra))),
        )

    return tuple(wider(layer, capacity) for layer, capacity in zip(cache, capacities, strict=True))
