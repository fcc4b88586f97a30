"""`generation_config.json`: what a call leaves out is taken from it, as Hugging Face's `generate` does."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import qs_jax
import qs_jax.cli
from qs_jax.errors import GenerationError
from qs_jax.model import Model
from tests.folders import write_folder
from tests.reported.folders import NEW_TOKENS, PROMPT, llama

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 4096, "max_new_tokens": 3}
"""What chat models' folders say."""


def model(folder: Path, **said: Any) -> Model:
    """A model whose folder says so."""
    if not folder.exists():
        write_folder(folder, "llama", tokenizer=True)
    (folder / "generation_config.json").write_text(json.dumps(said))
    return qs_jax.load(folder, compilation_cache=False)


def run(folder: Path, *arguments: object) -> tuple[int, Any, str]:
    result = CliRunner().invoke(qs_jax.cli.app, ["generate", str(folder), "--prompt", "Hi", *map(str, arguments)])
    return result.exit_code, json.loads(result.stdout) if "--json" in arguments else result.stdout, result.stderr


def test_what_a_call_leaves_out_is_taken_field_by_field_and_lengths_never(tmp_path: Path) -> None:
    """Blaizzy/mlx-vlm pull 1337: the file was not read at all, so a chat model ran greedily into repetitions."""
    chat = model(tmp_path / "hf", **SAMPLED)
    taken = qs_jax.generate(chat, "Hi", max_new_tokens=20, seed=3)
    asked = {name: SAMPLED[name] for name in ("do_sample", "temperature", "top_p", "top_k")}
    assert (
        taken.tokens == qs_jax.generate(chat, "Hi", max_new_tokens=20, seed=3, use_model_defaults=False, **asked).tokens
    )
    assert taken.settings["from_generation_config"] == ["do_sample", "temperature", "top_k", "top_p"]
    assert taken.lengths == [20]
    own = qs_jax.generate(chat, "Hi", max_new_tokens=20, seed=3, temperature=1.7)
    assert (own.settings["temperature"], own.settings["top_p"]) == (1.7, 0.9)
    assert qs_jax.generate(chat, "Hi", seed=3).lengths == [128]


def test_greedy_calls_stay_greedy(tmp_path: Path) -> None:
    """huggingface/transformers issue 29988: a temperature beside greedy decoding was an error."""
    chat = model(tmp_path / "hf", **SAMPLED)
    greedy = qs_jax.generate(chat, "Hi", max_new_tokens=9, do_sample=False)
    assert greedy.tokens == qs_jax.generate(chat, "Hi", max_new_tokens=9, use_model_defaults=False).tokens
    assert greedy.settings["from_generation_config"] == []
    halfway = model(tmp_path / "hf", temperature=0.6, top_p=0.9)
    assert qs_jax.generate(halfway, "Hi", max_new_tokens=9).tokens == greedy.tokens
    sampled = qs_jax.generate(halfway, "Hi", max_new_tokens=9, do_sample=True, seed=1)
    assert (sampled.settings["temperature"], sampled.settings["top_p"]) == (0.6, 0.9)


def test_a_penalty_counts_for_greedy_decoding_too_and_is_shown(tmp_path: Path) -> None:
    """verl-project/verl pull 7298: a checkpoint's penalty was inherited silently."""
    write_folder(tmp_path / "hf", "llama", tokenizer=True)
    model(tmp_path / "hf", repetition_penalty=1.3)
    status, printed, _ = run(tmp_path / "hf", "--max-new-tokens", 9, "--json")
    assert (status, printed["settings"]["repetition_penalty"]) == (0, 1.3)
    assert printed["settings"]["from_generation_config"] == ["repetition_penalty"]
    status, _, told = run(tmp_path / "hf", "--max-new-tokens", 9)
    assert "greedy, repetition_penalty 1.3 (generation_config.json: repetition_penalty)\n" in told
    status, ignored, _ = run(tmp_path / "hf", "--max-new-tokens", 9, "--no-generation-config", "--json")
    assert (ignored["settings"]["repetition_penalty"], ignored["settings"]["from_generation_config"]) == (1.0, [])
    assert ignored["tokens"] != printed["tokens"]


