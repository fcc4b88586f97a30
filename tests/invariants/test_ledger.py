"""The ledger against XLA's own count, and against the trace."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.adaptive.ledger import Costs, Ledger, StagePass, Work
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.cache import allocate
from qs_jax.engine.decode import decode_step
from qs_jax.engine.stage import enter, leave, run_stage
from qs_jax.loading import Model
from qs_jax.models import parse_config, random_network
from tests.invariants.cases import DECODE_LAYERS, LAYERS, PROMPT_LAYERS, QUICK, Case, each, halfway
from tests.invariants.running import Run, request, run, step_arguments
from tests.tiny import CONFIGS

CAPACITY = 256
ROWS = 2
SIZES = {
    "gpt2": {"n_embd": 384, "n_head": 6, "vocab_size": 4096},
    "llama": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


def broad_model(name: str) -> Model:
    """Two layers wide enough that products dominate, as they do in real models."""
    config = parse_config({**CONFIGS[name], **SIZES[name]}, name)
    return Model(config, random_network(config, seed=0), None, jnp.dtype("float32"), name)


def flops_of(function: Any, *arguments: Any, static: tuple[int, ...] = ()) -> float:
    """XLA's count for a compiled program."""
    analysis = jax.jit(function, static_argnums=static).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.parametrize("name", SIZES)
def test_a_dense_decode_step_is_what_xla_counts(name: str) -> None:
    model = broad_model(name)
    arguments = step_arguments(model, Policy.off(), rows=ROWS, capacity=CAPACITY)
    ledger = Ledger(Costs.of(model.network), arguments[-1].structure)
    nobody = jnp.zeros((1, 1, 3), bool)
    work = Work(jnp.full((1, 1), ROWS), nobody.at[..., 2].set(True), nobody, jnp.zeros((1, 1), jnp.int32))
    ledger.add_decode(work, 1, ROWS, [CAPACITY] * model.config.num_hidden_layers, CAPACITY)
    counted = flops_of(decode_step, *arguments, static=(4,))
    assert ledger.run.flops == ledger.twin.flops == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", SIZES)
def test_a_dense_prefill_is_what_xla_counts(name: str) -> None:
    model, width = broad_model(name), 128
    bound = request(model, Policy.off(), [[0]] * ROWS, 1).policy
    structure, thresholds, depth = bound.structure, bound.thresholds, model.config.num_hidden_layers

    def prefill(network: Any, ids: Any, lengths: Any, cache: Any, logits: Any) -> Any:
        tokens = enter(network, ids, jnp.int32(0), lengths, thresholds, structure=structure)
        tokens, _, cache, _ = run_stage(
            network, tokens, None, cache, thresholds, structure=structure, start=0, stop=depth, fresh=True
        )
        return leave(network, tokens, lengths, logits), cache

    cache = tuple(allocate(model.config, ROWS, CAPACITY, model.dtype) for _ in range(depth))
    ids, lengths = jnp.zeros((ROWS, width), jnp.int32), jnp.full(ROWS, width)
    logits = jnp.zeros((ROWS, model.config.vocab_size))
    counted = flops_of(prefill, model.network, ids, lengths, cache, logits)
    ledger = Ledger(Costs.of(model.network), structure)
    ledger.add_prefill([StagePass(0, depth, ROWS, width, 0, 0)], [(width, 0)], ROWS)
    assert ledger.run.flops == ledger.twin.flops == pytest.approx(counted, rel=0.02)


def signal_flops(case: Case, halting: Halting, *, lens: bool = True) -> int:
    """What one token's decision costs: 8 operations a channel for a drift; for a lens, a product and 6 an id."""
    config, reads = case.model.config, halting.sources
    drift = 0 if halting.signal in ("entropy", "previous_entropy", "random") else 8 * config.hidden_size
    ids = case.policy.probe.shortlist or config.vocab_size
    return drift + ("entropy" in reads and lens) * (2 * config.hidden_size + 6) * ids


def prompt_flops(case: Case, costs: Costs, engine: Run, places: int) -> int:
    """A prompt of one bucket, from which tokens halted where."""
    prompt, fusion = case.policy.prompt_halting, case.policy.fusion
    assert prompt is not None
    assert fusion is not None
    halted = engine.prompt.layers_run[0][engine.prompt.fused_with[0] < 0]
    total = costs.head_flops
    for number, layer in enumerate(costs.layers):
        resting = places if (halted <= number).any() and case.policy.kv_rule != "drop" else 0
        projected = resting * layer.kv_flops if case.policy.kv_rule == "frozen" else 0
        total += places * (layer.flops + costs.attention_flops_per_slot * (places + resting)) + projected
    per_verdict = signal_flops(case, prompt) + 8 * case.model.config.hidden_size
    return total + len(PROMPT_LAYERS) * places * per_verdict


def step_flops(case: Case, costs: Costs, ran: int, capacity: int) -> int:
    """A decode step that ran so many layers."""
    decode, config = case.policy.decode_halting, case.model.config
    assert decode is not None
    total = costs.head_flops + ("previous_entropy" in decode.sources) * 6 * config.vocab_size
    for number, layer in enumerate(costs.layers):
        rests = layer.kv_flops if case.policy.kv_rule == "frozen" else 0
        total += layer.flops + costs.attention_flops_per_slot * (capacity + 1) if number < ran else rests
    return total + sum(signal_flops(case, decode, lens=after <= ran) for after in DECODE_LAYERS)


@each(QUICK)
def test_a_lone_row_costs_what_its_trace_says(case: Case) -> None:
    """Everything that was decided is in the trace; what it costs is counted anew from there."""
    prompt, tokens, capacity = np.random.default_rng(8).integers(12, 97, 16).tolist(), 7, 64
    engine = run(case.model, halfway(case, 0.75), [prompt], tokens, chunk_size=4)
    ledger, ran = engine.session.ledger, engine.layers_run[0]
    expected = prompt_flops(case, ledger.costs, engine, len(prompt))
    expected += sum(step_flops(case, ledger.costs, layers, capacity) for layers in ran[1:])
    assert ledger.run.flops == expected
    assert ledger.run.kv_slots == engine.slots[-1].sum()
    assert ledger.twin.kv_slots == LAYERS * (len(prompt) + tokens - 1)
    assert ledger.to_json()["layers_run_mean"] == (engine.prompt.layers_run[0].sum() + sum(ran[1:])) / (
        len(prompt) + tokens - 1
    )
    assert min(ran) < LAYERS
