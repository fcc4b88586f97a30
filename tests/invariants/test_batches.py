"""A row's tokens never depend on its batch mates."""

import pytest

import qs_jax
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from tests.tiny import PROMPTS, SAMPLING, tiny_model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("gpt2", SAMPLING, id="gpt2-sampled"),
        pytest.param("llama", {}, id="llama-greedy"),
        pytest.param("gpt2", {}, id="gpt2-greedy", marks=pytest.mark.slow),
        pytest.param("llama", SAMPLING, id="llama-sampled", marks=pytest.mark.slow),
    ],
)
def test_a_row_in_a_ragged_batch_is_the_row_alone(name: str, settings: dict) -> None:
    model = tiny_model(name)
    together = qs_jax.generate(model, PROMPTS, max_new_tokens=40, **settings)
    for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
        assert qs_jax.generate(model, [prompt], max_new_tokens=40, **settings).tokens == [tokens]


def test_a_row_is_the_same_wherever_it_stands(model: Model) -> None:
    seeds = [3, 4, 5]
    config = GenerationConfig(max_new_tokens=40, **SAMPLING)
    forwards = qs_jax.generate(model, PROMPTS, config, seed=seeds)
    backwards = qs_jax.generate(model, PROMPTS[::-1], config, seed=seeds[::-1])
    assert forwards.tokens == backwards.tokens[::-1]
    assert forwards.tokens[0] == qs_jax.generate(model, PROMPTS, config).tokens[0]
