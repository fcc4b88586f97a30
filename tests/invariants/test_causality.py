"""What stands later in the text never changes what was scored or decided before it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.invariants.cases import (
    GPT2_FROZEN,
    GPT2_NARROW,
    GPT2_ZERO,
    LLAMA_DIRECT,
    LLAMA_DROP,
    LLAMA_FROZEN,
    LLAMA_NARROW,
    Case,
    each,
    policies,
    prompts,
)
from tests.invariants.running import run

TOKENS = 7
CHUNK = 4


def changed(tokens: list[int], place: int) -> list[int]:
    return [*tokens[:place], (tokens[place] + 1) % 97, *tokens[place + 1 :]]


@each((GPT2_FROZEN, LLAMA_DROP), slow=(GPT2_ZERO, LLAMA_FROZEN, LLAMA_DIRECT, GPT2_NARROW, LLAMA_NARROW))
@settings(max_examples=5)
@given(data=st.data())
def test_scored_tokens_do_not_see_later_ones(case: Case, data: st.DataObject) -> None:
    policy, prompt = data.draw(policies(case)), data.draw(prompts(16))
    text = data.draw(st.lists(st.integers(0, 96), min_size=TOKENS, max_size=TOKENS))
    place = data.draw(st.integers(0, TOKENS - 1))
    one, other = (
        run(case.model, policy, [prompt], TOKENS, forced=[forced], chunk_size=CHUNK)
        for forced in (text, changed(text, place))
    )
    assert one.logprobs[0][:place] == other.logprobs[0][:place]
    assert one.layers_run[0][: place + 1] == other.layers_run[0][: place + 1]
    assert one.signal[0][: place + 1] == other.signal[0][: place + 1]
    for ours, theirs in zip(one.slots[: 1 + place // CHUNK], other.slots, strict=False):
        np.testing.assert_array_equal(ours, theirs)


@each((GPT2_FROZEN, LLAMA_DROP), slow=(GPT2_ZERO, LLAMA_FROZEN, LLAMA_DIRECT, GPT2_NARROW, LLAMA_NARROW))
@settings(max_examples=5)
@given(data=st.data())
def test_prompt_tokens_do_not_see_later_ones(case: Case, data: st.DataObject) -> None:
    """Fusion aside: it looks at a right neighbour, which is why only a prompt, where nothing is scored, may fuse."""
    policy = data.draw(policies(case, {"fuse": 0.0}))
    prompt = data.draw(prompts(16))
    place = data.draw(st.integers(0, len(prompt) - 1))
    one, other = (
        run(case.model, policy, [tokens], 1, chunk_size=CHUNK).prompt for tokens in (prompt, changed(prompt, place))
    )
    assert one.layers_run[0][:place].tolist() == other.layers_run[0][:place].tolist()
    np.testing.assert_allclose(one.signal[0][:place], other.signal[0][:place], rtol=1e-5)
