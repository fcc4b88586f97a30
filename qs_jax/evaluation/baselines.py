"""What a mechanism must beat: the same saving made blindly, and how far an oracle would get."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int

from qs_jax.adaptive.policy import Halting, KvRuleName, Policy
from qs_jax.evaluation import candidates
from qs_jax.evaluation.candidates import Space, all_at
from qs_jax.evaluation.observation import observe
from qs_jax.evaluation.scoring import Scores
from qs_jax.evaluation.windows import Window
from qs_jax.model import Model


def direct_stops(space: Space, prefix: int) -> list[Policy]:
    """For every stop of the direct lens, the one that saves most."""
    saving = [order[-1] for order in candidates.direct_orders(space, prefix)]
    return [
        replace(policy, name=f"prompt stops after {stop}, direct lens")
        for policy in saving
        for stop in (policy.prompt_halting and policy.prompt_halting.layers) or ()
    ]


def uniform_stops(space: Space, prefix: int, *, lens: bool = False) -> list[Policy]:
    """All of the prompt stops after the same layer: with frozen keys and values, and with those of the affine lens."""
    rules: dict[KvRuleName, str] = {"frozen": "", **({"affine": ", lens"} if lens else {})}
    return [
        replace(policy, name=f"prompt stops after {layer}{suffix}")
        for rule, suffix in rules.items()
        for layer, policy in zip(
            reversed(space.prompt_layers),
            candidates.uniform_stops(replace(space, kv_rule=rule), prefix),
            strict=False,  # there are none without a prompt
        )
    ]


def fixed_depths(space: Space, prefix: int) -> list[Policy]:
    """Prompt and generated tokens alike stop after the same layer."""
    neutral = space.neutral(prefix)
    return [
        replace(
            neutral,
            name=f"fixed depth {layer}",
            prompt_halting=all_at(neutral.prompt_halting, layer),
            decode_halting=all_at(neutral.decode_halting, layer),
        )
        for layer in reversed(space.decode_layers)
    ]


def random_halting(policy: Policy, scores: Scores) -> list[Policy]:
    """As many tokens halt after each layer as under the policy, but drawn at random: equal work, no knowledge. Nothing
    where the policy never chooses between tokens."""
    changed: dict[str, Any] = {}
    for name, layers_run in (
        ("prompt_halting", np.concatenate(scores.prompts.layers_run)),
        ("decode_halting", scores.layers_run[:, 1:].reshape(-1)),
    ):
        halting: Halting | None = getattr(policy, name)
        if halting is None or halting.layers is None:
            continue
        given = halting.thresholds if isinstance(halting.thresholds, tuple) else (halting.thresholds,)
        if all(value in (0.0, math.inf) for value in given):
            continue
        shares = tuple(
            math.inf if math.isinf(value) else _share_at(layers_run, layer)
            for layer, value in zip(halting.layers, given * (len(halting.layers) // len(given)), strict=True)
        )
        changed[name] = replace(halting, signal="random", thresholds=shares, entropy_below=None)
    return [replace(policy, name="random halting", **changed)] if changed else []


def _share_at(layers_run: Int[np.ndarray, " tokens"], layer: int) -> float:
    """Of the tokens that ran `layer` layers, the share that stopped there."""
    reached = (layers_run >= layer).sum()
    return float((layers_run == layer).sum() / reached) if reached else 0.0


def random_bits(subject: Policy, scores: Mapping[str, Scores]) -> list[Policy]:
    """As many bits as the subject's precision reads when it acts alone, but drawn at random."""
    alone = scores.get("precision")
    if subject.precision is None or alone is None:
        return []
    bound, whole = alone.ledger.policy, alone.ledger.bits
    if bound.precision is None:
        return []
    adapting = sum(map(bound.precision.adapts, range(bound.num_layers)))
    bits = alone.bits_read[:, 1:].mean() - whole * (bound.num_layers - adapting)
    share = float(np.clip((8 - bits / max(adapting, 1)) / 4, 0, 1))
    precision = replace(subject.precision, signal="random", two_below=0.0, four_below=share)
    return [
        replace(
            subject,
            name="random bits",
            prompt_halting=None,
            decode_halting=None,
            fusion=None,
            precision=precision,
        )
    ]


def oracle(model: Model, windows: Sequence[Window]) -> dict[str, float]:
    """Who knew the answer could stop each scored token at the first layer whose most likely next token is already the
    final one for good. Mean share of the layers run, and of tokens settled before the last layer."""
    depth = model.config.num_hidden_layers
    settled = observe(model, windows, protect_first=0, protect_last=1).settled
    return {"layers_share": float(settled.mean() / depth), "settled_early": float((settled < depth).mean())}
