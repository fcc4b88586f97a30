"""Live comparison with Hugging Face transformers on torch, so that the goldens cannot go stale. CI runs it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.mapping import to_hugging_face
from qs_jax.models import arrays_by_path, network_from_arrays, parse_config, random_network
from tests.parity.golden_models import (
    LOGIT_TOLERANCE,
    first_that_differs,
    forward_jit,
    golden_of,
    load_model,
    logits,
    states,
)
from tests.parity.variants import GOLDENS, VARIANTS

pytest.importorskip("torch", reason="torch is not installed: pip install 'qs_jax[parity]'")

from tests.parity.make_goldens import load_reference, reference_logits, reference_states, write_variant

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", ["gpt2_gelu_unscaled", "llama_mqa_llama3_parameters"])
def test_all_logits_of_fresh_weights(name: str, tmp_path: Path) -> None:
    """Other weights than the goldens', and every position rather than some."""
    write_variant(tmp_path, dataclasses.replace(VARIANTS[name], seed=1234))
    prompt = np.random.default_rng(99).integers(0, VARIANTS[name].config["vocab_size"], 512).astype(np.int32)
    theirs = reference_logits(load_reference(tmp_path), prompt)
    np.testing.assert_allclose(logits(load_model(tmp_path), prompt), theirs, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_goldens_are_what_transformers_computes(name: str) -> None:
    golden = golden_of(name)
    theirs = reference_logits(load_reference(GOLDENS / name), golden["prompt"])[golden["positions"]]
    np.testing.assert_allclose(theirs, golden["logits"], rtol=0, atol=LOGIT_TOLERANCE / 4)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_leaves_what_transformers_layer_leaves(name: str) -> None:
    """At every position of a long prompt; a failure names the first layer that differs."""
    model, prompt = load_model(GOLDENS / name), golden_of(name)["prompt"]
    theirs = reference_states(load_reference(GOLDENS / name), prompt)
    assert len(theirs) == model.config.num_hidden_layers + 1
    assert first_that_differs(states(model, prompt), theirs, model.config.model_type) is None


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_what_we_export(name: str, tmp_path: Path) -> None:
    """Weights that never were Hugging Face's: a fault that import and export share would cancel out otherwise."""
    config = parse_config(VARIANTS[name].config, name)
    arrays = _shaken(arrays_by_path(random_network(config, seed=5)))
    network = network_from_arrays(config, arrays, dtype=np.float32)
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS[name].config), encoding="utf-8")
    save_file(to_hugging_face(arrays, config), tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompt = golden_of(name)["prompt"]
    theirs = reference_logits(load_reference(tmp_path), prompt)
    ours = np.asarray(forward_jit(network, jax.numpy.asarray(prompt)[None])[0])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)


def _shaken(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights with noise on all of them: a new network's biases are all zero and its scales one."""
    rng = np.random.default_rng(3)
    return {path: array + 0.3 * rng.standard_normal(array.shape, np.float32) for path, array in arrays.items()}
