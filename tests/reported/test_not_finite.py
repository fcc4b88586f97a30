"""Logits that are NaN or infinite end their row with a reason, and the command says which dtype to use.

QwenLM/Qwen3 issue 761 and huggingface/transformers issue 33294: in float16 the output was nothing but exclamation
marks, the first token of the vocabulary, with success.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import qs_jax
import qs_jax.cli
from qs_jax.console import print_json
from qs_jax.model import Model
from tests.folders import write_folder
from tests.reported.folders import LLAMA, tensors, write
from tests.tiny import tiny_model

PROMPT = [3, 1, 4, 1, 5]


def write_large(folder: Path) -> Path:
    """A Llama whose last down projection puts out more than the 65,504 that float16 holds; its weights it holds."""
    weights = tensors("llama")
    down = weights["model.layers.1.mlp.down_proj.weight"]
    down *= 6e4 / np.abs(down).max()
    write(folder, {**LLAMA, "eos_token_id": None}, weights)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_large(tmp_path_factory.mktemp("large") / "hf")


def test_float16_ends_the_row_and_wider_floats_go_on(folder: Path) -> None:
    narrow = qs_jax.load(folder, dtype="float16", compilation_cache=False)
    output = qs_jax.generate(narrow, [PROMPT], max_new_tokens=8)
    assert (output.finish_reasons, output.tokens, output.logprobs) == (["not_finite"], [[]], [[]])
    for dtype in ("float32", "bfloat16"):
        wide = qs_jax.load(folder, dtype=dtype, compilation_cache=False)
        output = qs_jax.generate(wide, [PROMPT], max_new_tokens=8)
        assert (output.finish_reasons, output.lengths) == (["length"], [8])
        assert np.isfinite(output.logprobs).all()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 1, "repetition_penalty": 1.2}])
def test_sampling_and_streaming_end_it_too(folder: Path, settings: dict[str, Any]) -> None:
    """JustVugg/colibri issue 369: one NaN made sampling return the first token for ever."""
    model = qs_jax.load(folder, dtype="float16", compilation_cache=False)
    pieces = list(qs_jax.stream(model, [PROMPT], max_new_tokens=8, **settings))
    assert [(piece.text, piece.tokens, piece.finish_reason) for piece in pieces] == [("", [], "not_finite")]


def damaged(model: Model, token: int) -> Model:
    """The model, where one token's embedding is NaN, as after a bit flip."""
    model.network.embedding.table.set_value(model.network.embedding.table.get_value().at[token].set(np.nan))
    return model


def test_a_row_in_the_middle_of_its_text_ends_alone(tmp_path: Path) -> None:
    """vllm-project/vllm issue 53029: a row of NaN looked like an ordinary token. The others are what they are alone."""
    whole = tiny_model("llama")
    free = qs_jax.generate(whole, [PROMPT, [7, 8, 9]], max_new_tokens=40)
    only = next(token for token in free.tokens[0] if token not in {*free.tokens[1], *PROMPT, 7, 8, 9})
    broken = damaged(qs_jax.load(write_folder(tmp_path / "hf", "llama"), compilation_cache=False), only)
    output = qs_jax.generate(broken, [PROMPT, [7, 8, 9]], max_new_tokens=40)
    end = free.tokens[0].index(only) + 1
    assert output.finish_reasons == ["not_finite", "length"]
    assert output.tokens == [free.tokens[0][:end], free.tokens[1]]


def test_the_command_says_which_dtype_to_use_and_its_json_is_valid(tmp_path: Path) -> None:
    """dphnAI/sonar issue 183: a whole answer was lost in the JSON encoder for one number that JSON has not."""
    folder = write_folder(tmp_path / "hf", "llama", tokenizer=True)
    large = write_large(tmp_path / "large")
    (large / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    arguments = ["generate", str(large), "--prompt", "Hi", "--dtype", "float16"]
    result = CliRunner().invoke(qs_jax.cli.app, [*arguments, "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["finish_reasons"] == ["not_finite"]
    assert result.stderr.count("\n") == 1
    assert "finite in float16" in result.stderr
    assert "--dtype bfloat16 or float32" in result.stderr
    result = CliRunner().invoke(qs_jax.cli.app, arguments)
    assert (result.exit_code, result.stdout) == (2, "Hi\n")
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_numbers_that_json_has_not_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [1.0, float("nan"), (float("-inf"),)], "b": {"c": float("inf")}, "d": "é"})
    assert capsys.readouterr().out == '{"a": [1.0, null, [null]], "b": {"c": null}, "d": "\\u00e9"}\n'


@pytest.mark.parametrize("command", ["eval", "lens", "bench"])
@pytest.mark.slow
def test_studies_refuse_them_in_one_line(tmp_path: Path, command: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a study of how models behave. " * 300)
    folder = write_folder(tmp_path / "hf", "llama", tokenizer=True)
    large = write_large(tmp_path / "large")
    (large / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "bos_token_id": 95}))
    options = {
        "eval": ["--text", str(text), "--prefix", "8", "--window", "8", "--max-tokens", "16"],
        "lens": ["--text", str(text)],
        "bench": ["--prompt-tokens", "8", "--new-tokens", "4"],
    }
    arguments = [command, str(large), *options[command], "--dtype", "float16", "--json"]
    result = CliRunner().invoke(qs_jax.cli.app, arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert "float16" in result.stderr
    assert sorted(path.name for path in large.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
