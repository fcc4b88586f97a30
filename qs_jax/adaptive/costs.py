"""What the parts of a model cost to run, from the shapes of its weights.

One multiply-add is two FLOPs; norms, activations and softmax are left out (under 2 % on real shapes; a test holds
the count against XLA's own cost analysis).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from flax import nnx

from qs_jax.choices import BITS
from qs_jax.kernels import most_bits, plane_bytes, weights
from qs_jax.models.base import Block, CausalLM
from qs_jax.models.layers import DirectKv

ENTROPY_FLOPS = 6
"""Per vocabulary entry: shift, exponential, two products and sums."""


@dataclass(frozen=True)
class LayerCosts:
    """One block: FLOPs per token and bytes per pass, whole and for keys and values alone; bytes by precision: each of
    BITS, and `Costs.bits`."""

    flops: int
    kv_flops: int
    bytes: Mapping[int, int]
    kv_bytes: Mapping[int, int]

    @classmethod
    def of(cls, block: Block, most: int) -> "LayerCosts":
        """`most` is the bits of weights that are read as they stand."""
        parts, asked = (block.k, block.v), _asked(most)
        return cls(
            flops=_flops(block),
            kv_flops=sum(map(_flops, parts)),
            bytes={bits: plane_bytes(block, at) for bits, at in asked.items()},
            kv_bytes={bits: sum(plane_bytes(part, at) for part in parts) for bits, at in asked.items()},
        )


@dataclass(frozen=True)
class DirectCosts:
    """Of the direct lens for one stop: what it keeps of a token, and keys and values of it in one layer."""

    settle_flops: int
    settle_bytes: int
    kv_flops: int
    kv_bytes: int

    @classmethod
    def of(cls, direct: DirectKv) -> "DirectCosts":
        down, up = direct.down.get_value(), direct.up[0].get_value()
        return cls(2 * down.size, down.nbytes, 2 * up.size, up.nbytes)


@dataclass(frozen=True)
class Costs:
    """Constants of a model. `shortcut_…` are of the lens's stand-in for one layer; 0 without a lens. `direct` are those
    of the direct lens, by stop.

    `bits` are those of a weight where nobody asks for fewer: of dense weights where there are any beside codes.
    """

    layers: tuple[LayerCosts, ...]
    attention_flops_per_slot: int
    hidden_size: int
    vocab_size: int
    head_flops: int
    head_bytes: Mapping[int, int]
    shortcut_flops: int
    shortcut_bytes: int
    direct: Mapping[int, "DirectCosts"]
    slot_bytes: int
    bits: int

    @classmethod
    def of(cls, model: CausalLM) -> "Costs":
        """Those of a model; walking through its modules takes longer than a decode step, so they are kept with it."""
        if model not in _COSTS:
            _COSTS[model] = cls._counted(model)
        return _COSTS[model]

    @classmethod
    def _counted(cls, model: CausalLM) -> "Costs":
        config, head, most = model.config, model.head_kernel, most_bits(model)
        itemsize = model.embedding.table.dtype.itemsize
        return cls(
            layers=tuple(LayerCosts.of(block, most) for block in model.blocks),
            attention_flops_per_slot=4 * config.num_attention_heads * config.head_dim,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            head_flops=2 * head.size,
            head_bytes={bits: plane_bytes(head, at) for bits, at in _asked(most).items()},
            shortcut_flops=_flops(model.shortcuts[0]) if model.shortcuts else 0,
            shortcut_bytes=plane_bytes(model.shortcuts[0], None) if model.shortcuts else 0,
            direct={part.stop: DirectCosts.of(part) for part in model.direct or ()},
            slot_bytes=2 * config.num_key_value_heads * config.head_dim * itemsize,
            bits=most,
        )

    def step_bytes(self, bits: int | None = None) -> int:
        """Bytes of weights that a decode step through all layers reads at one precision, that of the model if none is
        given."""
        at = self.bits if bits is None else bits
        return sum(layer.bytes[at] for layer in self.layers) + self.head_bytes[at]

    def probe_flops(self, shortlist: int) -> int:
        """The entropy of one token's intermediate logits."""
        return (2 * self.hidden_size + ENTROPY_FLOPS) * (shortlist or self.vocab_size)

    def probe_bytes(self, shortlist: int, bits: int) -> int:
        """What one pass of the probe reads of the head."""
        return self.head_bytes[bits] * (shortlist or self.vocab_size) // self.vocab_size


_COSTS: WeakKeyDictionary[CausalLM, Costs] = WeakKeyDictionary()


def _asked(most: int) -> dict[int, int | None]:
    """By bits, what to ask of weights; None for weights as they stand."""
    return {most: None, **{bits: bits for bits in BITS}}


def _flops(module: nnx.Module) -> int:
    """FLOPs per token of all products in a module."""
    return sum(2 * kernel.size for kernel in weights(module) if kernel.ndim == 2)
