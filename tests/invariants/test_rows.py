"""A row of a ragged batch is the row alone, whatever its mates do."""

import numpy as np

from tests.invariants.cases import GPT2_FROZEN, GPT2_ZERO, LLAMA_DROP, LLAMA_FROZEN, LLAMA_LADDER, Case, each, halfway
from tests.invariants.running import DECIDED, assert_same, imagine, run

_random = np.random.default_rng(4)
PROMPTS = [_random.integers(0, 97, length).tolist() for length in (16, 5, 11, 1, 16, 8)]
TOKENS = 20
CHUNK = 4


@each((GPT2_FROZEN,), slow=(GPT2_ZERO, LLAMA_FROZEN, LLAMA_DROP, LLAMA_LADDER))
def test_a_row_is_the_row_alone(case: Case) -> None:
    """Rows halt and end at different times: few live ones are gathered within a step, and between chunks."""
    policy, rows = halfway(case), len(PROMPTS)
    alone = [imagine(case.model, policy, prompt, TOKENS) for prompt in PROMPTS]
    assert min(outcome.margin for outcome in alone) > DECIDED
    ends = {outcome.steps[place].token for place, outcome in zip((2, 3, 5, 5), alone, strict=False)}
    for outcome in alone:
        stop = next((n for n, step in enumerate(outcome.steps) if step.token in ends), TOKENS)
        del outcome.steps[stop + 1 :]
    together = run(case.model, policy, PROMPTS, TOKENS, chunk_size=CHUNK, eos=sorted(ends))
    for row, outcome in enumerate(alone):
        assert_same(together, row, outcome)
        assert together.slots[0][:, row].tolist() == outcome.prompt_slots
    assert max(len(outcome.steps) for outcome in alone) == TOKENS
    assert min(together.rows_held) <= rows // 2 < together.rows_held[0] == rows
    assert rows // 2 in {int(ran) for chunk in together.rows_run for ran in chunk.ravel()}
