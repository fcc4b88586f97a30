"""The ledger against XLA's own count of FLOPs, within 2 %: a prefill, dense and adaptive, and a dense decode step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.policy import Halting, KvRuleName, Policy
from qs_jax.engine.decode import decode_step
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, parse_config, random_network
from tests.recording import Call, recorded
from tests.tiny import CONFIGS, with_random_direct_lens, with_random_lens

TOLERANCE = 0.02
PREFILL = "engine.stage.run_stage"

WIDER = {
    "gpt2": {"n_embd": 256, "n_layer": 3, "vocab_size": 1000, "n_positions": 2048},
    "llama": {
        "hidden_size": 256,
        "intermediate_size": 700,
        "num_hidden_layers": 3,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
    },
}
"""Wide enough that norms, activations and softmax, which the ledger leaves out, are as small as on real models."""


@pytest.fixture(params=WIDER, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    config = parse_config({**CONFIGS[request.param], **WIDER[request.param]}, "test")
    return Model(config, random_network(config, seed=0), None, jnp.dtype("float32"), "test")


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product in lanes sums them by another one, which XLA counts; the ledger counts what any way must multiply."""
    monkeypatch.setattr("qs_jax.kernels.lanes_for", lambda rows, weights: None)


def flops_off(ledger: dict[str, float]) -> float:
    assert ledger["flops"] == ledger["flops_off"]
    assert ledger["probe_flops"] == 0
    return ledger["flops"]


def run(model: Model, batch: int, length: int, new_tokens: int) -> tuple[float, list[Call]]:
    """The ledger's FLOPs of a request, and the programs it ran."""
    prompts = np.random.default_rng(0).integers(0, 1000, (batch, length)).tolist()
    with recorded() as calls:
        output = qs_jax.generate(model, prompts, max_new_tokens=new_tokens, eos_token_id=[])
    return flops_off(output.ledger), calls


def counted(lowered: Any) -> float:
    return lowered.cost_analysis()["flops"]


@pytest.mark.parametrize(("batch", "length"), [(1, 128), (3, 128), (1, 1100)])
def test_one_prefill(model: Model, batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last is long enough to go in two pieces, the second of which looks at the cache.

    XLA counts a loop's body once: queries attend all at once here.
    """
    monkeypatch.setattr("qs_jax.models.attention._SLOTS", 2048)
    ledger, calls = run(model, batch, length, new_tokens=1)
    expected = sum(counted(call.lower()) for call in calls if call.name == PREFILL)
    assert ledger == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("rule", ["frozen", "drop", "zero", "affine"])
def test_one_prefill_under_a_policy(model: Model, rule: KvRuleName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tokens halt after the first of three layers and half of the others after the second, so that every
    rule has its say in the last layer, which one token alone runs whole."""
    monkeypatch.setattr("qs_jax.models.attention._SLOTS", 2048)
    prompt = np.random.default_rng(0).integers(0, 1000, 128).tolist()
    policy = Policy(prompt_halting=Halting("random", 0.5, layers=(1, 2)), kv_rule=rule, protect_first=1, protect_last=1)
    with recorded() as calls:
        output = qs_jax.generate(with_random_lens(model), prompt, policy=policy, max_new_tokens=1, eos_token_id=[])
    assert {1, 2, 3} == set(output.trace["prompt_layers_run"][0])
    expected = sum(counted(call.lower()) for call in calls if call.name == PREFILL)
    assert output.ledger["flops"] == pytest.approx(expected, rel=TOLERANCE)


def test_one_prefill_with_a_direct_lens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tokens stop after the first layer; what is kept of them, and what that makes, is counted."""
    monkeypatch.setattr("qs_jax.models.attention._SLOTS", 2048)
    prompt = np.random.default_rng(0).integers(0, 1000, 128).tolist()
    halting = Halting("random", 0.5, layers=(1,))
    policy = Policy(prompt_halting=halting, kv_rule="direct", protect_first=1, protect_last=1)
    lensed = with_random_direct_lens(model, stop=1, rank=48)
    with recorded() as calls:
        output = qs_jax.generate(lensed, prompt, policy=policy, max_new_tokens=1, eos_token_id=[])
    assert {1, 3} == set(output.trace["prompt_layers_run"][0])
    expected = sum(counted(call.lower()) for call in calls if call.name == PREFILL)
    assert output.ledger["flops"] == pytest.approx(expected, rel=TOLERANCE)
    assert Costs.of(lensed.network).direct[1].settle_flops == 2 * 48 * 2 * model.config.hidden_size


@pytest.mark.parametrize("batch", [1, 3])
def test_one_decode_step(model: Model, batch: int) -> None:
    """XLA counts a loop's body once and a conditional's both sides: the step is lowered by itself."""
    prefill, _ = run(model, batch, 128, new_tokens=1)
    both, calls = run(model, batch, 128, new_tokens=2)
    (chunk,) = [call for call in calls if call.name == "engine.decode.decode_chunk"]
    network, state, forced, controls = chunk.args
    step = jax.jit(decode_step)
    one = jax.ShapeDtypeStruct(forced.shape[1:], forced.dtype)
    expected = counted(step.lower(network, state, one, controls))
    assert both - prefill == pytest.approx(expected, rel=TOLERANCE)


def test_bytes_are_those_of_every_weight_a_step_reads(model: Model) -> None:
    network = model.network
    looked_up = ("position_embedding", "output_norm", *(() if network.lm_head is None else ("embedding",)))
    read = sum(a.nbytes for path, a in arrays_by_path(network).items() if not path.startswith(looked_up))
    assert Costs.of(network).step_bytes() == read
