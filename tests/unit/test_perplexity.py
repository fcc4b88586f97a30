"""`qs-jax eval` on a small random model: right, causal, and unmoved by bad input."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.adaptive.policy import Fusion, Halting, Policy
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.loading import load
from qs_jax.models import forward
from tests.study import LETTERS, command, model_folder

random = np.random.default_rng(0)
TEXT = "".join(random.choice(list(LETTERS), 400))
PREFIX, WINDOW = 40, 10
CUT = ("--prefix", PREFIX, "--window", WINDOW, "--batch", 2, "--json", "--debug")

EVERYTHING = Policy(
    "everything",
    prompt_halting=Halting("random", 0.5, layers=(1,)),
    decode_halting=Halting("relative_drift", 3.0, layers=(1,)),
    kv_rule="drop",
    fusion=Fusion("cosine", 0.9, layers=(1,)),
    protect_last=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    model_folder(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    EVERYTHING.save(folder / "policy.json")
    return folder


def evaluated(folder: Path, *more: object, text: str | None = None) -> dict[str, Any]:
    file = folder / "text.txt"
    if text is not None:
        file = folder / "other.txt"
        file.write_text(text)
    status, result, errors = command("eval", folder / "model", "--text", file, *CUT, *more)
    assert status == 0, errors
    return result


def test_scores_are_those_of_the_plain_forward_pass(folder: Path) -> None:
    result = evaluated(folder)
    model = load(folder / "model", compilation_cache=False)
    windows = cut(model, [TEXT], Plan(PREFIX, WINDOW, batch=2))
    assert len(windows) == len(result["logprobs"]) == 8
    for window, logprobs in zip(windows, result["logprobs"], strict=True):
        tokens = [*window.prompt, *window.scored]
        logits = np.asarray(forward(model.network, jnp.asarray(tokens)[None]), np.float64)[0, PREFIX - 1 : -1]
        expected = logits[np.arange(WINDOW), window.scored] - np.log(np.exp(logits).sum(axis=-1))
        np.testing.assert_allclose(logprobs, expected, atol=2e-4)
    nll = -np.mean(result["logprobs"])
    assert result["perplexity"] == pytest.approx(np.exp(nll), rel=1e-4)
    assert result["tokens_scored"] == 80
    assert result["bits_per_byte"] == pytest.approx(nll * 80 / np.log(2) / sum(w.scored_bytes for w in windows))
    assert result["perplexity_increase_interval"] == [0, 0]
    assert result["ledger"]["flops_reduction"] == 0


def test_a_policy_is_set_beside_the_dense_model(folder: Path) -> None:
    result = evaluated(folder, "--policy", folder / "policy.json")
    dense = evaluated(folder)
    assert result["perplexity_off"] == dense["perplexity"] != result["perplexity"]
    low, high = result["perplexity_increase_interval"]
    assert low <= result["perplexity_increase"] <= high
    assert result["mechanisms"] == ["halting", "kv_skipping", "fusion"]
    assert result["ledger"]["flops_reduction"] > 0
    assert result["kl_nats"] > 0
    assert 0 <= result["top1_agreement"] < 1
    sample = result["samples"][0]
    assert "".join(sample["prompt"] + sample["text"]) == TEXT[: PREFIX + WINDOW - 1]
    assert {len(sample[key]) for key in ("prompt", "prompt_layers_run", "prompt_fused_with")} == {PREFIX}
    assert {len(sample[key]) for key in ("text", "layers_run", "bits", "logprobs")} == {WINDOW}


@pytest.mark.parametrize("protocol", ["prefix", "paper"])
def test_scrambling_what_follows_leaves_scores_before_it_unchanged(folder: Path, protocol: str) -> None:
    """Through the command itself, with every mechanism acting: token j of the window and all after it are others."""
    arguments = ("--policy", folder / "policy.json", "--max-tokens", 20)
    arguments += ("--prefix", 0, "--batch", 1) if protocol == "paper" else ()
    before = evaluated(folder, *arguments)
    start = before["protocol"]["prefix"] if protocol == "prefix" else 0
    for j in (1, 4, WINDOW - 1):
        place = start + j - 1  # the start token stands before the text
        scrambled = TEXT[:place] + "".join(chr(ord("a") + (ord(c) + 1) % 26) for c in TEXT[place:])
        after = evaluated(folder, *arguments, text=scrambled)
        assert after["logprobs"][0][:j] == before["logprobs"][0][:j]
        assert after["logprobs"][0][j] != before["logprobs"][0][j]


def test_batches_change_nothing(folder: Path) -> None:
    arguments = ("--policy", folder / "policy.json")
    alone = evaluated(folder, *arguments, "--batch", 1)
    np.testing.assert_allclose(alone["logprobs"], evaluated(folder, *arguments)["logprobs"], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--text", "nowhere.txt"), "no such file"),
        (("--documents", "a:b"), "expected a slice"),
        (("--documents", "5:"), "hold no text"),
        (("--prefix", 600), "longer than the model's context of 512"),
        (("--prefix", 400, "--window", 100), "give more text or smaller windows"),
        (("--max-tokens", 3), "max_tokens is 3"),
        (("--window", 0), "window is 0"),
        (("--batch", 0), "batch is 0"),
        (("--policy", "bold"), "expected one of off"),
        (("--policy", "nowhere.json"), "no such policy file"),
        (("--policy", "{folder}/deep.json"), "layers reach 9"),
        (("--policy", "{folder}/text.txt"), "cannot be read as JSON"),
    ],
)
def test_bad_requests_are_refused_in_one_line(folder: Path, arguments: tuple[object, ...], complaint: str) -> None:
    deep = {"format": 1, "prompt_halting": {"layers": [9]}}
    (folder / "deep.json").write_text(json.dumps(deep))
    given = [str(argument).format(folder=folder) for argument in arguments]
    text = () if "--text" in given else ("--text", folder / "text.txt")
    status, _, errors = command("eval", folder / "model", *text, "--prefix", PREFIX, "--window", WINDOW, *given)
    assert status == 2
    assert complaint in errors
    assert len(errors.strip().splitlines()) == 1
