"""What is compiled: nothing twice, nothing more than the policy asks for, and for every platform."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from qs_jax import cache, kernels
from qs_jax.adaptive.policy import Policy
from qs_jax.engine import decode, exact, prefill, sampling, session, stage
from qs_jax.engine.compilation import METER
from qs_jax.engine.decode import decode_chunk, decode_step
from qs_jax.engine.prefill import Piece
from qs_jax.matryoshka import product
from qs_jax.models import attention, base
from tests.invariants.cases import (
    DECODE_LAYERS,
    GPT2_FROZEN,
    GPT2_NARROW,
    GPT2_SHALLOW,
    GPT2_ZERO,
    LAYERS,
    LLAMA_DROP,
    LLAMA_LADDER,
    LLAMA_NARROW,
    QUICK,
    Case,
    each,
    halfway,
)
from tests.invariants.running import run, step_arguments
from tests.tiny import tiny_model

PROMPT = np.random.default_rng(7).integers(12, 97, 16).tolist()
TOKENS = 7
CHUNK = 4
PROGRAMS = {prefill: ("run_stage", "regroup"), session: ("begin", "decode_chunk")}


@contextmanager
def traced() -> Iterator[list[jax.stages.Traced]]:
    """Collects every program of the engine that is run, as it was traced."""
    programs: list[jax.stages.Traced] = []

    def watched(jitted: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            programs.append(jitted.trace(*args, **kwargs))
            return jitted(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, names in PROGRAMS.items():
            for name in names:
                patch.setattr(module, name, watched(getattr(module, name)))
        yield programs


def lower_everywhere(model: Any, policy: Policy, expected: set[str]) -> None:
    with traced() as programs:
        run(model, policy, [PROMPT], 1 + CHUNK, chunk_size=CHUNK)
    assert {program.fun_name for program in programs} == expected
    for program in programs:
        for platform in ("cpu", "cuda", "tpu"):
            program.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dense_programs_lower_for_every_platform(name: str) -> None:
    lower_everywhere(tiny_model(name, LAYERS), Policy.off(), {"run_stage", "begin", "decode_chunk"})


def texts(case: Case, policy: Policy) -> list[str]:
    """Every program of a request, as it is lowered anew."""
    jax.clear_caches()
    with traced() as programs:
        run(case.model, policy, [PROMPT] * 2, 1 + CHUNK, chunk_size=CHUNK)
    return [program.lower().as_text() for program in programs]


@pytest.mark.parametrize("dense", [True, False])
def test_without_a_mesh_nothing_of_one_is_in_a_program(monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    """The programs are those of a package that had never heard of meshes."""
    policy = Policy.off() if dense else halfway(LLAMA_LADDER)
    found = texts(LLAMA_LADDER, policy)
    # JAX itself says of noise that it may lie anywhere on a mesh that there is not
    said = {line for text in found for line in text.splitlines() if "sharding" in line or "sdy." in line}
    assert all("@empty_mesh" in line for line in said)
    for module in (cache, kernels, product, sampling):
        monkeypatch.setattr(module, "mesh_of", lambda tree: None)
    for module in (attention, cache, decode, exact, prefill, session, stage):
        monkeypatch.setattr(module, "laid_out", lambda tree, like: tree)
    monkeypatch.setattr(base, "gathered", lambda logits, like: logits)
    assert texts(LLAMA_LADDER, policy) == found


@each((GPT2_ZERO, LLAMA_DROP), slow=(GPT2_SHALLOW, LLAMA_LADDER))
def test_adaptive_programs_lower_for_every_platform(case: Case) -> None:
    names = {name for part in PROGRAMS.values() for name in part}
    lower_everywhere(case.model, halfway(case), names)


@each(QUICK, slow=(GPT2_NARROW, LLAMA_NARROW))
def test_thresholds_compile_nothing(case: Case) -> None:
    """As long as the tokens that go on fit the same buckets, which is asserted."""

    def pieces(share: float) -> tuple[Piece, ...]:
        prefilled = run(case.model, halfway(case, share), [PROMPT], TOKENS, chunk_size=CHUNK).session.prefilled
        assert prefilled is not None
        return prefilled.pieces

    warm, before = pieces(0.4), METER.reading()
    for share in (0.45, 0.5, 0.55, 0.6):
        assert pieces(share) == warm
    assert METER.since(before).programs == 0


def conditionals(jaxpr: Any) -> int:
    """How many conditionals a program holds, those apart that only choose by platform."""
    count = 0
    for equation in jaxpr.eqns:
        decides = equation.primitive.name == "cond" and equation.params.get("branches_platforms") is None
        inner = [leaf for leaf in jax.tree.leaves(list(equation.params.values())) if hasattr(leaf, "eqns")]
        count += decides + sum(map(conditionals, inner))
    return count


def test_a_dense_step_holds_no_conditional() -> None:
    """And the chunk, which runs that very step, only the one that ends it early."""
    counts = []
    for policy in (Policy.off(), GPT2_FROZEN.policy):
        network, state, forced, controls = step_arguments(tiny_model("gpt2", LAYERS), policy, rows=1, capacity=64)
        step = jax.make_jaxpr(decode_step)(network, state, forced, controls).jaxpr
        chunk = jax.make_jaxpr(decode_chunk)(network, state, forced[None], controls).jaxpr
        counts.append((conditionals(step), conditionals(chunk)))
    deciding = len(DECODE_LAYERS)
    assert counts == [(0, 1), (deciding, deciding + 1)]
