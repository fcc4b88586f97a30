"""A row of a ragged batch is the row alone, whatever its mates do."""

from itertools import combinations

import numpy as np
import pytest

from qs_jax.engine import prefill
from tests.invariants.cases import (
    GPT2_FROZEN,
    GPT2_SHALLOW,
    GPT2_ZERO,
    LLAMA_AFFINE,
    LLAMA_DROP,
    LLAMA_FROZEN,
    LLAMA_LADDER,
    Case,
    each,
    halfway,
)
from tests.invariants.running import DECIDED, assert_same, imagine, run
from tests.oracle import Outcome

_random = np.random.default_rng(4)
PROMPTS = [_random.integers(0, 97, length).tolist() for length in (16, 5, 11, 1, 16, 8)]
TOKENS = 20
CHUNK = 4


def length(outcome: Outcome, ends: tuple[int, ...]) -> int:
    """Tokens of a row that stops at any of these."""
    return next((number for number, step in enumerate(outcome.steps, start=1) if step.token in ends), TOKENS)


def ends_of(alone: list[Outcome]) -> tuple[int, ...]:
    """Tokens that end half of the rows early, one by one, and let another go on to the end."""
    early = sorted({step.token for outcome in alone for step in outcome.steps[1:CHUNK]})
    for count in range(1, 5):
        for chosen in combinations(early, count):
            lengths = sorted(length(outcome, chosen) for outcome in alone)
            if 1 < lengths[0] < lengths[2] <= 2 * CHUNK and lengths[-1] == TOKENS:
                return chosen
    raise AssertionError("no tokens end these rows so")


@each((GPT2_FROZEN,), slow=(GPT2_ZERO, LLAMA_FROZEN, LLAMA_DROP, LLAMA_LADDER))
def test_a_row_is_the_row_alone(case: Case) -> None:
    """Rows halt and end at different times: few live ones are gathered within a step, and between chunks."""
    policy, rows = halfway(case), len(PROMPTS)
    alone = [imagine(case.model, policy, prompt, TOKENS) for prompt in PROMPTS]
    assert min(outcome.margin for outcome in alone) > DECIDED
    ends = ends_of(alone)
    for outcome in alone:
        del outcome.steps[length(outcome, ends) :]
    together = run(case.model, policy, PROMPTS, TOKENS, chunk_size=CHUNK, eos=ends)
    for row, outcome in enumerate(alone):
        assert_same(together, row, outcome)
        assert together.slots[0][:, row].tolist() == outcome.prompt_slots
    assert min(together.rows_held) <= rows // 2 < together.rows_held[0] == rows
    assert rows // 2 in {int(ran) for chunk in together.rows_run for ran in chunk.ravel()}


@each((GPT2_FROZEN, LLAMA_DROP), slow=(GPT2_ZERO, LLAMA_AFFINE, GPT2_SHALLOW))
def test_a_row_may_end_in_any_piece(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of a row is its own last token, wherever the other rows have theirs: at a piece's end or start, in
    its middle, or in an earlier piece."""
    monkeypatch.setattr(prefill, "PIECE", 16)
    random, policy = np.random.default_rng(5), halfway(case, 0.5)
    prompts = [random.integers(0, 97, length).tolist() for length in (40, 16, 17, 5, 32)]
    together = run(case.model, policy, prompts, 3, chunk_size=CHUNK)
    for row, prompt in enumerate(prompts):
        outcome = imagine(case.model, policy, prompt, 3, piece=16)
        assert outcome.margin > DECIDED
        assert_same(together, row, outcome)
        assert together.slots[0][:, row].tolist() == outcome.prompt_slots
