"""Policies that between them use every signal, K/V rule, distance and position rule, with thresholds to be drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from qs_jax.adaptive.policy import Fusion, Halting, Policy, Precision, Probe
from qs_jax.model import Model
from tests.invariants.running import imagine
from tests.tiny import narrowed, quantised, tiny_model, with_random_direct_lens, with_random_lens

LAYERS = 4
PROMPT_LAYERS = (2, 3)
DECODE_LAYERS = (1, 3)

_TINY = 1e-30
KINDS: tuple[str, ...] = (
    "prompt_halt",
    "prompt_entropy",
    "decode_halt",
    "decode_entropy",
    "fuse",
    "two_bits",
    "four_bits",
)


@dataclass(frozen=True)
class Case:
    """A model and the structure of a policy; thresholds say nothing yet."""

    network: str
    policy: Policy
    planes: bool = False
    narrow: bool = False

    @property
    def model(self) -> Model:
        return _model(self.network, planes=self.planes, narrow=self.narrow)

    def __str__(self) -> str:
        return f"{self.network}-{self.policy.name}{'-bfloat16' if self.narrow else ''}"


@cache
def _model(network: str, *, planes: bool, narrow: bool) -> Model:
    model = with_random_direct_lens(with_random_lens(tiny_model(network, LAYERS)), stop=PROMPT_LAYERS[0])
    model = quantised(model) if planes else model
    return narrowed(model) if narrow else model


def _policy(name: str, prompt: Halting, decode: Halting, fusion: Fusion, **options: Any) -> Policy:
    return Policy(
        name=name,
        prompt_halting=replace(prompt, layers=PROMPT_LAYERS),
        decode_halting=replace(decode, layers=DECODE_LAYERS),
        fusion=replace(fusion, layers=PROMPT_LAYERS),
        protect_first=1,
        protect_last=2,
        **options,
    )


_GATED = 1.0
"""Asks for a low entropy as well; how low is drawn later."""

GPT2_FROZEN = Case(
    "gpt2",
    _policy(
        "frozen",
        Halting("relative_drift"),
        Halting("attention_update", entropy_below=_GATED, entropy_source="previous_entropy"),
        Fusion("cosine"),
        kv_rule="frozen",
    ),
)
GPT2_DROP = Case(
    "gpt2",
    _policy(
        "drop",
        Halting("entropy"),
        Halting("relative_drift"),
        Fusion("l2", position="mean", size_bias=True),
        kv_rule="drop",
        probe=Probe(40),
    ),
)
GPT2_ZERO = Case(
    "gpt2",
    _policy(
        "zero",
        Halting("raw_drift", entropy_below=_GATED),
        Halting("raw_drift", entropy_below=_GATED),
        Fusion("l2"),
        kv_rule="zero",
    ),
)
LLAMA_FROZEN = Case(
    "llama",
    _policy(
        "frozen",
        Halting("attention_update"),
        Halting("previous_entropy"),
        Fusion("cosine", position="mean", size_bias=True),
        kv_rule="frozen",
    ),
)
LLAMA_DROP = Case(
    "llama",
    _policy("drop", Halting("direction_drift"), Halting("random"), Fusion("cosine", position="first"), kv_rule="drop"),
)
LLAMA_ZERO = Case(
    "llama",
    _policy(
        "zero",
        Halting("random"),
        Halting("direction_drift", entropy_below=_GATED),
        Fusion("l2", size_bias=True),
        kv_rule="zero",
    ),
)

GPT2_AFFINE = Case(
    "gpt2",
    _policy(
        "affine",
        Halting("relative_drift"),
        Halting("entropy"),
        Fusion("cosine"),
        kv_rule="affine",
        protect_rare=9.0,
    ),
)
LLAMA_AFFINE = Case(
    "llama",
    _policy(
        "affine",
        Halting("attention_update"),
        Halting("relative_drift", entropy_below=_GATED, entropy_source="previous_entropy"),
        Fusion("l2", size_bias=True),
        kv_rule="affine",
    ),
)
GPT2_SHALLOW = Case(
    "gpt2",
    _policy(
        "shallow",
        Halting("relative_drift"),
        Halting("relative_drift"),
        Fusion("cosine"),
        kv_rule="shallow",
        precision=Precision("previous_entropy", layer=1, pinned=(-1,)),
    ),
    planes=True,
)
LLAMA_LADDER = Case(
    "llama",
    _policy(
        "ladder",
        Halting("direction_drift"),
        Halting("attention_update"),
        Fusion("cosine"),
        kv_rule="frozen",
        precision=Precision("entropy", layer=2),
    ),
    planes=True,
)


_DIRECT = Policy(
    "direct",
    prompt_halting=Halting("direction_drift", layers=PROMPT_LAYERS[:1]),
    kv_rule="direct",
    protect_first=1,
    protect_last=2,
)
"""Stops after one layer, which the direct lens is for."""

GPT2_DIRECT = Case("gpt2", replace(_DIRECT, fusion=Fusion("cosine", layers=PROMPT_LAYERS)))
LLAMA_DIRECT = Case("llama", replace(_DIRECT, protect_rare=8.0))

GPT2_NARROW = replace(GPT2_FROZEN, narrow=True)
LLAMA_NARROW = replace(LLAMA_DROP, narrow=True)

QUICK = (GPT2_FROZEN, GPT2_ZERO, LLAMA_DROP, LLAMA_AFFINE)
THE_REST = (GPT2_DROP, LLAMA_FROZEN, GPT2_AFFINE, LLAMA_ZERO, GPT2_SHALLOW, LLAMA_LADDER, GPT2_DIRECT)


def each(cases: Sequence[Case], slow: Sequence[Case] = ()) -> pytest.MarkDecorator:
    """One test per case, those in `slow` marked so."""
    params = [pytest.param(case, id=str(case)) for case in cases]
    params += [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize("case", params)


def with_thresholds(policy: Policy, values: Mapping[str, float]) -> Policy:
    """The policy with thresholds by kind; kinds it has no use for are passed over."""

    def halting(part: Halting | None, when: str) -> Halting | None:
        if part is None:
            return None
        below = None if part.entropy_below is None else values[f"{when}_entropy"]
        return replace(part, thresholds=values[f"{when}_halt"], entropy_below=below)

    return replace(
        policy,
        prompt_halting=halting(policy.prompt_halting, "prompt"),
        decode_halting=halting(policy.decode_halting, "decode"),
        fusion=policy.fusion and replace(policy.fusion, thresholds=values["fuse"]),
        precision=policy.precision
        and replace(policy.precision, two_below=values["two_bits"], four_below=values["four_bits"]),
    )


@cache
def observed(case: Case) -> dict[str, np.ndarray]:
    """The values each kind of threshold is compared with, where none of them bites."""
    policy = with_thresholds(case.policy, dict.fromkeys(KINDS, _TINY))
    prompt = np.random.default_rng(1).integers(12, 97, 24).tolist()
    outcome = imagine(case.model, policy, prompt, 12)
    return {kind: np.sort(values) for kind, values in outcome.observed.items()}


def policies(case: Case, given: Mapping[str, float] | None = None) -> st.SearchStrategy[Policy]:
    """The case's policy with thresholds from off to always, and all between; some may be given."""
    observed(case)  # not within a draw: checks of types look at random members of lists, which Hypothesis refuses there
    share = st.one_of(st.just(0.0), st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.just(1.0))

    def build(shares: tuple[float, ...]) -> Policy:
        drawn = {kind: _at(case, kind, s) for kind, s in zip(KINDS, shares, strict=True)}
        return with_thresholds(case.policy, {**drawn, **(given or {})})

    return st.tuples(*[share] * len(KINDS)).map(build)


