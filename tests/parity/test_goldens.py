"""Float32 logits and greedy text equal Hugging Face's, as stored by make_goldens.py. Needs no torch."""

import json
from pathlib import Path

import numpy as np
import pytest

from qs_jax.generation import generate
from qs_jax.loading import load
from tests.parity.golden_models import LOGIT_TOLERANCE, golden_of, load_model, logits
from tests.parity.variants import GOLDENS, NEW_TOKENS, REAL_MODELS, SAMPLING, VARIANTS


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
