"""The ledger's FLOPs of one dense decode step and one dense prefill against XLA's own count, within 2 %."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qs_jax.adaptive.ledger import Costs, Ledger
from qs_jax.cache import allocate
from qs_jax.engine.decode import DecodeState, decode_step
from qs_jax.engine.prefill import extend
from qs_jax.engine.sampling import SamplingPlan, SamplingSettings
from qs_jax.engine.stopping import eos_array
from qs_jax.models import arrays_by_path, parse_config, random_network
from qs_jax.models.base import CausalLM
from tests.tiny import CONFIGS

CAPACITY, WIDTH, VOCAB = 256, 128, 1000
TOLERANCE = 0.02

WIDER = {
    "gpt2": {"n_embd": 256, "n_layer": 3, "vocab_size": VOCAB},
    "llama": {"hidden_size": 256, "intermediate_size": 700, "num_hidden_layers": 3, "vocab_size": VOCAB},
}
"""Wide enough that norms, activations and softmax, which the ledger leaves out, are as small as on real models."""


@pytest.fixture(params=WIDER, scope="module")
def network(request: pytest.FixtureRequest) -> CausalLM:
    return random_network(parse_config({**CONFIGS[request.param], **WIDER[request.param]}, "test"), seed=0)


def flops_of(lowered: Any) -> float:
    """XLA's own count."""
    return lowered.cost_analysis()["flops"]


def counted(network: CausalLM, batch: int, tokens: int, slots: int) -> int:
    ledger = Ledger(Costs.of(network))
    ledger.add_pass(rows=batch, tokens=tokens, slots=slots, logit_rows=batch)
    return ledger.flops


@pytest.mark.parametrize("batch", [1, 4])
def test_one_decode_step(network: CausalLM, batch: int) -> None:
    row = jnp.ones((batch,), jnp.int32)
    cache = allocate(network.config, batch, CAPACITY, jnp.dtype("float32"))
    keys = jax.random.split(jax.random.key(0), batch)
    state = DecodeState(row, row, cache, row > 1, row, keys, jnp.zeros((batch, 0), bool))
    one = jnp.float32(1.0)
    settings = SamplingSettings(one, jnp.int32(0), one, jnp.float32(0.0), one)
    step = jax.jit(decode_step, static_argnames="plan")
    expected = flops_of(step.lower(network, state, settings, eos_array([]), plan=SamplingPlan()))
    assert counted(network, batch, 1, CAPACITY) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("fresh", [True, False])
def test_one_prefill(network: CausalLM, fresh: bool) -> None:
    batch = 2
    row = jnp.ones((batch,), jnp.int32)
    cache = allocate(network.config, batch, CAPACITY, jnp.dtype("float32"))
    tokens, logits = jnp.zeros((batch, WIDTH), jnp.int32), jnp.zeros((batch, VOCAB))
    expected = flops_of(extend.lower(network, tokens, jnp.int32(0), row, logits, cache, fresh=fresh))
    assert counted(network, batch, WIDTH, 0 if fresh else CAPACITY) == pytest.approx(expected, rel=TOLERANCE)


def test_bytes_are_those_of_every_weight_a_step_reads(network: CausalLM) -> None:
    costs = Costs.of(network)
    arrays = arrays_by_path(network)
    looked_up = ("position_embedding", "output_norm", *(() if network.lm_head is None else ("embedding",)))
    read = sum(array.nbytes for path, array in arrays.items() if not path.startswith(looked_up))
    assert costs.layers * costs.block_bytes + costs.head_bytes == read


def test_a_pass_repeated_is_the_sum_of_its_passes(network: CausalLM) -> None:
    once, thrice = Ledger(Costs.of(network)), Ledger(Costs.of(network))
    thrice.add_pass(rows=2, tokens=1, slots=64, logit_rows=2, times=3)
    for _ in range(3):
        once.add_pass(rows=2, tokens=1, slots=64, logit_rows=2)
    assert once == thrice
    once.add_writes(5)
    assert once == replace(thrice, kv_slots=15)
