"""What deeper layers see of a halted token: one class per K/V rule, which engine and ledger ask.

A token that has halted *rests*: it runs no further layer, but deeper layers may still want keys and values of it. A
rule says what it leaves there, whether its state is carried on meanwhile, and what that costs. A new rule is a class
here, its line in `KV_RULES`, and its name in `qs_jax.adaptive.policy`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.policy import KvRuleName, Policy
from qs_jax.kernels import has_planes
from qs_jax.models import alike
from qs_jax.models.base import Block, CausalLM, Heads, Hidden, Positions

Kept = Float[Array, "batch tokens kept"]
"""What a rule keeps of resting tokens: their states, or something smaller."""


@dataclass(frozen=True, eq=False)
class Means:
    """What a model has that a policy may need: Matryoshka codes, an affine lens, a direct one and for which stops, and
    how rare each token of the vocabulary is, in nats."""

    planes: bool = False
    lens: bool = False
    direct_stops: tuple[int, ...] = ()
    rarity: Float[Array | np.ndarray, " vocabulary"] | None = None

    @classmethod
    def of(cls, model: CausalLM) -> "Means":
        rarity = None if model.rarity is None else model.rarity.get_value()
        return cls(has_planes(model), model.shortcuts is not None, model.direct_stops, rarity)


class KvRule:
    """A rule, and what one does that is not said otherwise: it leaves zeros and costs nothing.

    Rules are static parts of compiled programs: frozen, hashed, without arrays.

    Attributes:
        keeps_slots: whether a resting token takes a slot of the cache in deeper layers.
        keeps_running: whether halted tokens go on through all layers after all, at other bits.
        leaves_own: whether a halted token leaves in the next layer what it would have left there anyway.
    """

    keeps_slots: bool = True
    keeps_running: bool = False
    leaves_own: bool = False

    def lacks(self, has: Means) -> str | None:
        """What of the model's it needs and misses, with advice; None where nothing is missing."""
        return None

    def looks_back(self, model: CausalLM) -> tuple[int, ...]:
        """After how many layers states are set aside for the time when their token rests; rising."""
        return ()

    def settle(self, model: CausalLM, layers_run: int, hidden_states: Hidden, aside: tuple[Hidden, ...]) -> Kept:
        """What is kept of tokens that enter a stage at rest, after so many layers, given what was set `aside`."""
        return hidden_states

    def kv(
        self, model: CausalLM, layer: int, block: Block, hidden_states: Kept, positions: Positions
    ) -> tuple[Heads, Heads]:
        """Keys and values that resting tokens leave in a layer: this one, counted from 0, at the bits to be read."""
        config = block.config
        shape = (*hidden_states.shape[:2], config.num_key_value_heads, config.head_dim)
        empty = jnp.zeros(shape, hidden_states.dtype)
        return empty, empty

    def blank(self, k: Heads, v: Heads, resting: Bool[Array, "batch tokens"]) -> tuple[Heads, Heads]:
        """The same where resting tokens ran along with others, and `k` and `v` were made of their states as well."""
        return k, v

    def carry(self, model: CausalLM, layer: int, hidden_states: Hidden) -> Hidden:
        """The states of resting tokens after a layer (counted from 0)."""
        return hidden_states

    def bits(self, bits: Int[Array, " batch"], halted: Bool[Array, " batch"]) -> Int[Array, " batch"]:
        """At how many bits rows read, given what the precision ladder says."""
        return bits if self.resting_bits is None else jnp.where(halted, jnp.minimum(bits, self.resting_bits), bits)

    @property
    def resting_bits(self) -> int | None:
        """The most bits that halted tokens read, where they read fewer than others."""
        return None

    def settle_flops(self, costs: Costs, layers_run: int) -> int:
        """Of `settle`, per token."""
        return 0

    def settle_bytes(self, costs: Costs, layers_run: int) -> int:
        """Weights that `settle` reads."""
        return 0

    def kv_flops(self, costs: Costs, layer: int) -> int:
        """Of `kv`, per token."""
        return 0

    def kv_bytes(self, costs: Costs, layer: int, bits: int) -> int:
        """Weights of the layer that `kv` reads; a pass in which others run reads them anyway."""
        return 0

    def kv_bytes_beside(self, costs: Costs) -> int:
        """Weights beside the model's own that `kv` reads per layer."""
        return 0

    def carry_flops(self, costs: Costs) -> int:
        """Of `carry`, per token and layer."""
        return 0

    def carry_bytes(self, costs: Costs) -> int:
        """Weights that `carry` reads per layer."""
        return 0


