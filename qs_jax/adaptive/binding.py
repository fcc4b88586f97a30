"""A policy bound to a model: one pytree of its mechanisms, and refusal of what the model has no means for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, runtime_checkable

import jax

from qs_jax.adaptive.fusion import BoundFusion
from qs_jax.adaptive.halting import BoundHalting
from qs_jax.adaptive.kv_rules import KV_RULES, KvRule, Means
from qs_jax.adaptive.policy import Policy
from qs_jax.adaptive.precision import BoundPrecision
from qs_jax.adaptive.protection import Protection
from qs_jax.config import ModelConfig
from qs_jax.errors import PolicyError
from qs_jax.pytree import STATIC

Span = tuple[int, int]
"""Layers from the first number to below the second, which run or rest together."""


@runtime_checkable
class Mechanism(Protocol):
    """What binding, engine and ledger know of every mechanism; how it decides is between it and the engine."""

    @property
    def layers(self) -> tuple[int, ...]:
        """After how many layers it decides."""
        ...

    @property
    def probes(self) -> bool:
        """Whether it needs the entropy of intermediate logits there."""
        ...

    @property
    def remembers(self) -> bool:
        """Whether it needs the entropy of the previous step's output."""
        ...

    def flops(self, hidden_size: int) -> int:
        """Of one decision about one token, the probe apart."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundPolicy:
    """A policy that fits a model: the mechanisms that are on, None for those that are off.

    A pytree. What decides which programs are compiled is static, thresholds are its leaves: policies that differ in
    thresholds alone share every program.
    """

    prompt_halting: BoundHalting | None
    decode_halting: BoundHalting | None
    fusion: BoundFusion | None
    precision: BoundPrecision | None
    protection: Protection
    kv_rule: KvRule = field(metadata=STATIC)
    shortlist: int = field(metadata=STATIC)
    num_layers: int = field(metadata=STATIC)

    @property
    def on_prompt(self) -> tuple[Mechanism, ...]:
        """What decides about prompt tokens."""
        return tuple(part for part in (self.prompt_halting, self.fusion) if part is not None)

    @property
    def on_generated(self) -> tuple[Mechanism, ...]:
        """What decides about generated tokens."""
        return tuple(part for part in (self.decode_halting, self.precision) if part is not None)

    @property
    def is_off(self) -> bool:
        """Whether this is the dense model."""
        return not self.on_prompt and not self.on_generated

    @property
    def stages(self) -> tuple[Span, ...]:
        """Prefill's spans of layers, between which tokens may halt or fuse, and those that go on are gathered."""
        return _spans(self.on_prompt, self.num_layers)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Decode's spans of layers, all of which but the first rest when no row needs them."""
        return _spans(self.on_generated, self.num_layers)

    def demotes(self, layer: int) -> bool:
        """Whether halted tokens go on through this layer at fewer bits than others."""
        pinned = self.precision is not None and layer in self.precision.pinned
        return self.kv_rule.resting_bits is not None and not pinned

    @property
    def biased(self) -> bool:
        """Whether slots of the cache weigh differently in attention."""
        return self.fusion is not None and self.fusion.size_bias

    @property
    def adapts_bits(self) -> bool:
        """Whether rows may read weights at different precisions while decoding."""
        ladder = self.decode_halting is not None and self.kv_rule.resting_bits is not None
        return self.precision is not None or ladder

    @property
    def remembers(self) -> bool:
        """Whether a decode step must keep the entropy of its output for the next one."""
        return any(part.remembers for part in self.on_generated)


def bind(policy: Policy, config: ModelConfig, has: Means = Means(), *, special_ids: Sequence[int] = ()) -> BoundPolicy:
    """Fit a policy to a model.

    Args:
        policy: what to fit.
        config: the model's configuration.
        has: what the model has. Without Matryoshka codes `precision` is left out, since there is nothing to read at
            fewer bits.
        special_ids: ids of the model's special tokens.

    Raises:
        PolicyError: layers beyond the model's depth, a number of thresholds that is not the number of layers,
            or a K/V rule or a protection that needs what the model lacks.
    """
    depth, prompt, decode = config.num_hidden_layers, policy.prompt_halting, policy.decode_halting
    rule = KV_RULES[policy.kv_rule](policy)
    lacking = rule.lacks(has)
    if lacking and (prompt or decode):
        raise PolicyError(lacking)
    if policy.protect_rare is not None and has.rarity is None and policy.mechanisms:
        raise PolicyError(
            "protect_rare needs a direct lens, which knows how rare tokens are; fit one: qs-jax lens --direct"
        )
    halting = BoundHalting.bind(prompt, "prompt_halting", depth) if prompt else None
    if prompt and prompt.layers is None and halting and rule.leaves_own and halting.layers[0] >= depth - 1:
        halting = None  # of the last layer prompt tokens leave keys and values and no more, halted or not
    return BoundPolicy(
        prompt_halting=halting,
        decode_halting=BoundHalting.bind(decode, "decode_halting", depth) if decode else None,
        fusion=BoundFusion.bind(policy.fusion, depth) if policy.fusion else None,
        precision=BoundPrecision.bind(policy.precision, depth) if policy.precision and has.planes else None,
        protection=Protection.bind(policy, special_ids, has.rarity),
        kv_rule=rule,
        shortlist=min(policy.probe.shortlist, config.vocab_size),
        num_layers=depth,
    )


def dense(config: ModelConfig) -> BoundPolicy:
    """The policy that is off."""
    return bind(Policy.off(), config)


def _spans(parts: Iterable[Mechanism], depth: int) -> tuple[Span, ...]:
    """Cut where one of them decides."""
    return tuple(pairwise([0, *sorted({layer for part in parts for layer in part.layers}), depth]))
