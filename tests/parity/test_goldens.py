"""Float32 logits and greedy text equal Hugging Face's, as stored by make_goldens.py. Needs no torch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qs_jax.generation import generate
from qs_jax.loading import load
from qs_jax.models import arrays_by_path, network_from_arrays
from tests.parity.golden_models import LOGIT_TOLERANCE, first_that_differs, golden_of, load_model, logits, states
from tests.parity.variants import GOLDENS, NEW_TOKENS, REAL_MODELS, SAMPLING, STATE_POSITIONS, VARIANTS

_OF_EACH_ARCHITECTURE = (
    "gpt2_defaults",
    "llama_mqa_llama3_parameters",
    "mistral_no_window",
    "qwen2_window_unused",
)


_SLOW_BUT_FOR_THOSE = [
    pytest.param(name, marks=() if name in _OF_EACH_ARCHITECTURE else pytest.mark.slow) for name in VARIANTS
]


@pytest.fixture(params=[*VARIANTS, *REAL_MODELS])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, request: pytest.FixtureRequest) -> Path:
    if name in VARIANTS:
        return GOLDENS / name
    return request.getfixturevalue("data_dir") / "models" / name


def test_logits_of_a_long_prompt(name: str, folder: Path) -> None:
    golden = golden_of(name)
    ours = logits(load_model(folder), golden["prompt"])[golden["positions"]]
    np.testing.assert_allclose(ours, golden["logits"], rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", _SLOW_BUT_FOR_THOSE)
def test_states_after_every_layer(name: str) -> None:
    """A failure names the first layer that differs."""
    model, golden = load_model(GOLDENS / name), load_file(GOLDENS / "states.safetensors")[name]
    ours = states(model, golden_of(name)["prompt"])[:, STATE_POSITIONS]
    assert first_that_differs(ours, golden, model.config.model_type) is None


@pytest.mark.parametrize(
    ("name", "path", "layer"),
    [
        ("gpt2_defaults", "position_embedding.table", "embedding"),
        ("mistral_no_window", "blocks.1.v.kernel", "layer 2"),
        ("llama_mqa_llama3_parameters", "blocks.0.input_norm.scale", "layer 1"),
        ("qwen2_window_unused", "blocks.1.down.kernel", "layer 2"),
    ],
)
def test_a_fault_is_named_by_its_layer(name: str, path: str, layer: str) -> None:
    """Weights that are off by a thousandth, as by a slip of bfloat16, are no rounding."""
    model, golden = load_model(GOLDENS / name), load_file(GOLDENS / "states.safetensors")[name]
    arrays = arrays_by_path(model.network)
    network = network_from_arrays(model.config, {**arrays, path: arrays[path] * 1.001}, dtype=model.dtype)
    ours = states(replace(model, network=network), golden_of(name)["prompt"])[:, STATE_POSITIONS]
    assert first_that_differs(ours, golden, model.config.model_type) == layer


@pytest.mark.parametrize("name", [*_SLOW_BUT_FOR_THOSE, *REAL_MODELS])
def test_greedy_tokens(name: str, folder: Path) -> None:
    golden = golden_of(name)
    # the random models have an end-of-text id as well, and pass over it here: the goldens did
    eos = [] if name in VARIANTS else None
    prompt = golden["greedy_prompt"].tolist()
    output = generate(load_model(folder), [prompt], max_new_tokens=NEW_TOKENS, eos_token_id=eos)
    assert output.tokens == [golden["greedy_tokens"].tolist()]


@pytest.mark.parametrize("name", ["gpt2_defaults", "llama_gqa_llama3_scaling"])
def test_bfloat16_agrees_loosely(name: str) -> None:
    golden = golden_of(name)
    model = load(GOLDENS / name, dtype="bfloat16", compilation_cache=False)
    error = np.abs(logits(model, golden["prompt"])[golden["positions"]] - golden["logits"])
    # eight bits of mantissa: not equal, and not another model either (the logits' deviation is about 2)
    assert LOGIT_TOLERANCE < error.mean() < 0.05


def test_goldens_folder_holds_the_tables_and_nothing_else() -> None:
    files = {f"{name}.safetensors" for name in REAL_MODELS} | {"sampling.safetensors", "sampling.json"}
    files |= {"states.safetensors"}
    assert {path.name for path in GOLDENS.iterdir()} == {*VARIANTS, *files}
    for name, variant in VARIANTS.items():
        assert {path.name for path in (GOLDENS / name).iterdir()} == {
            "config.json",
            "model.safetensors",
            "golden.safetensors",
        }
        assert json.loads((GOLDENS / name / "config.json").read_text(encoding="utf-8")) == variant.config
    assert json.loads((GOLDENS / "sampling.json").read_text(encoding="utf-8")) == SAMPLING


def test_goldens_are_small() -> None:
    sizes = [path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()]
    assert max(sizes) < 400_000
    assert sum(sizes) < 4_000_000
