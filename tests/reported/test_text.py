"""Text in and out: stop strings and special tokens, terminals that cannot show a character, extreme settings."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qs_jax
import qs_jax.cli
from qs_jax.cli import unescape
from qs_jax.errors import GenerationError
from tests.reported.folders import LLAMA, bytes_tokenizer, write
from tests.reported.test_code_is_never_run import RUN
from tests.tiny import tiny_model

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 320


def write_chain(folder: Path, text: str) -> Path:
    """A model that writes the text round and round: each token's logits point to the next, no layer adds anything."""
    tokenizer = bytes_tokenizer(*SPECIAL)
    identity = np.eye(VOCABULARY, dtype=np.float32)
    head, chain = np.zeros_like(identity), tokenizer.encode(text).ids
    head[chain[1:] + chain[:1], chain] = 1.0
    weights = {"model.embed_tokens.weight": identity, "lm_head.weight": head, "model.norm.weight": identity.sum(axis=0)}
    shapes = {"q_proj": (VOCABULARY, VOCABULARY), "k_proj": (80, VOCABULARY), "v_proj": (80, VOCABULARY)}
    for name, shape in {**shapes, "o_proj": (VOCABULARY, VOCABULARY)}.items():
        weights[f"model.layers.0.self_attn.{name}.weight"] = np.zeros(shape, np.float32)
    for name, shape in {"gate": (8, VOCABULARY), "up": (8, VOCABULARY), "down": (VOCABULARY, 8)}.items():
        weights[f"model.layers.0.mlp.{name}_proj.weight"] = np.zeros(shape, np.float32)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"model.layers.0.{name}.weight"] = identity.sum(axis=0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": VOCABULARY, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "eos_token_id": 256, "bos_token_id": None}
    write(folder, {**LLAMA, **sizes, **heads}, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chain(tmp_path_factory.mktemp("chain") / "hf", "abc<|im_end|>\nxyz")


STOPS = {
    # vllm-project/vllm issue 2123: a special token as a stop string never matched
    "a special token": (["<|im_end|>"], 3, "bc"),
    "text and a special token": (["c<|im_end|>"], 3, "bc"),
    # mzau/mlx-knife issue 68: a stop string over several tokens was not seen
    "text over several tokens": (["\nxy"], 6, "bc\nxy"),
    "several": (["zz", "y", "\nxy"], 6, "bc\nxy"),
    "one that begins in the prompt": (["ab"], 1, "b"),
    "one that begins two tokens before": (["~abc<"], 3, "bc"),
    "one that stands in the prompt": (["~a"], 12, "bc\nxyzabc\n"),
}
"""Stop strings, the tokens that transformers makes of the chain until then, and their text without special tokens."""


@pytest.mark.parametrize("name", STOPS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_string_ends_a_row_where_transformers_ends_it(folder: Path, name: str, streaming: bool) -> None:
    stops, length, text = STOPS[name]
    model = qs_jax.load(folder, compilation_cache=False)
    settings = {"max_new_tokens": 12, "stop_strings": stops}
    if streaming:
        pieces = list(qs_jax.stream(model, "~a", **settings))
        assert "".join(piece.text for piece in pieces) == text
        assert sum(len(piece.tokens) for piece in pieces) == length
        reason = pieces[-1].finish_reason
    else:
        output = qs_jax.generate(model, "~a", **settings)
        assert (output.texts, output.lengths) == ([text], [length])
        reason = output.finish_reasons[0]
    assert reason == ("length" if length == 12 else "stop_string")


def test_escapes_of_a_stop_string(folder: Path) -> None:
    """ggml-org/llama.cpp pull 1311: a shell's backslash and n never matched a line break."""
    assert unescape(r"\n\t\r\\n\u00e9") == "\n\t\r\\n\u00e9"
    assert unescape(r"\end{x} \u12 \x41") == r"\end{x} \u12 \x41"
    assert unescape(r"\ud83d\ude42") == "\U0001f642"
    with pytest.raises(GenerationError, match="half a character"):
        unescape(r"\ud83d")
    arguments = ["generate", str(folder), "--prompt", "a", "--stop", r"\nx", "--json"]
    result = CliRunner().invoke(qs_jax.cli.app, arguments)
    assert json.loads(result.stdout)["texts"] == ["bc\nx"]


@pytest.mark.parametrize(
    ("typed", "read"), [("a", "a"), ("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a \n", "a ")]
)
def test_one_line_break_at_the_end_of_a_prompt_is_not_meant(folder: Path, typed: str, read: str) -> None:
    """ggml-org/llama.cpp issue 1444 and rustformers/llm issue 60 want opposite things; llama.cpp takes one off."""
    model = qs_jax.load(folder, compilation_cache=False)
    result = CliRunner().invoke(
        qs_jax.cli.app,
        ["generate", str(folder), "--prompt", "-", "--max-new-tokens", "4", "--json"],
        input=typed.encode(),
    )
    assert json.loads(result.stdout)["tokens"] == qs_jax.generate(model, read, max_new_tokens=4).tokens


@pytest.mark.parametrize("json_too", [False, True])
def test_a_terminal_that_cannot_show_a_character_ends_nothing(tmp_path: Path, json_too: bool) -> None:
    """openai/gpt-2 issue 52: a long dash ended the program on a Windows terminal, and the text was lost."""
    folder = write_chain(tmp_path / "h\u00e9", "a\u2014\u00e9b")
    command = [sys.executable, "-c", RUN, "generate", str(folder), "--prompt", "a", "--max-new-tokens", "6"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "JAX_PLATFORMS": "cpu"}
    command += ["--json"] if json_too else []
    done = subprocess.run(command, capture_output=True, timeout=120, env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    shown = done.stdout.decode("ascii")
    assert (json.loads(shown)["texts"][0] if json_too else shown) == ("\u2014\u00e9b" if json_too else "a??b\n")


EXTREMES = [{"temperature": value} for value in (1e-40, 1e-300, 5e-324, 1e30, float("nan"), float("inf"))]
EXTREMES += [{"repetition_penalty": value} for value in (1e-40, 1e40, 0.0, float("nan"))]


@pytest.mark.parametrize("settings", EXTREMES, ids=str)
def test_settings_that_float32_cannot_follow_are_refused(settings: Any) -> None:
    """ohdearquant/lattice issue 295: a temperature that is no number went through and gave low ids."""
    with pytest.raises(GenerationError, match="expected a number from"):
        qs_jax.generate(tiny_model("llama"), [[1, 2, 3]], do_sample=True, **settings)


@pytest.mark.parametrize("temperature", [1e-10, 1e-5, 1e10])
@pytest.mark.parametrize("penalty", [1e-10, 1e10])
def test_settings_at_their_limits_choose_a_token(temperature: float, penalty: float) -> None:
    """vllm-project/vllm issue 22180: small temperatures overflowed, and the softmax of that was NaN."""
    settings = {"temperature": temperature, "repetition_penalty": penalty, "top_p": 1e-40, "top_k": 3, "min_p": 1.0}
    output = qs_jax.generate(tiny_model("llama"), [[1, 2, 3]], max_new_tokens=8, do_sample=True, seed=0, **settings)
    assert (output.lengths, output.finish_reasons) == ([8], ["length"])
    assert np.isfinite(output.logprobs).all()


def test_a_small_temperature_is_greedy() -> None:
    model = tiny_model("llama")
    cold = qs_jax.generate(model, [[1, 2, 3]], max_new_tokens=8, do_sample=True, temperature=1e-10, seed=0)
    assert cold.tokens == qs_jax.generate(model, [[1, 2, 3]], max_new_tokens=8).tokens