@dataclass(frozen=True)
class Zero(KvRule):
    """A key and a value of zeros: the paper, literally. A key of zeros still draws attention."""

    def blank(self, k: Heads, v: Heads, resting: Bool[Array, "batch tokens"]) -> tuple[Heads, Heads]:
        return jnp.where(resting[..., None, None], 0, k), jnp.where(resting[..., None, None], 0, v)


@dataclass(frozen=True)
class Drop(KvRule):
    """Nothing: the token takes no slot in deeper layers."""

    keeps_slots = False


@dataclass(frozen=True)
class Frozen(KvRule):
    """Keys and values projected from the token's last state."""

    leaves_own = True

    def kv(
        self, model: CausalLM, layer: int, block: Block, hidden_states: Hidden, positions: Positions
    ) -> tuple[Heads, Heads]:
        return alike.kv(block, hidden_states, positions)

    def kv_flops(self, costs: Costs, layer: int) -> int:
        return costs.layers[layer].kv_flops

    def kv_bytes(self, costs: Costs, layer: int, bits: int) -> int:
        return costs.layers[layer].kv_bytes[bits]


@dataclass(frozen=True)
class Affine(Frozen):
    """Keys and values projected from a state that the model's lens (`qs_jax.lens`) carries on through every layer."""

    def lacks(self, has: Means) -> str | None:
        return None if has.lens else "kv_rule affine needs a lens; fit one with qs-jax lens"

    def carry(self, model: CausalLM, layer: int, hidden_states: Hidden) -> Hidden:
        return model.shortcut(layer, hidden_states)

    def carry_flops(self, costs: Costs) -> int:
        return costs.shortcut_flops

    def carry_bytes(self, costs: Costs) -> int:
        return costs.shortcut_bytes


@dataclass(frozen=True)
class Direct(KvRule):
    """Keys and values that the model's direct lens makes for every layer the token skips, of a few numbers kept of it.

    Prompt tokens alone: there is no state in the end that a next token could be chosen from.
    """

    stop: int

    def lacks(self, has: Means) -> str | None:
        if self.stop in has.direct_stops:
            return None
        there = f"; it has one for {', '.join(map(str, has.direct_stops))}" if has.direct_stops else ""
        return (
            f"kv_rule direct needs a direct lens for a stop after {self.stop} layers{there}; "
            f"fit one with qs-jax lens --direct {self.stop}"
        )

    def looks_back(self, model: CausalLM) -> tuple[int, ...]:
        return model.direct_from(self.stop).inputs[:-1]

    def settle(self, model: CausalLM, layers_run: int, hidden_states: Hidden, aside: tuple[Hidden, ...]) -> Kept:
        if layers_run != self.stop:
            return hidden_states
        return model.direct_from(self.stop).latent((*aside, hidden_states))

    def kv(
        self, model: CausalLM, layer: int, block: Block, hidden_states: Kept, positions: Positions
    ) -> tuple[Heads, Heads]:
        k, v = jnp.split(model.direct_from(self.stop).features(layer, hidden_states), 2, axis=-1)
        return block.placed(k, v, positions)

    def settle_flops(self, costs: Costs, layers_run: int) -> int:
        return costs.direct[self.stop].settle_flops if layers_run == self.stop else 0

    def settle_bytes(self, costs: Costs, layers_run: int) -> int:
        return costs.direct[self.stop].settle_bytes if layers_run == self.stop else 0

    def kv_flops(self, costs: Costs, layer: int) -> int:
        return costs.direct[self.stop].kv_flops

    def kv_bytes_beside(self, costs: Costs) -> int:
        return costs.direct[self.stop].kv_bytes


@dataclass(frozen=True)
class Shallow(Frozen):
    """The token goes on through its remaining layers at fewer bits of the same weights: halting becomes a rung of the
    precision ladder, not a stop. Of a prompt's last layer it leaves keys and values alone, as every token does."""

    at_most: int
    leaves_own = False

    keeps_running = True

    def lacks(self, has: Means) -> str | None:
        return None if has.planes else "kv_rule shallow needs Matryoshka weights; convert with --quantize matryoshka"

    @property
    def resting_bits(self) -> int | None:
        return self.at_most


def _direct(policy: Policy) -> KvRule:
    """Where nobody stops nobody rests, and no rule is asked for anything."""
    halting = policy.prompt_halting
    return Direct(halting.layers[0]) if halting and halting.layers else Zero()


KV_RULES: dict[KvRuleName, Callable[[Policy], KvRule]] = {
    "zero": lambda policy: Zero(),
    "drop": lambda policy: Drop(),
    "frozen": lambda policy: Frozen(),
    "affine": lambda policy: Affine(),
    "direct": _direct,
    "shallow": lambda policy: Shallow(policy.shallow_bits),
}
"""Every rule, made from what a policy says of it."""
