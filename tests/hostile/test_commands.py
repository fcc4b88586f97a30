"""Hostile text, policies and tokenizers through the commands: one line, status 2, nothing on stdout."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qs_jax.adaptive.policy import Policy
from qs_jax.corpus import read_documents
from qs_jax.evaluation.windows import Plan, cut
from qs_jax.files import LENS_FILE
from qs_jax.loading import load
from qs_jax.request import bind_policy
from tests.folders import write_folder
from tests.hostile.mutations import spoil_text_or_json
from tests.hostile.test_fuzz import survive
from tests.study import LETTERS, command, model_folder
from tests.tiny import quantised, tiny_model
from tests.unit.test_conversion import run as convert

Count = Callable[[str, int], None]
SECONDS = 30.0
"""Of processor time; a bound, not a speed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "model")


def refused(message: str, *arguments: object) -> None:
    """The command ends as documented."""
    started = time.process_time()
    status, out, errors = command(*arguments)
    assert (status, out, errors.count("\n")) == (2, "", 1), errors
    assert errors.startswith("error: ")
    assert "internal" not in errors
    assert len(errors) < 1100
    assert message in errors
    assert errors.rstrip("\n").isprintable()
    assert time.process_time() - started < SECONDS


TEXTS = {
    "nothing": ("a.txt", b"", "hold no text"),
    "blank": ("a.txt", b" \n\t\r\n \f \n", "hold no text"),
    "not utf-8": ("a.txt", "café".encode("latin-1") * 100, "not UTF-8 at byte 3"),
    "utf-16": ("a.txt", "once upon a time ".encode("utf-16") * 100, "not UTF-8 at byte 0"),
    "control characters": ("a.txt", bytes({*range(32)} - {12}) * 400, "but one window takes"),
    "nul bytes": ("a.txt", b"\x00" * 10_000, "but one window takes"),
    "too short": ("a.txt", b"once upon a time", "but one window takes"),
    "half a surrogate pair": ("a.json", b'["\\ud800 once upon a time"]', "text"),
    "deep json": ("a.json", b"[" * 100_000, "not valid JSON"),
    "json of something else": ("a.json", b'{"a": 1}', "expected a list"),
    "numbers": ("a.jsonl", b"1\n2\n", "entry 1"),
    "a huge number": ("a.jsonl", b"1" * 10_000, "not valid JSON"),
    "no gzip": ("a.txt.gz", b"once upon a time", "cannot be read"),
    "cut xz": ("a.txt.xz", b"\xfd7zXZ\x00\x00\x04", "cannot be read"),
}


@pytest.mark.parametrize("name", ["eval", "calibrate"])
@pytest.mark.parametrize("case", TEXTS)
def test_text_that_is_none(folder: Path, tmp_path: Path, case: str, name: str) -> None:
    file, content, message = TEXTS[case]
    (tmp_path / file).write_bytes(content)
    out = ("--out", tmp_path / "policy.json") if name == "calibrate" else ()
    refused(message, name, folder, "--text", tmp_path / file, *out, "--json")
    assert not (tmp_path / "policy.json").exists()