def test_the_command_line_samples_when_the_file_says_so(tmp_path: Path) -> None:
    """vllm-project/vllm issue 15241: such defaults surprise, so they are said, and `--temperature 0` is greedy."""
    model(tmp_path / "hf", **SAMPLED)
    status, printed, _ = run(tmp_path / "hf", "--max-new-tokens", 9, "--seed", 5, "--json")
    assert (status, printed["settings"]["do_sample"], printed["settings"]["top_k"]) == (0, True, 20)
    status, printed, _ = run(tmp_path / "hf", "--max-new-tokens", 9, "--temperature", 0, "--json")
    assert (status, printed["settings"]["do_sample"], printed["settings"]["temperature"]) == (0, False, 1.0)


def test_ends_of_text_are_the_files_unless_it_is_ignored(tmp_path: Path) -> None:
    llama()(tmp_path / "hf")
    chat = model(tmp_path / "hf", eos_token_id=[64, 999, -1], pad_token_id=-1)
    assert qs_jax.generate(chat, [[3, 4]], max_new_tokens=4).settings["eos_token_id"] == [64]
    assert qs_jax.generate(chat, [[3, 4]], max_new_tokens=4).settings["pad_token_id"] == 64
    assert qs_jax.generate(chat, [[3, 4]], use_model_defaults=False).settings["eos_token_id"] == [2]
    assert any("[64, 999, -1], which no token has" in note for note in chat.notes)


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": 0.0},
        {"top_p": 7},
        {"top_k": "many"},
        {"repetition_penalty": [1]},
        {"do_sample": "true"},
        {"eos_token_id": 9.0},
        {"pad_token_id": "x"},
    ],
)
def test_a_value_of_the_file_that_cannot_be_is_said_to_be_the_files(tmp_path: Path, said: dict[str, Any]) -> None:
    chat = model(tmp_path / "hf", **{"do_sample": True, **said})
    with pytest.raises(GenerationError, match=r"generation_config\.json of the model: .*--no-generation-config"):
        qs_jax.generate(chat, "Hi", max_new_tokens=2)
    assert qs_jax.generate(chat, "Hi", max_new_tokens=2, use_model_defaults=False).lengths == [2]
    with pytest.raises(GenerationError, match=r"^min_p is 5"):
        qs_jax.generate(chat, "Hi", do_sample=True, min_p=5)


def test_what_older_folders_say_in_config_json_counts_without_the_file(tmp_path: Path) -> None:
    llama(repetition_penalty=1.5)(tmp_path / "old")
    old = qs_jax.load(tmp_path / "old", compilation_cache=False)
    assert qs_jax.generate(old, [PROMPT], max_new_tokens=NEW_TOKENS).settings["repetition_penalty"] == 1.5
    newer = model(tmp_path / "old")
    assert qs_jax.generate(newer, [PROMPT], max_new_tokens=NEW_TOKENS).settings["repetition_penalty"] == 1.0


def test_what_is_not_implemented_is_said(tmp_path: Path) -> None:
    """ggml-org/llama.cpp discussion 24024: settings of the file had no effect, and nobody was told."""
    llama()(tmp_path / "hf")
    quiet = model(tmp_path / "hf", eos_token_id=2, num_beams=1, no_repeat_ngram_size=0, suppress_tokens=None)
    assert quiet.notes == ()
    told = model(tmp_path / "hf", eos_token_id=2, num_beams=4, suppress_tokens=[64], _from_model_config=True)
    assert [note.split(": ")[1].split(" is")[0] for note in told.notes] == [
        "num_beams=4",
        "suppress_tokens=[64]",
    ]
    ends = model(tmp_path / "hf", do_sample=False)
    assert any("names no eos_token_id; that of config.json, 2, ends a text" in note for note in ends.notes)


@pytest.mark.slow
def test_studies_never_use_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a study of how models behave. " * 20)
    commands = {
        "eval": ("--text", text, "--prefix", 16, "--window", 8, "--max-tokens", 16),
        "bench": ("--prompt-tokens", 4, "--new-tokens", 2),
    }
    for name, options in commands.items():
        printed = []
        for said in ({}, {**SAMPLED, "repetition_penalty": 1.9, "eos_token_id": list(range(90))}):
            folder = tmp_path / f"{name}{len(said)}"
            write_folder(folder, "llama", tokenizer=True, bos_token_id=95)
            (folder / "generation_config.json").write_text(json.dumps(said))
            arguments = [name, str(folder), *map(str, options), "--json"]
            result = CliRunner().invoke(qs_jax.cli.app, arguments)
            assert result.exit_code == 0, result.stderr
            printed.append(json.loads(result.stdout))
        for key in ("perplexity", "tokens_scored", "ledger"):
            assert printed[0].get(key) == printed[1].get(key)
