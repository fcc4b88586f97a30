"""Live comparison with Hugging Face transformers on torch, so that the goldens cannot go stale. CI runs it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.parity.golden_models import LOGIT_TOLERANCE, golden_of, load_model, logits
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
