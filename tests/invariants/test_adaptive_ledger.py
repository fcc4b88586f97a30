"""The adaptive ledger against counts made anew from the trace."""

import numpy as np
import pytest

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.policy import Halting, Policy
from tests.invariants.cases import (
    DECODE_LAYERS,
    GPT2_NARROW,
    LAYERS,
    LLAMA_NARROW,
    PROMPT_LAYERS,
    QUICK,
    Case,
    each,
    halfway,
)
from tests.invariants.running import Run, run
from tests.tiny import LENS_RANK, tiny_model


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
    decode = case.policy.decode_halting
    remembers = decode is not None and "previous_entropy" in decode.sources
    total = costs.head_flops + remembers * 6 * case.model.config.vocab_size
    for number, layer in enumerate(costs.layers):
        resting = places if (halted <= number).any() and case.policy.kv_rule != "drop" else 0
        running = places if number + 1 < LAYERS else 1  # of the last layer the others leave keys and values alone
        total += places * layer.kv_flops
        total += running * (layer.flops - layer.kv_flops + costs.attention_flops_per_slot * (places + resting))
        total += resting * (layer.kv_flops if case.policy.kv_rule in ("frozen", "affine") else 0)
        if case.policy.kv_rule == "affine" and number + 1 < LAYERS:
            total += resting * 4 * LENS_RANK * case.model.config.hidden_size
    per_decision = signal_flops(case, prompt) + 8 * case.model.config.hidden_size
    return total + len(PROMPT_LAYERS) * places * per_decision


def step_flops(case: Case, costs: Costs, ran: int, capacity: int) -> int:
    """A decode step that ran so many layers."""
    decode, config = case.policy.decode_halting, case.model.config
    assert decode is not None
    total = costs.head_flops + ("previous_entropy" in decode.sources) * 6 * config.vocab_size
    for number, layer in enumerate(costs.layers):
        rests = layer.kv_flops if case.policy.kv_rule in ("frozen", "affine") else 0
        rests += 4 * LENS_RANK * config.hidden_size if case.policy.kv_rule == "affine" else 0
        total += layer.flops + costs.attention_flops_per_slot * (capacity + 1) if number < ran else rests
    return total + sum(signal_flops(case, decode, lens=after <= ran) for after in DECODE_LAYERS)


@each(QUICK, slow=(GPT2_NARROW, LLAMA_NARROW))
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


def test_a_prompt_that_stops_one_layer_early_saves_nothing() -> None:
    """It is what the dense model does; two layers early saves one."""
    model, prompt = tiny_model("llama", LAYERS), np.random.default_rng(9).integers(12, 97, 128).tolist()

    def saved(layer: int) -> float:
        halting = Halting("random", float("inf"), layers=(layer,))
        policy = Policy("early", prompt_halting=halting, protect_first=0, protect_last=1, protect_special=False)
        engine = run(model, policy, [prompt], 1)
        assert engine.prompt.layers_run[0].tolist() == [layer] * (len(prompt) - 1) + [LAYERS]
        return engine.session.ledger.to_json()["flops_reduction"]

    assert saved(LAYERS - 1) == pytest.approx(0, abs=0.02)  # keys and values of a bucket's padding
    assert saved(LAYERS - 2) > 0.15
