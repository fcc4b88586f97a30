"""Adaptive Matryoshka quantization, bound to a model: at how many bits a generated token reads the weights."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.policy import Precision, SignalName
from qs_jax.adaptive.signals import SIGNALS, Evidence
from qs_jax.choices import BITS, FULL
from qs_jax.errors import PolicyError
from qs_jax.pytree import STATIC


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundPrecision:
    """The precision ladder. Layers `layer` … are read at the chosen bits, all others and `pinned` ones at 8.

    `two_below` and `four_below` are traced: another value compiles nothing.
    """

    two_below: Float[Array, ""]
    four_below: Float[Array, ""]
    signal: SignalName = field(metadata=STATIC)
    layer: int = field(metadata=STATIC)
    pinned: tuple[int, ...] = field(metadata=STATIC)

    @classmethod
    def bind(cls, precision: Precision, depth: int) -> "BoundPrecision":
        """Fit it to a model of so many layers.

        Raises:
            PolicyError: layers beyond the model's depth, or a probe before the first layer.
        """
        layer = depth // 2 if precision.layer is None else precision.layer
        if layer >= depth or any(not -depth <= pinned < depth for pinned in precision.pinned):
            raise PolicyError(f"precision names layers beyond the model's {depth}")
        if SIGNALS[precision.signal].probes and layer == 0:
            raise PolicyError("precision.layer is 0, but the entropy of intermediate logits needs at least one layer")
        return cls(
            two_below=jnp.float32(precision.two_below),
            four_below=jnp.float32(precision.four_below),
            signal=precision.signal,
            layer=layer,
            pinned=tuple(sorted(pinned % depth for pinned in precision.pinned)),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """After how many layers bits are chosen: before the first, unless the signal needs a state to probe."""
        return (self.layer,) if self.probes else ()

    @property
    def probes(self) -> bool:
        """Whether it needs the entropy of intermediate logits."""
        return SIGNALS[self.signal].probes

    @property
    def remembers(self) -> bool:
        """Whether it needs the entropy of the previous step's output."""
        return SIGNALS[self.signal].remembers

    def adapts(self, layer: int) -> bool:
        """Whether a layer is read at the chosen bits."""
        return layer >= self.layer and layer not in self.pinned

    def decide(self, seen: Evidence, exempt: Bool[Array, " batch"]) -> Int[Array, " batch"]:
        """Bits of each token; 8 of those that are exempt."""
        bits = choose_bits(seen.read(self.signal), self.two_below, self.four_below)
        return jnp.where(exempt, FULL, bits)

    def flops(self, hidden_size: int) -> int:
        """Of one token's decision, the probe apart."""
        return SIGNALS[self.signal].flops_per_channel * hidden_size


def choose_bits(
    value: Float[Array, " batch"], two_below: Float[Array, ""], four_below: Float[Array, ""]
) -> Int[Array, " batch"]:
    """2 bits where the signal is below the first threshold, else 4 below the second, else 8."""
    return jnp.where(value < two_below, 2, jnp.where(value < four_below, 4, FULL)).astype(jnp.int32)


def precisions_in_use(bits: Int[Array, " batch"], active: Bool[Array, " batch"]) -> Bool[Array, " precisions"]:
    """Which of BITS some active row reads: what a pass over the weights costs."""
    return jnp.stack([((bits == choice) & active).any() for choice in BITS])
