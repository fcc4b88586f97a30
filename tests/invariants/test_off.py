"""With every mechanism off, or on and neutral, the engine is the dense model to the last bit.

Matryoshka weights are an exception, and bfloat16 is: neutral is the dense model to rounding there. XLA keeps float32
within what it fuses, and fuses two programs differently.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.adaptive.policy import Policy
from qs_jax.cache import allocate, append, segment
from qs_jax.kernels import has_planes
from qs_jax.model import Model
from qs_jax.models.attention import new_segment
from tests.invariants.cases import GPT2_NARROW, LAYERS, LLAMA_NARROW, QUICK, THE_REST, Case, each, neutral
from tests.invariants.running import CLOSE_NARROW, Run, run
from tests.tiny import narrowed, tiny_model

PROMPT = np.random.default_rng(2).integers(12, 97, 16).tolist()
NEW_TOKENS = 7
CHUNK = 4
CAPACITY = 64


def dense(model: Model, prompt: list[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, from the model's own parts and nothing of the engine: all tokens run
    all layers, but of the last one only keys and values where nobody reads what comes out."""

    @jax.jit
    def step(network, cache, tokens, positions):
        hidden_states = network.embed(tokens, positions)
        after = []
        *blocks, last = network.blocks
        past = [() if tokens.shape[1] > 1 else (segment(layer),) for layer in cache]
        for block, view, layer in zip(blocks, past, cache, strict=False):
            hidden_states, k, v, _ = block.run(hidden_states, positions, view)
            after.append(append(layer, k, v, positions, jnp.ones(tokens.shape, bool)))
        k, v = last.kv(hidden_states, positions)
        after.append(append(cache[-1], k, v, positions, jnp.ones(tokens.shape, bool)))
        everyone = new_segment(k, v, jnp.ones((1, 1, tokens.shape[1]), bool))
        one = (part[:, -1:] for part in (hidden_states, positions, k, v))
        hidden_states, position, k, v = one
        hidden_states = last.run_over(hidden_states, position, (*past[-1], everyone), k, v).hidden_states
        return network.head(hidden_states[:, -1]), tuple(after)

    cache = tuple(allocate(model.config, 1, CAPACITY, model.dtype) for _ in model.network.blocks)
    pending, position, tokens, logprobs = prompt, 0, [], []
    for _ in range(new_tokens):
        positions = jnp.arange(position, position + len(pending), dtype=jnp.int32)[None]
        logits, cache = step(model.network, cache, jnp.asarray([pending]), positions)
        position += len(pending)
        pending = [int(logits.argmax())]
        tokens += pending
        logprobs.append(float(logits[0, pending[0]] - jax.nn.logsumexp(logits)))
    return tokens, logprobs


def off(model: Model) -> Run:
    return run(model, Policy.off(), [PROMPT], NEW_TOKENS, chunk_size=CHUNK)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_off_is_dense(name: str) -> None:
    model = tiny_model(name, LAYERS)
    engine = off(model)
    assert (engine.tokens[0], engine.logprobs[0]) == dense(model, PROMPT, NEW_TOKENS)
    assert engine.layers_run[0] == [LAYERS] * NEW_TOKENS
    ledger = engine.session.ledger.to_json()
    for name in ("flops", "weight_bytes", "kv_slots"):
        assert ledger[name] == ledger[f"{name}_off"]
    assert ledger["probe_flops"] == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_off_is_dense_in_bfloat16(name: str) -> None:
    """But for rounding, which XLA places otherwise in another program: llama is off by 0.004, gpt2 by 0.008, of logits
    whose deviation is 0.9."""
    model = narrowed(tiny_model(name, LAYERS))
    engine, (tokens, logprobs) = off(model), dense(model, PROMPT, NEW_TOKENS)
    assert engine.tokens[0] == tokens
    np.testing.assert_allclose(engine.logprobs[0], logprobs, rtol=0, atol=CLOSE_NARROW)


@each(QUICK, slow=(*THE_REST, GPT2_NARROW, LLAMA_NARROW))
def test_neutral_is_off(case: Case) -> None:
    model = case.model
    expected, engine = off(model), run(model, neutral(case), [PROMPT], NEW_TOKENS, chunk_size=CHUNK)
    assert engine.tokens == expected.tokens
    # rows that may read at fewer bits take another path through the planes, which may add in another order
    rounding = CLOSE_NARROW if case.narrow else 1e-5 if has_planes(model.network) else 0.0
    np.testing.assert_allclose(engine.logprobs, expected.logprobs, rtol=0, atol=rounding)
    assert engine.layers_run == expected.layers_run
    for ours, theirs in zip(engine.slots, expected.slots, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert engine.session.ledger.to_json()["layers_run_mean"] == LAYERS
