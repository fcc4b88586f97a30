"""A row's tokens never depend on its batch mates."""

import pytest

import qs_jax
from qs_jax.loading import Model
from tests.tiny import PROMPTS, SAMPLING


@pytest.mark.parametrize("settings", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_a_row_in_a_ragged_batch_is_the_row_alone(model: Model, settings: dict) -> None:
    together = qs_jax.generate(model, PROMPTS, max_new_tokens=40, **settings)
    for prompt, tokens in zip(PROMPTS, together.tokens, strict=True):
        assert qs_jax.generate(model, [prompt], max_new_tokens=40, **settings).tokens == [tokens]


def test_a_row_is_the_same_wherever_it_stands(model: Model) -> None:
    seeds = [3, 4, 5]
    settings = {**SAMPLING, "max_new_tokens": 40}
    forwards = qs_jax.generate(model, PROMPTS, **{**settings, "seed": seeds})
    backwards = qs_jax.generate(model, PROMPTS[::-1], **{**settings, "seed": seeds[::-1]})
    assert forwards.tokens == backwards.tokens[::-1]
    assert forwards.tokens[0] == qs_jax.generate(model, PROMPTS, **settings).tokens[0]
