"""Scored in chunks, scored token by token, and generated: one and the same."""

import numpy as np

from tests.invariants.cases import GPT2_FROZEN, GPT2_ZERO, LLAMA_DROP, LLAMA_FROZEN, QUICK, Case, each, halfway
from tests.invariants.running import Run, run

PROMPT = np.random.default_rng(3).integers(12, 97, 16).tolist()
TOKENS = 7
CHUNK = 4


ROUNDING = 1e-5


def assert_equal(one: Run, other: Run) -> None:
    """Every decision the same, every number to rounding: programs of another chunk size may add in another order."""
    assert (one.tokens, one.layers_run) == (other.tokens, other.layers_run)
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(one.signal, other.signal, rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(one.slots[-1], other.slots[-1])


@each(QUICK)
def test_scored_as_generated(case: Case) -> None:
    generated = run(case.model, halfway(case), [PROMPT], TOKENS, chunk_size=CHUNK)
    scored = run(case.model, halfway(case), [PROMPT], TOKENS, chunk_size=CHUNK, forced=generated.tokens)
    assert_equal(scored, generated)


@each((GPT2_FROZEN,), slow=(GPT2_ZERO, LLAMA_FROZEN, LLAMA_DROP))
def test_chunks_are_steps(case: Case) -> None:
    chunks, steps = (run(case.model, halfway(case), [PROMPT], TOKENS, chunk_size=size) for size in (CHUNK, 1))
    assert_equal(steps, chunks)
