"""Generation with nested kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.choices import BITS
from qs_jax.errors import GenerationError
from qs_jax.kernels import at_bits
from qs_jax.model import Model
from qs_jax.models import forward
from tests.tiny import PROMPTS, quantised, tiny_model


@pytest.fixture(params=("gpt2", "llama"), scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return quantised(tiny_model(request.param))


@pytest.mark.slow
def test_generation_at_every_precision(model: Model) -> None:
    for bits in BITS:
        output = qs_jax.generate(model, PROMPTS, bits=bits, max_new_tokens=12)
        for prompt, tokens in zip(PROMPTS, output.tokens, strict=True):
            logits = forward(at_bits(model.network, bits), jnp.asarray([*prompt, *tokens])[None])
            assert tokens == np.asarray(logits)[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        assert output.ledger["bits_mean"] == bits


def test_bits_need_matryoshka_weights() -> None:
    with pytest.raises(GenerationError, match="no Matryoshka weights"):
        qs_jax.generate(tiny_model("gpt2"), PROMPTS[:1], bits=4)
    with pytest.raises(GenerationError, match="bits is 3"):
        qs_jax.generate(tiny_model("gpt2"), PROMPTS[:1], bits=3)
