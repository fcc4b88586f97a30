"""Live comparison with Hugging Face transformers on torch, so that the goldens cannot go stale. CI runs it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from convert.mapping import to_hugging_face
from qs_jax.models import CausalLM, parse_config, random_network
from tests.parity.golden_models import LOGIT_TOLERANCE, forward_jit, golden_of, load_model, logits
from tests.parity.variants import GOLDENS, VARIANTS

pytest.importorskip("torch", reason="torch is not installed: pip install 'qs_jax[parity]'")

from tests.parity.make_goldens import load_reference, reference_logits, write_variant

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
def test_transformers_reads_what_we_export(name: str, tmp_path: Path) -> None:
    """Weights that never were Hugging Face's: a fault that import and export share would cancel out otherwise."""
    config = parse_config(VARIANTS[name].config, name)
    network = _shaken(random_network(config, seed=5))
    arrays = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(network))}
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS[name].config), encoding="utf-8")
    save_file(to_hugging_face(arrays, config), tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompt = golden_of(name)["prompt"]
    theirs = reference_logits(load_reference(tmp_path), prompt)
    ours = np.asarray(forward_jit(network, prompt[None])[0])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)


def _shaken(network: CausalLM) -> CausalLM:
    """The network with noise on every weight: the first biases are zero and the first scales one."""
    definition, state = nnx.split(network)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(definition, jax.tree.unflatten(tree, noisy))
