"""Policies worth trying on a model: they differ in thresholds alone, so that the search compiles little.

Thresholds are placed where a given share of the tokens of some text would halt, fuse, or read fewer bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from qs_jax.adaptive.policy import Fusion, Halting, KvRuleName, Policy, Precision, SignalName
from qs_jax.evaluation.observation import Observed

PROMPT_SHARES = (0.25, 0.5, 0.75)
FUSED_SHARES = (0.05, 0.2)
DECODE_SHARES = (0.005, 0.02, 0.1)
BITS_SHARES = (0.25, 0.5, 0.75, 1.0)
SPARED = ((128, True), (64, True), (32, True), (32, False), (16, False))
"""Of a prompt's end, how many tokens run through all layers where the others stop after the same one and leave what the
direct lens makes; and whether rare ones do as well, if it is known which are. From sparing most to sparing least."""


Part = TypeVar("Part", Halting, Fusion)


@dataclass(frozen=True)
class Space:
    """What may be varied: after which layers prompt tokens halt or fuse (none, where that saves nothing), and generated
    ones halt; or where prompt tokens stop whose keys and values come from a direct lens, one layer for all of them but
    those of this rarity, if any are spared."""

    prompt_layers: tuple[int, ...]
    fusion_layers: tuple[int, ...]
    decode_layers: tuple[int, ...]
    signal: SignalName
    kv_rule: KvRuleName
    planes: bool
    direct_stops: tuple[int, ...] = ()
    rare: float | None = None

    @classmethod
    def of(
        cls,
        depth: int,
        *,
        planes: bool,
        signal: SignalName = "relative_drift",
        kv_rule: KvRuleName = "frozen",
        direct_stops: tuple[int, ...] = (),
        rare: float | None = None,
    ) -> "Space":
        """Every layer of a shallow model, every second or third of a deep one, from an eighth of the depth on. Prompt
        tokens stop at least two layers early: of the last one they leave keys and values alone, stopped or not. Beside
        a direct lens nothing fuses: on no model did that save what it cost."""
        step, first = 1 if depth <= 8 else 2 if depth <= 24 else 3, max(1, depth // 8)
        places = {depth - 2, *range(depth - 1 - step, 0, -step)}
        prompt = tuple(sorted(layer for layer in places if layer >= first))
        decode = tuple(sorted({max(1, depth - 1), max(1, depth - 1 - step)}))
        fusion = () if kv_rule == "direct" else prompt[-3:-2] or prompt[:1]
        return cls(prompt, fusion, decode, signal, kv_rule, planes, direct_stops, rare)

    def neutral(self, prefix: int) -> Policy:
        """Every mechanism there and none acting; without a prompt, or layers it could do without, only what concerns
        generated tokens. With a direct lens generated tokens never halt, and prompt tokens in `direct_orders` alone."""
        prompt, fusion = (layers if prefix > 1 else () for layers in (self.prompt_layers, self.fusion_layers))
        halts, decode = self.kv_rule != "direct", self.decode_layers
        return Policy(
            name="neutral",
            prompt_halting=Halting(self.signal, (0.0,) * len(prompt), layers=prompt) if prompt and halts else None,
            decode_halting=Halting(self.signal, (0.0,) * len(decode), layers=decode) if halts else None,
            kv_rule=self.kv_rule,
            fusion=Fusion("cosine", (0.0,) * len(fusion), layers=fusion) if fusion else None,
            precision=Precision("previous_entropy", layer=0) if self.planes else None,
        )


def quantile(values: np.ndarray, share: float) -> float:
    """The threshold below which a share of the values lies; infinity for all of them."""
    return math.inf if share >= 1 or not values.size else float(np.quantile(values, share))


def rare_above(rarity: Float[np.ndarray, " tokens"], share: float) -> float:
    """The rarity, in nats, from which on there is no more than that share of some tokens, each with its own."""
    falling = np.sort(rarity)[::-1]
    least = falling[min(round(share * len(falling)), len(falling) - 1)]
    above = falling[falling > least]
    return float(above[-1] if len(above) else least)


def all_at(halting: Halting | None, layer: int) -> Halting | None:
    """All tokens halt after the same layer."""
    if halting is None or halting.layers is None:
        return None
    return replace(halting, thresholds=tuple(math.inf if n == layer else 0.0 for n in halting.layers))


def uniform_stops(space: Space, prefix: int) -> list[Policy]:
    """All of the prompt stops after a layer, from the last candidate layer down; with a direct lens there are
    `direct_orders` instead."""
    neutral = space.neutral(prefix)
    if neutral.prompt_halting is None:
        return []
    return [
        replace(neutral, prompt_halting=all_at(neutral.prompt_halting, layer))
        for layer in reversed(space.prompt_layers)
    ]


def direct_orders(space: Space, prefix: int) -> list[list[Policy]]:
    """For every stop of the direct lens that saves a layer, from the last one down, an order of policies that save ever
    more: all of the prompt stops but its last and rarest tokens, of which fewer and fewer are spared."""
    neutral, latest = space.neutral(prefix), max(space.prompt_layers, default=0)
    stops = [stop for stop in sorted(space.direct_stops, reverse=True) if stop <= latest]
    ways = dict.fromkeys((last, space.rare if rare else None) for last, rare in SPARED if last < prefix)
    return [[_direct_stop(neutral, stop, *way) for way in ways] for stop in stops if ways]


def _direct_stop(base: Policy, stop: int, last: int, rare: float | None) -> Policy:
    halting = Halting(thresholds=(math.inf,), layers=(stop,))
    return replace(base, prompt_halting=halting, protect_last=last, protect_rare=rare)


def stop_prompt(base: Policy, observed: Observed, shares: dict[int, float]) -> Policy:
    """Prompt tokens halt after the given layers: of those that still run, about that share."""
    halting = base.prompt_halting
    assert halting is not None
    assert halting.layers is not None
    values = observed.prompt[halting.signal]
    thresholds = [quantile(values[n - 1], shares[n]) if n in shares else 0.0 for n in halting.layers]
    return replace(base, prompt_halting=replace(halting, thresholds=tuple(thresholds)))


def stop_decode(base: Policy, observed: Observed, layer: int, share: float) -> Policy:
    """Generated tokens halt after a layer, about that share of them."""
    halting = base.decode_halting
    assert halting is not None
    assert halting.layers is not None
    values = observed.scored[halting.signal][layer - 1]
    thresholds = tuple(quantile(values, share) if n == layer else 0.0 for n in halting.layers)
    return replace(base, decode_halting=replace(halting, thresholds=thresholds))


def fuse_prompt(base: Policy, observed: Observed, share: float) -> Policy:
    """Neighbouring prompt tokens fuse, about that share of pairs."""
    fusion = base.fusion
    assert fusion is not None
    assert fusion.layers is not None
    values = observed.neighbours[fusion.distance]
    thresholds = tuple(quantile(values[layer - 1], share) for layer in fusion.layers)
    return replace(base, fusion=replace(fusion, thresholds=thresholds))


def lower_bits(base: Policy, observed: Observed, share: float) -> Policy:
    """Generated tokens read 4 bits where the model was surest one step earlier, about that share of them."""
    precision = base.precision
    assert precision is not None
    return replace(base, precision=replace(precision, four_below=quantile(observed.entropy, share)))


def neighbours(layers: Sequence[int], stop: int) -> list[dict[int, float]]:
    """Per-token choices around a uniform stop after `stop`: a share stops one candidate layer earlier, and the rest at
    it or one later."""
    place = list(layers).index(stop)
    early = layers[place - 1] if place else None
    late = layers[place + 1] if place + 1 < len(layers) else None
    found: list[dict[int, float]] = []
    if early is not None:
        found += [{early: share, stop: 1.0} for share in PROMPT_SHARES]
    if late is not None:
        found += [{stop: share, late: 1.0} for share in PROMPT_SHARES]
    if early is not None and late is not None:
        found.append({early: 0.5, late: 1.0})
    return found


def joined(base: Policy, parts: Sequence[Policy]) -> Policy:
    """The base with everything that the parts changed."""
    changed = {
        name: getattr(part, name)
        for part in parts
        for name in ("prompt_halting", "decode_halting", "fusion", "precision", "protect_last", "protect_rare")
        if getattr(part, name) != getattr(base, name)
    }
    return replace(base, **changed)


def stripped(policy: Policy, name: str) -> Policy:
    """The same policy without the mechanisms and layers that never act: equal results, less to run."""
    return replace(
        policy,
        name=name,
        prompt_halting=_acting(policy.prompt_halting),
        decode_halting=_acting(policy.decode_halting),
        fusion=_acting(policy.fusion),
        precision=policy.precision if policy.precision and policy.precision.four_below > 0 else None,
    )


def _acting(part: Part | None) -> Part | None:
    if part is None or part.layers is None or not isinstance(part.thresholds, tuple):
        return part
    kept = [(layer, value) for layer, value in zip(part.layers, part.thresholds, strict=True) if value > 0]
    if not kept:
        return None
    return replace(part, layers=tuple(layer for layer, _ in kept), thresholds=tuple(value for _, value in kept))


def part_of_everything(space: Space, observed: Observed, prefix: int) -> Policy:
    """A policy in which all four mechanisms act on a part of the tokens: a quarter of the prompt halts after each of
    the last three candidate layers, 5 % of what is generated before the last layer, one pair in ten fuses, and half of
    the generated tokens are read at 4 bits; halted tokens leave nothing in the cache."""
    base = replace(space.neutral(prefix), kv_rule="drop")
    parts = [stop_decode(base, observed, space.decode_layers[-1], 0.05)]
    if base.prompt_halting:
        parts.append(stop_prompt(base, observed, dict.fromkeys(space.prompt_layers[-3:], 0.25)))
        parts.append(fuse_prompt(base, observed, 0.1))
    if base.precision:
        parts.append(lower_bits(base, observed, 0.5))
    return replace(joined(base, parts), name="part of everything")
