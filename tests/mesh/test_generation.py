"""Whatever is asked for: eight devices give what one gives."""

from typing import Any

import pytest

from qs_jax.generation import generate
from tests.invariants.cases import (
    GPT2_DIRECT,
    GPT2_FROZEN,
    GPT2_SHALLOW,
    GPT2_ZERO,
    LLAMA_AFFINE,
    LLAMA_DROP,
    LLAMA_LADDER,
    Case,
    each,
    halfway,
)
from tests.mesh.models import MESHES, PROMPTS, assert_same, coded, divided, wide_model
from tests.tiny import SAMPLING

NEW = 12
BOTH_AXES = [MESHES[1], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[::2])]
"""The mesh that divides rows and layers, and slowly those that divide one of them."""

ARCHITECTURES = ("gpt2", "llama")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dense_text_is_that_of_one_device(name: str, mesh: str) -> None:
    """Rows that divide and rows that do not, greedy and sampled with a penalty."""
    model = wide_model(name)
    there = divided(model, mesh)
    for prompts, settings in ((PROMPTS, SAMPLING), (PROMPTS[:3], {})):
        asked: dict[str, Any] = {"max_new_tokens": NEW, **settings}
        assert_same(generate(there, prompts, **asked), generate(model, prompts, **asked))


@pytest.mark.parametrize("mesh", BOTH_AXES)
@each((LLAMA_DROP, GPT2_FROZEN, LLAMA_AFFINE), slow=(GPT2_ZERO, GPT2_DIRECT))
def test_policies_decide_as_on_one_device(case: Case, mesh: str) -> None:
    """Halting, fusion, rules for what halted tokens leave, and both lenses. Models whose heads do not divide by all
    meshes: those lie whole."""
    policy = halfway(case)
    asked: dict[str, Any] = {"max_new_tokens": NEW, "policy": policy}
    ours = generate(divided(case.model, mesh), PROMPTS, **asked)
    assert_same(ours, generate(case.model, PROMPTS, **asked))
    saved = [layers for row in ours.trace["prompt_layers_run"] for layers in row]
    assert min(saved) < case.model.config.num_hidden_layers


@pytest.mark.parametrize("mesh", BOTH_AXES)
@each((LLAMA_LADDER,), slow=(GPT2_SHALLOW,))
def test_codes_of_mixed_precision(case: Case, mesh: str) -> None:
    asked: dict[str, Any] = {"max_new_tokens": NEW, "policy": halfway(case)}
    assert_same(generate(divided(case.model, mesh), PROMPTS, **asked), generate(case.model, PROMPTS, **asked))


@pytest.mark.parametrize("mesh", BOTH_AXES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_codes_that_are_divided_by_groups(name: str, mesh: str) -> None:
    model = coded(wide_model(name))
    there = divided(model, mesh)
    for bits in (None, 4):
        asked: dict[str, Any] = {"max_new_tokens": NEW, "bits": bits}
        assert_same(generate(there, PROMPTS, **asked), generate(model, PROMPTS, **asked))


@pytest.mark.parametrize("mesh", BOTH_AXES)
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("draft", ["lookup", pytest.param(["lookup", "bits:4"], marks=pytest.mark.slow)])
def test_exact_mode_accepts_what_it_accepts_on_one_device(name: str, draft: Any, mesh: str) -> None:
    model = coded(wide_model(name), keep_dense=True)
    repetitive = [prompt[:8] * 4 for prompt in PROMPTS]
    asked: dict[str, Any] = {"max_new_tokens": NEW, "exact": True, "draft": draft}
    ours = generate(divided(model, mesh), repetitive, **asked)
    assert_same(ours, generate(model, repetitive, **asked))
    assert ours.tokens == generate(model, repetitive, max_new_tokens=NEW).tokens


@pytest.mark.parametrize("mesh", BOTH_AXES)
def test_a_long_prompt_and_text_that_outgrows_its_cache(mesh: str) -> None:
    """Queries in blocks, rows that are done and dropped, several sequences a prompt."""
    model = wide_model("llama")
    prompts = [list(range(90)) * 3, list(range(20))]
    asked: dict[str, Any] = {"max_new_tokens": 100, "num_return_sequences": 4, "do_sample": True, "seed": 1}
    asked |= {"eos_token_id": list(range(8))}
    assert_same(generate(divided(model, mesh), prompts, **asked), generate(model, prompts, **asked))