def neutral(case: Case) -> Policy:
    """The case's policy with nothing below any threshold."""
    return with_thresholds(case.policy, dict.fromkeys(KINDS, 0.0))


def halfway(case: Case, share: float = 0.4) -> Policy:
    """The case's policy with every threshold among what it is compared with, whatever the entropy: much happens."""
    shares = {kind: 1.0 if kind.endswith("_entropy") else share for kind in KINDS}
    return with_thresholds(case.policy, {kind: _at(case, kind, share) for kind, share in shares.items()})


def _at(case: Case, kind: str, share: float) -> float:
    """The threshold below which that share of the values lies: 0 for none of them, infinity for all."""
    if share in (0.0, 1.0):
        return inf if share else 0.0
    return float(np.quantile(observed(case)[kind], share)) if kind in observed(case) else 0.0


def prompts(longest: int) -> st.SearchStrategy[list[int]]:
    """Token ids, special ones among them. Up to 16 share a handful of programs."""
    return st.lists(st.integers(0, 96), min_size=1, max_size=longest)


def any_case() -> st.SearchStrategy[Case]:
    """Any structure at all, on plain weights."""
    signals = ("relative_drift", "direction_drift", "raw_drift", "attention_update", "entropy", "random")
    acts_after = st.sets(st.integers(1, LAYERS - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    gate = st.sampled_from((None, _GATED))
    prompt = st.builds(Halting, st.sampled_from(signals), layers=acts_after, entropy_below=gate)
    decode = st.builds(
        Halting,
        st.sampled_from((*signals, "previous_entropy")),
        layers=acts_after,
        entropy_below=gate,
        entropy_source=st.sampled_from(("entropy", "previous_entropy")),
    )
    fusion = st.builds(
        Fusion,
        st.sampled_from(("cosine", "l2")),
        layers=acts_after,
        position=st.sampled_from(("last", "mean", "first")),
        size_bias=st.booleans(),
    )
    policy = st.builds(
        Policy,
        name=st.just("any"),
        prompt_halting=st.none() | prompt,
        decode_halting=st.none() | decode,
        kv_rule=st.sampled_from(("zero", "drop", "frozen", "affine")),
        fusion=st.none() | fusion,
        probe=st.builds(Probe, st.sampled_from((0, 40))),
        protect_first=st.integers(0, 4),
        protect_last=st.integers(1, 4),
        protect_special=st.booleans(),
    )
    return st.builds(Case, st.sampled_from(("gpt2", "llama")), policy)
