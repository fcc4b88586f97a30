"""The command line's contract: JSON keys, one-line errors, exit status, text on stdout and the rest on stderr."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import qs_jax.cli
from qs_jax.generation import generate
from tests.folders import write_folder
from tests.tiny import tiny_model

PROMPT = "Once upon a time"

LEDGER = {
    "flops",
    "flops_off",
    "flops_reduction",
    "weight_bytes",
    "weight_bytes_off",
    "bytes_reduction",
    "kv_slots",
    "kv_slots_off",
    "probe_flops",
    "layers_run_mean",
    "bits_mean",
}
GENERATE = {"texts", "tokens", "finish_reasons", "layers_run", "ledger", "timing"}
BENCH = {
    "tokens_per_second",
    "decode_ms_per_step",
    "prefill_s",
    "compile_s",
    "bandwidth_gb_s",
    "bandwidth_fraction",
    "peak_rss_mb",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", "llama", tokenizer=True)


def run(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(qs_jax.cli.app, [str(argument) for argument in arguments], input=stdin)


def payload(result: Result) -> dict[str, Any]:
    """The one JSON object on stdout of a command that went well."""
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1), result.stderr
    return json.loads(result.stdout)


def test_exact_mode_prints_the_same_text_and_what_became_of_drafts(folder: Path) -> None:
    asked = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 40)
    plain, exact = (payload(run(*asked, *more, "--json")) for more in ((), ("--exact", "--draft", "lookup")))
    assert exact["tokens"] == plain["tokens"]
    by_round = {"drafted_by_round", "accepted_by_round", "draft_by_round"}
    by_token = {"from_draft", "in_round"}
    assert set(exact) - set(plain) == {"rounds", "drafted", "accepted"} | by_round | by_token
    assert set(exact["timing"]) - set(plain["timing"]) == {"rounds", "drafted", "accepted", "fallback"}
    assert sum(exact["accepted_by_round"][0]) == exact["accepted"][0] == exact["timing"]["accepted"]
    assert exact["rounds"][0] + exact["accepted"][0] >= 39
    assert exact["settings"]["draft"] == ["lookup"]
    assert exact["draft_by_round"] == [["lookup"] * exact["rounds"][0]]
    streamed = run(*asked, "--exact", "--draft", "lookup")
    assert streamed.stdout == PROMPT + plain["texts"][0] + "\n"
    figures = exact["timing"]
    assert f"{figures['accepted']} of {figures['drafted']} drafts right, 0 plain steps" in streamed.stderr


def test_what_it_prints_is_a_page(folder: Path, tmp_path: Path) -> None:
    asked = ("--chat", "--prompt", PROMPT, "--prompt", "Hi", "--num-return-sequences", 2, "--seed", 1)
    exact = run("generate", folder, *asked, "--exact", "--json")
    printed = payload(exact)
    assert printed["prompts"] == [PROMPT, "Hi"]
    assert ["".join(pieces) for pieces in printed["pieces"]] == printed["texts"]
    (tmp_path / "text.json").write_text(exact.stdout)
    assert run("report", tmp_path / "text.json", "--out", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").read_text("utf-8").count('title="prompt"') == 4


def test_generate_as_json(folder: Path) -> None:
    printed = payload(run("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 40, "--json"))
    assert set(printed) >= GENERATE
    assert set(printed["ledger"]) >= LEDGER
    expected = generate(tiny_model("llama", tokenizer=True), [PROMPT], max_new_tokens=40)
    assert (printed["texts"], printed["tokens"]) == (expected.texts, expected.tokens)
    assert printed["layers_run"] == [[2] * 40]
    assert printed["finish_reasons"] == ["length"]


def test_generate_as_text_streams_the_same(folder: Path) -> None:
    result = run("generate", folder, "--prompt", "-", "--max-new-tokens", 40, stdin=PROMPT)
    expected = generate(tiny_model("llama", tokenizer=True), [PROMPT], max_new_tokens=40)
    assert (result.exit_code, result.stdout) == (0, f"{PROMPT}{expected.texts[0]}\n")
    assert "tokens/s" in result.stderr


def test_sampling_options_and_chat_reach_the_engine(folder: Path) -> None:
    arguments = ("--chat", "--num-return-sequences", 3, "--temperature", 1.2, "--top-p", 0.9, "--seed", 7, "--json")
    printed = payload(run("generate", folder, "--prompt", "Hi", "--max-new-tokens", 20, *arguments))
    messages = [{"role": "user", "content": "Hi"}]
    settings: dict[str, Any] = {"num_return_sequences": 3, "temperature": 1.2, "top_p": 0.9, "seed": 7}
    model = tiny_model("llama", tokenizer=True)
    expected = generate(model, messages, max_new_tokens=20, do_sample=True, **settings)
    assert (printed["tokens"], printed["seeds"]) == (expected.tokens, [7, 7, 7])
    zero = payload(run("generate", folder, "--prompt", "Hi", "--max-new-tokens", 20, "--temperature", 0, "--json"))
    assert zero["tokens"] == generate(model, "Hi", max_new_tokens=20).tokens


def test_bench_as_json(folder: Path) -> None:
    printed = payload(run("bench", folder, "--prompt-tokens", 16, "--new-tokens", 40, "--batch", 3, "--json"))
    assert set(printed) >= BENCH
    assert set(printed["ledger"]) >= LEDGER
    assert printed["tokens_per_second"] == pytest.approx(3e3 / printed["decode_ms_per_step"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", "x", "--max-new-tokens", 5000), "context of 512"),
        (("--prompt", "x", "--top-p", 2), "top_p"),
        (("--prompt", "x", "--temperature", 0, "--top-k", 3), "--temperature 0 is greedy"),
        (("--prompt", "x", "--dtype", "int9"), "dtype"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: tuple, message: str) -> None:
    result = run("generate", folder, *arguments, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_model_that_is_not_there(command: str, tmp_path: Path) -> None:
    prompt = ("--prompt", "x") if command == "generate" else ()
    result = run(command, tmp_path / "no" / "such" / "folder", *prompt)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no such folder" in result.stderr


def test_help_has_examples() -> None:
    for arguments in (["generate", "--help"], ["bench", "--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert f"qs-jax {arguments[0]} ./model" in result.stdout
