"""The models that ship with the project, as transformers reads them and as we do. CI runs it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.loading import load
from qs_jax.models import forward
from tests.parity.golden_models import load_model, logits

pytest.importorskip("torch", reason="torch is not installed: pip install 'qs_jax[parity]'")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.parity.make_goldens import load_reference, reference_logits

pytestmark = pytest.mark.parity

FOLDERS = [Path(__file__).parents[2] / "reference_models" / name for name in ("gpt2", "llama")]
PROMPT = np.random.default_rng(7).integers(0, 8192, 500).astype(np.int32)
FLOAT32_TOLERANCE = 1e-3
"""Largest absolute difference of any logit that the project promises."""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_float32_logits_are_those_of_transformers(folder: Path) -> None:
    theirs = reference_logits(load_reference(folder), PROMPT)
    np.testing.assert_allclose(logits(load_model(folder), PROMPT), theirs, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_bfloat16_is_as_close_to_float32_as_transformers_bfloat16(folder: Path) -> None:
    """Two roundings of one computation differ from each other; neither may be further from the truth."""
    exact = logits(load_model(folder), PROMPT)
    model = load(folder, dtype="bfloat16", compilation_cache=False)
    ours = np.asarray(jax.jit(forward)(model.network, jnp.asarray(PROMPT)[None])[0])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs = reference(torch.tensor(PROMPT[None], dtype=torch.long)).logits[0].float().numpy()
    our_error, their_error = (np.sqrt(np.square(x - exact).mean()) for x in (ours, theirs))
    assert our_error < 1.25 * their_error
    assert their_error < 0.02 * exact.std()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_tokenizer_is_transformers_own(folder: Path) -> None:
    text = "Once upon a time, naïve Lily found 3 “balls”.\n\n\tThe end 🙂"
    ours = load_model(folder).tokenizer
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours is not None
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == text
