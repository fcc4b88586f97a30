"""The pure parts of what measures the reference models: windows, bytes, per-layer statistics, the card."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.plots import Panel, draw
from qs_jax.model import Model
from qs_jax.models import forward
from reference_models.card import card, loss_panels, moving_average
from reference_models.held_out import packed, token_bytes, total_nats, windows
from reference_models.layer_convergence import layer_statistics, settled_from, summarise
from reference_models.tokens import train_tokenizer
from tests.tiny import tiny_model

STREAM = np.random.default_rng(0).integers(0, 97, 70).astype(np.int32)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model("gpt2")


def losses(model: Model, tokens: np.ndarray) -> np.ndarray:
    logprobs = jax.nn.log_softmax(jax.jit(forward)(model.network, jnp.asarray(tokens)[None])[0], axis=-1)
    return -np.asarray(logprobs)[np.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("length", [2, 7, 8, 9, 16, 17, 63, 64])
def test_every_token_but_the_first_counts_once(length: int) -> None:
    stream = np.arange(length)
    counted = np.concatenate([part[counts] for part, counts in windows(stream, 8)])
    assert sorted(counted.tolist()) == list(range(1, length))


def test_nats_are_the_forward_passs(model: Model) -> None:
    short = STREAM[:16]
    nats, count = total_nats(model.network, short, 16)
    assert (count, nats) == (15, pytest.approx(losses(model, short).sum(), rel=1e-5))


def test_a_later_window_scores_its_second_half(model: Model) -> None:
    nats, count = total_nats(model.network, STREAM[:24], 16)
    expected = losses(model, STREAM[:16]).sum() + losses(model, STREAM[8:24])[7:].sum()
    assert (count, nats) == (23, pytest.approx(expected, rel=1e-5))


def test_bytes_are_those_of_the_text(tmp_path: Path) -> None:
    documents = ("naïve 日本語", "plain text", "🙂")
    train_tokenizer(documents, vocab_size=270).save(str(tmp_path / "tokenizer.json"))
    stream, size = packed(tmp_path / "tokenizer.json", documents)
    assert size == sum(len(document.encode()) for document in documents)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert token_bytes(tokenizer, int(stream[0])) == 0
    assert (stream == 0).sum() == len(documents)


def test_the_last_layer_agrees_with_itself(model: Model) -> None:
    tokens = STREAM[:32]
    stats = jax.tree.map(np.asarray, layer_statistics(model.network, jnp.asarray(tokens)[None]))
    np.testing.assert_allclose(stats["nats"][-1], losses(model, tokens), rtol=1e-4)
    np.testing.assert_allclose(stats["cosine"][-1], 1, rtol=1e-5)
    assert stats["final"][-1].all()
    result = summarise(stats)
    last = result["rows"][-1]
    assert last["lens_perplexity"] == pytest.approx(math.exp(losses(model, tokens).mean()), rel=1e-4)
    assert 1 <= result["oracle_layers_mean"] <= 2


def test_settled_means_final_from_here_on() -> None:
    final = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)
    assert settled_from(final).tolist() == [[False, False, True], [False, True, True], [True, True, True]]
    zeros = np.zeros((3, 3))
    result = summarise({"final": final, "drift": zeros, "cosine": zeros, "nats": zeros})
    assert result["oracle_layers_mean"] == pytest.approx((3 + 2 + 1) / 3)


RECORD = {
    "hardware": "an abacus",
    "best": {"step": 6, "tokens": 1_500_000, "seconds": 5400.0, "best": 4.0},
    "recipe": {
        "mixture": {"c4": 0.25, "novels": 0.75},
        "peak_learning_rate": 0.001,
        "final_learning_rate": 0.1,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    },
    "training": {"step": [1, 2, 3], "tokens": [10, 20, 30], "loss": [9.0, 8.0, 7.0]},
    "validation": {"step": [3], "tokens": [30], "mean": [7.5], "c4": [7.0], "novels": [8.0]},
}


def test_the_card_says_what_was_measured(model: Model) -> None:
    row = {"slice": "c4", "note": "the last 9 of 10", "tokens": 1234, "perplexity": 56.78, "bits_per_byte": 1.5}
    text = card(model, 12_345_678, RECORD, [row])
    for fact in ("12.3 M", "an abacus", "step 6", "1.50 M tokens", "1.50 hours", "c4 25%", "| 1,234 | 56.78 | 1.500 |"):
        assert fact in text
    assert "* c4: the last 9 of 10" in text


def test_the_loss_curve_is_drawn(tmp_path: Path) -> None:
    panels = loss_panels(RECORD)
    assert panels[0].lines["mean of 15"][1] == pytest.approx([8.0])
    assert set(panels[1].lines) == {"c4", "novels"}
    path = draw([*panels, Panel("", "", "", {"a": ([1], [1])}, log_x=True, log_y=True)], tmp_path / "new" / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_moving_average_is_of_neighbours() -> None:
    assert moving_average([1.0, 2.0, 3.0, 4.0], 2) == pytest.approx([1.5, 2.5, 3.5])
