"""A bench on which it is known what a policy does to the nll."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from qs_jax.adaptive.policy import Policy
from qs_jax.evaluation.candidates import Space
from qs_jax.evaluation.measurements import Measured, Part
from qs_jax.evaluation.observation import Observed
from qs_jax.evaluation.statistics import increase

DEPTH, PREFIX = 8, 64
SPACE = Space.of(DEPTH, planes=False)


def observed() -> Observed:
    values = np.tile(np.linspace(0, 1, 101), (DEPTH, 1))
    signals = {"relative_drift": values}
    return Observed(signals, signals, {"cosine": values}, values[0], values[0])


def layers_saved(policy: Policy) -> float:
    """Share of layers saved, if signals are uniform and independent: of the prompt, whose last layer costs nothing to
    start with, and a little for all else."""
    running, saved = 1.0, 0.0
    halting = policy.prompt_halting
    for layer, threshold in zip(halting.layers or (), halting.thresholds, strict=True) if halting else ():  # pyright: ignore
        halted = running * min(threshold, 1.0)
        saved, running = saved + halted * (DEPTH - 1 - layer) / DEPTH, running - halted
    decode, fusion = policy.decode_halting, policy.fusion
    saved += 0.1 * sum(min(t, 1.0) for t in decode.thresholds) if decode else 0.0  # pyright: ignore
    saved += 0.05 * sum(fusion.thresholds) if fusion else 0.0  # pyright: ignore
    return saved


@dataclass
class FakeBench:
    """Windows are draws: what a policy does to the nll is known, up to noise that differs from window to window."""

    seed: int
    windows: int = 40
    texts: list[np.ndarray] | None = None

    def true_shift(self, policy: Policy) -> float:
        return 0.3 * layers_saved(policy) ** 2

    def of(self, policy: Policy, part: Part) -> Measured:
        saved = layers_saved(policy)
        dense = np.random.default_rng([self.seed, part == "test"]).normal(2.0, 0.4, self.windows)
        kind = crc32(json.dumps(policy.to_json()).encode())
        noise = np.random.default_rng([self.seed, part == "test", kind]).normal(0, 0.1 * saved, self.windows)
        return Measured((dense + self.true_shift(policy) + noise).tolist(), DEPTH * (1 - saved), 32.0, saved, 0.0)

    def stops(self, policies: Sequence[Policy], part: Part) -> None:
        """All is known anyway."""

    def dense(self, part: Part) -> Measured:
        return self.of(Policy.off(), part)

    def by_text(self, part: Part) -> list[np.ndarray]:
        return self.texts or [np.arange(self.windows)]

    def increase(self, policy: Policy, part: Part) -> float:
        return increase(self.of(policy, part).values, self.dense(part).values)

    def cost(self, policy: Policy) -> float:
        return self.of(policy, "search").layers_run / DEPTH
