"""The engine decides and computes what the slow numpy decoder does."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qs_jax.engine import prefill
from qs_jax.loading import load
from qs_jax.tokenizer import Tokenizer
from tests.invariants.cases import (
    GPT2_FROZEN,
    GPT2_NARROW,
    KINDS,
    LAYERS,
    LLAMA_DIRECT,
    LLAMA_DROP,
    LLAMA_NARROW,
    QUICK,
    THE_REST,
    Case,
    any_case,
    each,
    halfway,
    policies,
    prompts,
    with_thresholds,
)
from tests.invariants.running import DECIDED, DECIDED_NARROW, assert_same, assert_same_slots, imagine, run
from tests.oracle import Outcome

NEW_TOKENS = 7
CHUNK = 4


def check(case: Case, data: st.DataObject, longest: int) -> None:
    policy, prompt = data.draw(policies(case)), data.draw(prompts(longest))
    text = data.draw(st.just([]) | st.lists(st.integers(0, 96), min_size=NEW_TOKENS, max_size=NEW_TOKENS))
    oracle = imagine(case.model, policy, prompt, NEW_TOKENS, text)
    assume(oracle.margin > DECIDED)
    engine = run(case.model, policy, [prompt], NEW_TOKENS, chunk_size=CHUNK, forced=[text] if text else None)
    assert_same(engine, 0, oracle)
    assert_same_slots(engine, oracle, CHUNK)


@each((*QUICK, LLAMA_DIRECT), slow=THE_REST)
@settings(max_examples=12)
@given(data=st.data())
def test_engine_is_oracle(case: Case, data: st.DataObject) -> None:
    check(case, data, 16)


@pytest.mark.slow
@each((*QUICK, *THE_REST, LLAMA_DIRECT))
@settings(max_examples=12)
@given(data=st.data())
def test_engine_is_oracle_on_longer_prompts(case: Case, data: st.DataObject) -> None:
    check(case, data, 40)


@pytest.mark.slow
@settings(max_examples=10)
@given(data=st.data())
def test_engine_is_oracle_under_any_policy(data: st.DataObject) -> None:
    check(data.draw(any_case()), data, 16)


@each((), slow=(GPT2_NARROW, LLAMA_NARROW))
def test_engine_is_oracle_in_bfloat16(case: Case) -> None:
    """The oracle computes with the same weights and rounds nothing: texts are those where every decision is clear.

    Each row alone, and all of them in a ragged batch.
    """
    policy, found = halfway(case), list[tuple[list[int], list[int], Outcome]]()
    for seed in range(200):
        random = np.random.default_rng(seed)
        prompt = random.integers(12, 97, (16, 11, 5)[len(found)]).tolist()
        text = random.integers(0, 97, NEW_TOKENS).tolist()
        oracle = imagine(case.model, policy, prompt, NEW_TOKENS, text)
        if oracle.margin > DECIDED_NARROW:
            found.append((prompt, text, oracle))
        if len(found) == 3:
            break
    prompts, texts, oracles = map(list, zip(*found, strict=True))
    assert len(oracles) == 3
    assert min(min(oracle.prompt_layers_run) for oracle in oracles) < LAYERS
    assert min(step.layers_run for oracle in oracles for step in oracle.steps) < LAYERS
    alone = run(case.model, policy, prompts[:1], NEW_TOKENS, chunk_size=CHUNK, forced=texts[:1])
    assert_same(alone, 0, oracles[0], narrow=True)
    assert_same_slots(alone, oracles[0], CHUNK)
    together = run(case.model, policy, prompts, NEW_TOKENS, chunk_size=CHUNK, forced=texts)
    for row, oracle in enumerate(oracles):
        assert_same(together, row, oracle, narrow=True)
        assert together.slots[0][:, row].tolist() == oracle.prompt_slots


@each((GPT2_FROZEN,), slow=(LLAMA_DROP,))
def test_prompts_really_shrink(case: Case) -> None:
    """From 32 places to smaller buckets, with the same result."""
    prompt = np.random.default_rng(5).integers(12, 97, 30).tolist()
    policy = halfway(case, 0.6)
    engine = run(case.model, policy, [prompt], NEW_TOKENS, chunk_size=CHUNK)
    assert engine.session.prefilled is not None
    (piece,) = engine.session.prefilled.pieces
    places = [stage.tokens for stage in piece.passes]
    assert places[0] == 32 > places[1] >= places[2]
    oracle = imagine(case.model, policy, prompt, NEW_TOKENS)
    assert oracle.margin > DECIDED
    assert_same(engine, 0, oracle)
    assert_same_slots(engine, oracle, CHUNK)


def test_a_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later pieces see the slots of earlier ones; fusion stays within a piece."""
    case, prompt = GPT2_FROZEN, np.random.default_rng(6).integers(12, 97, 40).tolist()
    monkeypatch.setattr(prefill, "PIECE", 16)
    policy = halfway(case, 0.5)
    oracle = imagine(case.model, policy, prompt, NEW_TOKENS, piece=16)
    assert oracle.margin > DECIDED
    engine = run(case.model, policy, [prompt], NEW_TOKENS, chunk_size=CHUNK)
    assert_same(engine, 0, oracle)
    assert_same_slots(engine, oracle, CHUNK)


def test_a_trained_model(data_dir: Path) -> None:
    """Halting, dropped slots and fusion on stories260K, whose hidden states are not random."""
    folder = data_dir / "models" / "stories260K"
    model = load(folder, compilation_cache=False)
    text = "Once upon a time there was a little girl who liked to play with her dog in the park."
    prompt = Tokenizer.load(folder).encode(text)
    case = GPT2_FROZEN
    values = dict.fromkeys(KINDS, 0.0) | {"prompt_halt": 0.6, "decode_halt": 0.35, "decode_entropy": 1.5, "fuse": 0.4}
    policy = with_thresholds(case.policy, values)
    oracle = imagine(model, policy, prompt, 24)
    assert oracle.margin > DECIDED
    assert min(oracle.prompt_layers_run) == 2
    assert min(step.layers_run for step in oracle.steps) == 3
    assert max(oracle.fused_with) > 0
    engine = run(model, policy, [prompt], 24, chunk_size=8)
    assert_same(engine, 0, oracle)
    assert_same_slots(engine, oracle, 8)
