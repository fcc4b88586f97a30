"""What the parts of a model cost to run, from the shapes of its weights.

One multiply-add is two FLOPs; norms, activations and softmax are left out (under 2 % on real shapes; a test holds
the count against XLA's own cost analysis).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from flax import nnx

from qs_jax.choices import BITS, FULL
from qs_jax.kernels import has_planes, plane_bytes, weights
from qs_jax.models.base import Block, CausalLM

ENTROPY_FLOPS = 6
"""Per vocabulary entry: shift, exponential, two products and sums."""


@dataclass(frozen=True)
class LayerCosts:
    """One block: FLOPs per token and bytes per pass, whole and for keys and values alone; bytes by precision."""

    flops: int
    kv_flops: int
    bytes: Mapping[int, int]
    kv_bytes: Mapping[int, int]

    @classmethod
    def of(cls, block: Block) -> "LayerCosts":
        parts = (block.k, block.v)
        return cls(
            flops=_flops(block),
            kv_flops=sum(map(_flops, parts)),
            bytes={bits: plane_bytes(block, bits) for bits in BITS},
            kv_bytes={bits: sum(plane_bytes(part, bits) for part in parts) for bits in BITS},
        )


@dataclass(frozen=True)
class Costs:
    """Constants of a model. `shortcut_…` are of the lens's stand-in for one layer; 0 without a lens."""

    layers: tuple[LayerCosts, ...]
    attention_flops_per_slot: int
    hidden_size: int
    vocab_size: int
    head_flops: int
    head_bytes: int
    shortcut_flops: int
    shortcut_bytes: int
    slot_bytes: int
    weight_bits: int
    planes: bool

    @classmethod
    def of(cls, model: CausalLM) -> "Costs":
        """Those of a model; walking through its modules takes longer than a decode step, so they are kept with it."""
        if model not in _COSTS:
            _COSTS[model] = cls._counted(model)
        return _COSTS[model]

    @classmethod
    def _counted(cls, model: CausalLM) -> "Costs":
        config, head = model.config, model.head_kernel
        itemsize = model.embedding.table.dtype.itemsize
        return cls(
            layers=tuple(LayerCosts.of(block) for block in model.blocks),
            attention_flops_per_slot=4 * config.num_attention_heads * config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            head_flops=2 * head.size,
            head_bytes=head.nbytes,
            shortcut_flops=_flops(model.shortcuts[0]) if model.shortcuts else 0,
            shortcut_bytes=plane_bytes(model.shortcuts[0], FULL) if model.shortcuts else 0,
            slot_bytes=2 * config.num_key_value_heads * config.head_dim * itemsize,
            weight_bits=8 * itemsize,
            planes=has_planes(model),
        )

    def step_bytes(self, bits: int = FULL) -> int:
        """Bytes of weights that a decode step through all layers reads at one precision."""
        return sum(layer.bytes[bits] for layer in self.layers) + self.head_bytes

    def probe_flops(self, shortlist: int) -> int:
        """The entropy of one token's intermediate logits."""
        return (2 * self.hidden_size + ENTROPY_FLOPS) * (shortlist or self.vocab_size)

    def probe_bytes(self, shortlist: int) -> int:
        """What one pass of the probe reads of the head."""
        return self.head_bytes * (shortlist or self.vocab_size) // self.vocab_size


_COSTS: WeakKeyDictionary[CausalLM, Costs] = WeakKeyDictionary()


def _flops(module: nnx.Module) -> int:
    """FLOPs per token of all products in a module."""
    return sum(2 * kernel.size for kernel in weights(module) if kernel.ndim == 2)