@pytest.mark.slow
def test_ten_megabytes_on_one_line_are_cut_in_bounded_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LETTERS[:-1].strip() * (10_000_000 // 27))
    started = time.process_time()
    model = load(folder, compilation_cache=False)
    windows = cut(model, read_documents(tmp_path / "a.txt"), Plan(prefix=64, window=64, max_tokens=1024))
    assert len(windows) == 16
    assert time.process_time() - started < 4 * SECONDS


POLICIES: dict[str, tuple[Any, str]] = {
    "no json": (b"{", "cannot be read as JSON"),
    "not utf-8": (b'{"format": 1, "name": "\xff"}', "cannot be read as JSON"),
    "a list": ([], "JSON object"),
    "no format": ({"name": "x"}, "format is None"),
    "an unknown field": ({"format": 1, "halt": True}, "halt"),
    "control characters": ({"format": 1, "kv_rule": "\x1b[31m\n"}, "kv_rule"),
    "a layer the model has not": ({"format": 1, "prompt_halting": {"layers": [7], "thresholds": 1.0}}, "layer"),
    "too many thresholds": ({"format": 1, "decode_halting": {"layers": [1], "thresholds": [1.0, 2.0]}}, "thresholds"),
    "not a number": ({"format": 1, "prompt_halting": {"thresholds": float("nan")}}, "thresholds"),
    "bits of weights that have none": ({"format": 1, "kv_rule": "shallow", "decode_halting": {}}, "Matryoshka"),
    "a very long list": ({"format": 1, "prompt_halting": {"layers": list(range(10**5))}}, "layer"),
}


@pytest.mark.parametrize("case", POLICIES)
def test_a_policy_that_is_none(folder: Path, tmp_path: Path, case: str) -> None:
    value, message = POLICIES[case]
    file = tmp_path / "policy.json"
    file.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    refused(message, "generate", folder, "--prompt", "once", "--policy", file, "--json")


def test_a_policy_that_is_nowhere(folder: Path, tmp_path: Path) -> None:
    for choice in (tmp_path / "no.json", "bold", tmp_path):
        refused("polic", "generate", folder, "--prompt", "once", "--policy", choice)


def test_mutated_policies_fit_a_model_or_are_refused(tmp_path: Path, count: Count) -> None:
    """All the way to what the compiled program is made from, on models with planes and without."""
    models = [tiny_model("llama"), quantised(tiny_model("gpt2"))]
    file, fitted = tmp_path / "policy.json", 0
    for number in range(200):
        rng = random.Random(number)
        policy = Policy.paper() if number % 2 else Policy.balanced()
        file.write_bytes(spoil_text_or_json(policy.to_json(), rng))
        for model in models:
            fitted += survive(lambda model=model: bind_policy(model, Policy.of(file)), number)
    assert 0 < fitted < 300
    count("mutated inputs", 200)


def test_a_tokenizer_that_is_missing_or_another_models(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("once upon a time " * 100)
    bare = write_folder(tmp_path / "bare", "llama")
    refused("no tokenizer", "generate", bare, "--prompt", "once")
    refused("no tokenizer", "eval", bare, "--text", tmp_path / "a.txt")
    foreign = model_folder(tmp_path / "foreign")
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"u": 97 + 11, "z": 20}
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("token", "generate", foreign, "--prompt", "upon")
    refused("the tokenizer gives token 108, the model knows 97", "eval", foreign, "--text", tmp_path / "a.txt")


def test_a_smaller_tokenizer_writes_what_it_knows(tmp_path: Path) -> None:
    """Many models have more rows than their tokenizer has tokens; what has no text has none."""
    folder = model_folder(tmp_path / "model")
    status, out, errors = command("generate", folder, "--prompt", "once", "--max-new-tokens", 8, "--json")
    assert status == 0, errors
    assert set(out["texts"][0]) <= set(LETTERS)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", "llama")
    linked = write_folder(tmp_path / "linked", "llama")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    refused("is a link out of its folder", "generate", linked, "--prompt", "once")
    sharded = write_folder(tmp_path / "sharded", "llama", shards=2)
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "shard")
    shard.symlink_to("../shard")
    refused("is a link out of its folder", "generate", sharded, "--prompt", "once")
    lensed = write_folder(tmp_path / "lensed", "llama", tokenizer=True)
    (tmp_path / "lens").write_bytes(b"whatever")
    (lensed / LENS_FILE).symlink_to("../lens")
    refused("is a link out of its folder", "generate", lensed, "--prompt", "once")


def test_the_hubs_cache_links_to_its_own_store(tmp_path: Path) -> None:
    original = write_folder(tmp_path / "hf", "gpt2")
    snapshot, store = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    store.mkdir()
    for number, file in enumerate(original.iterdir()):
        file.rename(store / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert load(snapshot, compilation_cache=False).config.model_type == "gpt2"


def test_no_verify_skips_the_checksums(folder: Path, tmp_path: Path) -> None:
    assert convert(folder, tmp_path / "out")[0] == 0
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text() + " ")
    arguments = ("generate", tmp_path / "out", "--prompt", "once", "--max-new-tokens", 2, "--json")
    refused(f"{config}: is not as converted (checksum differs)", *arguments)
    assert command(*arguments, "--no-verify")[0] == 0
