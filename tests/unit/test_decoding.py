"""The engine on small random models: ragged batches, sampling, stopping, compilation."""

import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.engine.compilation import METER
from qs_jax.errors import GenerationError, TokenizerError
from qs_jax.loading import Model
from qs_jax.models import forward
from tests.tiny import PROMPTS, tiny_model

MODELS = ("gpt2", "llama")
SAMPLING = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "seed": 3}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_model(request.param)


def test_greedy_tokens_are_the_argmax_of_the_plain_forward_pass(model: Model) -> None:
    output = qs_jax.generate(model, PROMPTS, max_new_tokens=40)
    for prompt, tokens, logprobs in zip(PROMPTS, output.tokens, output.logprobs, strict=True):
        logits = np.asarray(forward(model.network, jnp.asarray([*prompt, *tokens])[None]))[0, len(prompt) - 1 : -1]
        assert tokens == logits.argmax(axis=-1).tolist()
        expected = logits[np.arange(40), tokens] - np.log(np.exp(logits).sum(axis=-1))
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_a_row_in_a_ragged_batch_is_the_row_alone(model: Model) -> None:
    for settings in ({}, SAMPLING):
        together = qs_jax.generate(model, PROMPTS, max_new_tokens=20, **settings)
        for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
            assert qs_jax.generate(model, [prompt], max_new_tokens=20, **settings).tokens == [tokens]


def test_sequences_of_one_prompt_differ_and_repeat(model: Model) -> None:
    first = qs_jax.generate(model, PROMPTS[0], num_return_sequences=3, max_new_tokens=16, **SAMPLING)
    again = qs_jax.generate(model, PROMPTS[0], num_return_sequences=3, max_new_tokens=16, **SAMPLING)
    assert first.tokens == again.tokens
    assert len({tuple(tokens) for tokens in first.tokens}) == 3


def test_an_unasked_seed_is_drawn_and_reported(model: Model) -> None:
    settings = {**SAMPLING, "max_new_tokens": 8}
    drawn = qs_jax.generate(model, PROMPTS[0], **{**settings, "seed": None})
    again = qs_jax.generate(model, PROMPTS[0], **{**settings, "seed": drawn.seeds[0]})
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


def test_the_cache_grows_without_a_trace(model: Model) -> None:
    """300 tokens cross two growths of the cache and end exactly at the context's limit."""
    limit = model.config.max_position_embeddings
    prompt = PROMPTS[0]
    output = qs_jax.generate(model, [prompt], max_new_tokens=limit - len(prompt))
    logits = np.asarray(forward(model.network, jnp.asarray([*prompt, *output.tokens[0]])[None]))[0]
    assert output.tokens[0] == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()


def test_nothing_compiles_twice(model: Model) -> None:
    qs_jax.generate(model, PROMPTS[0], max_new_tokens=20, **SAMPLING)
    before = METER.reading()
    other = {**SAMPLING, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "seed": 9, "eos_token_id": [1, 2]}
    qs_jax.generate(model, PROMPTS[0], max_new_tokens=20, **SAMPLING)
    qs_jax.generate(model, PROMPTS[0][::-1], max_new_tokens=24, **other)
    assert METER.since(before).programs == 0


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "no tokens"),
        ([[999]], {}, "from 0 to"),
        ([[1] * 500], {"max_new_tokens": 50}, "context of 512"),
        ([[1]], {"temperature": 0.5}, "do_sample"),
        ([[1]], {"do_sample": True, "temperature": 0.0}, "temperature"),
        ([[1]], {"top_q": 1}, "unknown setting top_q"),
        ([[1]], {"policy": "fast"}, "policy"),
        ([[1]], {"seed": [1, 2]}, "seed"),
    ],
)
def test_what_cannot_work_is_refused(prompts: list, settings: dict, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        qs_jax.generate(tiny_model("gpt2"), prompts, **settings)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        qs_jax.generate(tiny_model("gpt2"), "hello")
    with pytest.raises(GenerationError, match="empty"):
        qs_jax.generate(tiny_model("gpt2"), "  \n")
