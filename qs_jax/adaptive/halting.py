"""Dynamic token halting, bound to a model: which tokens take no further compute. What follows is the K/V rule's."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qs_jax.adaptive.placement import acting_layers, threshold_table
from qs_jax.adaptive.policy import Halting, SignalName
from qs_jax.adaptive.signals import SIGNALS, Evidence, Value
from qs_jax.pytree import STATIC


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundHalting:
    """When tokens halt. `thresholds` and `entropy_below` (bits) are traced: another value compiles nothing.

    Attributes:
        signal: what must be low.
        gate: which entropy must be low as well, if any.
        layers: after how many layers a token may halt.
        thresholds: for the signal, after 0, 1, … layers; 0 where tokens may not halt.
        entropy_below: for the gate.
    """

    thresholds: Float[Array, " layers_run"]
    entropy_below: Float[Array, ""]
    signal: SignalName = field(metadata=STATIC)
    gate: SignalName | None = field(metadata=STATIC)
    layers: tuple[int, ...] = field(metadata=STATIC)

    @classmethod
    def bind(cls, halting: Halting, name: str, depth: int) -> "BoundHalting":
        """Fit it to a model of so many layers.

        Raises:
            PolicyError: layers or a number of thresholds that do not fit; it calls the policy's part `name`.
        """
        layers = acting_layers(halting, name, depth)
        gated = halting.entropy_below is not None
        return cls(
            thresholds=threshold_table(halting, layers, name, depth),
            entropy_below=jnp.float32(halting.entropy_below if gated else np.inf),
            signal=halting.signal,
            gate=halting.entropy_source if gated else None,
            layers=layers,
        )

    @property
    def reads(self) -> tuple[SignalName, ...]:
        """The signals it looks at."""
        return (self.signal,) if self.gate in (None, self.signal) else (self.signal, self.gate)

    @property
    def probes(self) -> bool:
        """Whether it needs the entropy of intermediate logits."""
        return any(SIGNALS[name].probes for name in self.reads)

    @property
    def remembers(self) -> bool:
        """Whether it needs the entropy of the previous step's output."""
        return any(SIGNALS[name].remembers for name in self.reads)

    def decide(self, seen: Evidence, exempt: Bool[Array, "*tokens"]) -> tuple[Bool[Array, "*tokens"], Value]:
        """Which tokens halt: signal below its threshold, the gate's entropy too, not exempt. Also what they showed.

        A threshold of 0 halts nothing and infinity everything that is not exempt, whatever the signal: no signal is
        negative or infinite.
        """
        value = seen.read(self.signal)
        halts = (value < self.thresholds[seen.layer]) & ~exempt
        if self.gate is not None:
            halts &= seen.read(self.gate) < self.entropy_below
        return halts, value

    def flops(self, hidden_size: int) -> int:
        """Of one token's decision, the probe apart."""
        return SIGNALS[self.signal].flops_per_channel * hidden_size
