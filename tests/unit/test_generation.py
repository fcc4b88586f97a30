"""Generating from token ids on small random models: greedy decoding, sampling, stopping, refusals."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import qs_jax
from qs_jax.errors import GenerationError, TokenizerError
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from tests.tiny import PROMPTS, SAMPLING, reference_logits, tiny_model


def assert_greedy(model: Model, prompt: list[int], tokens: list[int], logprobs: list[float]) -> None:
    logits = reference_logits(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
    assert tokens == logits.argmax(axis=-1).tolist()
    expected = logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_greedy_tokens_are_the_argmax_of_the_plain_forward_pass(model: Model) -> None:
    output = qs_jax.generate(model, PROMPTS, max_new_tokens=40)
    assert output.lengths == [40, 40, 40]
    assert output.finish_reasons == ["length"] * 3
    for prompt, tokens, logprobs in zip(PROMPTS, output.tokens, output.logprobs, strict=True):
        assert_greedy(model, prompt, tokens, logprobs)


def test_the_cache_grows_without_a_trace(model: Model) -> None:
    """The text crosses two growths of the cache and ends exactly at the context's limit."""
    limit = model.config.max_position_embeddings
    prompt = PROMPTS[0]
    output = qs_jax.generate(model, [prompt], max_new_tokens=limit - len(prompt))
    assert output.lengths == [limit - len(prompt)]
    assert_greedy(model, prompt, output.tokens[0], output.logprobs[0])


def test_sequences_of_one_prompt_differ_and_repeat(model: Model) -> None:
    first = qs_jax.generate(model, PROMPTS[0], num_return_sequences=3, max_new_tokens=20, **SAMPLING)
    again = qs_jax.generate(model, PROMPTS[0], num_return_sequences=3, max_new_tokens=20, **SAMPLING)
    assert first.tokens == again.tokens
    assert len({tuple(tokens) for tokens in first.tokens}) == 3


def test_an_unasked_seed_is_drawn_and_reported(model: Model) -> None:
    config = GenerationConfig(num_return_sequences=3, max_new_tokens=8, **SAMPLING)
    drawn = qs_jax.generate(model, PROMPTS[0], config, seed=None)
    again = qs_jax.generate(model, PROMPTS[0], config, seed=drawn.seeds[0])
    assert drawn.tokens == again.tokens


def test_eos_ends_a_row_and_only_that_row(model: Model) -> None:
    free = qs_jax.generate(model, PROMPTS, max_new_tokens=40)
    eos = free.tokens[0][5]
    ended = qs_jax.generate(model, PROMPTS, max_new_tokens=40, eos_token_id=[eos])
    for before, after, reason in zip(free.tokens, ended.tokens, ended.finish_reasons, strict=True):
        expected = before[: before.index(eos) + 1] if eos in before else before
        assert after == expected
        assert reason == ("eos" if eos in before else "length")
    assert ended.sequences.shape == (len(PROMPTS), max(ended.lengths))
    assert ended.trace["layers_run"][0] == [model.config.num_hidden_layers] * ended.lengths[0]


def test_any_id_of_an_eos_list_ends_a_row(model: Model) -> None:
    """The list may be the call's or the model's own, and may be longer than one slot array."""
    free = qs_jax.generate(model, PROMPTS, max_new_tokens=40)
    produced = {token for tokens in free.tokens for token in tokens}
    unused = [token for token in range(97) if token not in produced]
    ids = [*unused[:8], *(tokens[5] for tokens in free.tokens)]
    own = replace(model, config=replace(model.config, eos_token_ids=tuple(ids)))
    ended = qs_jax.generate(model, PROMPTS, max_new_tokens=40, eos_token_id=ids)
    assert ended.finish_reasons == ["eos"] * 3
    assert qs_jax.generate(own, PROMPTS, max_new_tokens=40).tokens == ended.tokens
    for before, after in zip(free.tokens, ended.tokens, strict=True):
        end = next(index for index, token in enumerate(before) if token in ids)
        assert after == before[: end + 1]


def test_rows_that_end_early_are_padded(model: Model) -> None:
    eos = qs_jax.generate(model, PROMPTS, max_new_tokens=40).tokens[0][5]
    ended = qs_jax.generate(model, PROMPTS, max_new_tokens=40, eos_token_id=eos, pad_token_id=96)
    for row, tokens in zip(ended.sequences, ended.tokens, strict=True):
        assert row.tolist() == tokens + [96] * (max(ended.lengths) - len(tokens))
    assert len(set(ended.lengths)) > 1


@pytest.mark.parametrize("new_tokens", [1, 2, 33])
def test_max_new_tokens_is_exact(model: Model, new_tokens: int) -> None:
    whole = qs_jax.generate(model, PROMPTS, max_new_tokens=40).tokens
    output = qs_jax.generate(model, PROMPTS, max_new_tokens=new_tokens)
    assert output.tokens == [tokens[:new_tokens] for tokens in whole]
    assert output.finish_reasons == ["length"] * 3


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "no tokens"),
        ([[999]], {}, "from 0 to"),
        ([[-1]], {}, "from 0 to"),
        ([[1.5]], {}, "from 0 to"),
        ([[1] * 500], {"max_new_tokens": 50}, "context of 512"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"temperature": 0.5}, "do_sample"),
        ([[1]], {"num_return_sequences": 2}, "do_sample"),
        ([[1]], {"do_sample": True, "temperature": 0.0}, "temperature"),
        ([[1]], {"do_sample": True, "temperature": float("nan")}, "temperature"),
        ([[1]], {"do_sample": True, "top_p": 0.0}, "top_p"),
        ([[1]], {"do_sample": True, "min_p": 2.0}, "min_p"),
        ([[1]], {"do_sample": True, "top_k": -1}, "top_k"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty"),
        ([[1]], {"eos_token_id": 97}, "eos_token_id"),
        ([[1]], {"top_q": 1}, "unknown setting top_q"),
        ([[1]], {"policy": "fast"}, "policy"),
        ([[1]], {"seed": [1, 2]}, "seed"),
    ],
)
def test_what_cannot_work_is_refused(prompts: list, settings: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        qs_jax.generate(tiny_model("gpt2"), prompts, **settings)


def test_text_without_a_tokenizer_is_refused() -> None:
    cases: tuple[tuple[dict[str, Any], Any], ...] = (({}, "hello"), ({"stop_strings": "x"}, [[1]]))
    for settings, prompts in cases:
        with pytest.raises(TokenizerError, match="tokenizer"):
            qs_jax.generate(tiny_model("gpt2"), prompts, **settings)


@pytest.mark.parametrize("prompts", ["", "  \n\t ", ["fine", "   "]])
def test_a_prompt_that_is_empty_after_stripping_is_refused(prompts: str | list[str]) -> None:
    with pytest.raises(GenerationError, match="empty"):
        qs_jax.generate(tiny_model("gpt2", tokenizer=True), prompts)
