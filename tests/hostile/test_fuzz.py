"""Mutated files: each is read soundly, or refused with one line. Nothing else, and in bounded time."""

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.parts import Parts, hf_config
from convert.source import source_of
from qs_jax.adaptive.policy import Policy
from qs_jax.checkpoint import MANIFEST, read_manifest, write_manifest
from qs_jax.console import one_line
from qs_jax.errors import QsJaxError
from qs_jax.generation import generate
from qs_jax.generation_config import GenerationConfig
from qs_jax.generation_defaults import read_generation_defaults
from qs_jax.settings import in_force
from qs_jax.tokenizer import Tokenizer
from tests.folders import write_folder
from tests.hostile.mutations import spoil_bytes, spoil_safetensors, spoil_text_or_json
from tests.tiny import CHAT_TEMPLATE, CONFIGS, tiny_model

Count = Callable[[str, int], None]
SECONDS_PER_INPUT = 30.0
"""Of processor time: no measure of speed, a bound on what a small file can make us do."""


def survive(read: Callable[[], object], number: int) -> bool:
    """Whether the input was read; fails on anything but our own error with a short line to print."""
    started = time.process_time()
    try:
        read()
        sound = True
    except QsJaxError as error:
        line = one_line(error)
        assert line, number
        assert len(line) < 3000, (number, line)
        sound = False
    except BaseException as error:
        pytest.fail(f"input {number}: {type(error).__name__}: {str(error)[:300]}")
    assert time.process_time() - started < SECONDS_PER_INPUT, number
    return sound


def fuzz(file: Path, spoil: Callable[[random.Random], bytes], read: Callable[[], object], inputs: int) -> int:
    """Number of mutated versions of a file that were read without complaint."""
    original = file.read_bytes()
    sound = 0
    for number in range(inputs):
        file.write_bytes(spoil(random.Random(number)))
        sound += survive(read, number)
    file.write_bytes(original)
    read()
    return sound


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("hostile") / "hf", "llama", tokenizer=True)


def read_all(folder: Path) -> None:
    source = source_of(folder)
    for name, shape in source.shapes.items():
        tensor = source.read(name)
        assert tensor.shape == shape
        assert np.isfinite(tensor.astype(np.float64)).all()


def test_safetensors(folder: Path, count: Count) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    sound = fuzz(file, lambda rng: spoil_safetensors(data, rng), lambda: read_all(folder), inputs=900)
    assert 0 < sound < 450
    count("mutated inputs", 900)


def test_shard_index(tmp_path: Path, count: Count) -> None:
    folder = write_folder(tmp_path / "hf", "gpt2", shards=3)
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    assert fuzz(index, lambda rng: spoil_text_or_json(value, rng), lambda: read_all(folder), inputs=300) < 200
    count("mutated inputs", 300)


@pytest.mark.parametrize("name", CONFIGS)
def test_config(tmp_path: Path, name: str, count: Count) -> None:
    folder = write_folder(tmp_path / "hf", name)
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}} if name == "llama" else {}
    scaling |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if name == "qwen2" else {}
    value = {**CONFIGS[name], "eos_token_id": [1, 2], "bos_token_id": 1, **scaling}
    config = folder / "config.json"

    def spoil(rng: random.Random) -> bytes:
        return spoil_text_or_json(value, rng)

    assert fuzz(config, spoil, lambda: hf_config(folder), inputs=400) < 300

    def fits() -> None:
        Parts(source_of(folder)).plan.raise_if_incomplete("hf")

    assert fuzz(config, spoil, fits, inputs=60) < 45
    count("mutated inputs", 460)


def test_tokenizer(folder: Path, count: Count) -> None:
    file = folder / "tokenizer.json"
    value = json.loads(file.read_text())
    value["model"]["vocab"] = dict(list(value["model"]["vocab"].items())[:20])

    def read() -> None:
        tokenizer = Tokenizer.load(folder)
        tokenizer.decode(tokenizer.encode('"#$'))

    fuzz(file, lambda rng: spoil_text_or_json(value, rng), read, inputs=120)
    count("mutated inputs", 120)


def test_tokenizer_config(tmp_path: Path, count: Count) -> None:
    """What names special tokens, adds tokens and writes chats; and the older files that do the same."""
    folder = write_folder(tmp_path / "hf", "llama", tokenizer=True)
    token = {"content": "<x>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    named = {"bos_token": "<s>", "eos_token": {**token, "content": "</s>"}, "pad_token": None, "unk_token": "~"}
    templates = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "TOOLS"}]
    values = {
        "tokenizer_config.json": {
            **named,
            "tokenizer_class": "Own",
            "auto_map": {"AutoTokenizer": [None, "own.Own"]},
            "added_tokens_decoder": {"95": {**token, "content": "<s>", "special": True}, "97": token},
            "extra_special_tokens": ["<x>"],
            "chat_template": templates,
            "split_special_tokens": False,
        },
        "special_tokens_map.json": {**named, "additional_special_tokens": ["</s>"]},
        "added_tokens.json": {"<y>": 97, "<z>": 98},
    }

    def read() -> None:
        tokenizer = Tokenizer.load(folder)
        tokenizer.decode(tokenizer.encode('"#$<x>'), special=True)
        if tokenizer.has_chat_template:
            tokenizer.encode_chat([{"role": "user", "content": "Hi"}])

    for name, value in values.items():
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(value))
        assert fuzz(folder / name, partial(spoil_text_or_json, value), read, inputs=150) < 130
    count("mutated inputs", 450)


def test_generation_config(tmp_path: Path, count: Count) -> None:
    value = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    value |= {"eos_token_id": [1, 2], "pad_token_id": 0, "max_length": 4096, "_from_model_config": True}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(value))

    config = tiny_model("llama").config

    def read() -> None:
        settings = in_force(GenerationConfig(seed=1), read_generation_defaults(tmp_path, 97, []), config)
        assert all(0 <= token < 97 for token in (*settings.eos_token_ids, settings.pad_token_id))

    assert 0 < fuzz(file, partial(spoil_text_or_json, value), read, inputs=400) < 350
    count("mutated inputs", 400)


def test_manifest(tmp_path: Path, count: Count) -> None:
    folder = write_folder(tmp_path / "out", "gpt2")
    write_manifest(folder, source="x", dtype="float32", parameters=1, bytes=4)
    file = folder / MANIFEST
    value = json.loads(file.read_text())
    sound = fuzz(
        file, lambda rng: spoil_text_or_json(value, rng), lambda: read_manifest(folder, verify=True), inputs=300
    )
    assert sound < 200
    count("mutated inputs", 300)


def test_policy(tmp_path: Path, count: Count) -> None:
    file = tmp_path / "policy.json"
    Policy.paper().save(file)
    value = json.loads(file.read_text())
    assert fuzz(file, lambda rng: spoil_text_or_json(value, rng), lambda: Policy.load(file), inputs=300) < 200
    count("mutated inputs", 300)


def test_a_weight_file_of_noise(folder: Path, count: Count) -> None:
    file = folder / "model.safetensors"
    assert fuzz(file, lambda rng: rng.randbytes(rng.choice((0, 7, 8, 9, 5000))), lambda: read_all(folder), 60) == 0
    assert fuzz(file, lambda rng: spoil_bytes(b"PK\x03\x04" * 40, rng), lambda: read_all(folder), 40) == 0
    count("mutated inputs", 100)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_is_encoded_and_decoded(text: str) -> None:
    tokenizer = tiny_model("gpt2", tokenizer=True).tokenizer
    assert tokenizer is not None
    assert all(0 <= token < 97 for token in tokenizer.encode(text))
    assert isinstance(tokenizer.decode(tokenizer.encode(text)), str)


HUGE = "a" * 10_000_000
TEXTS: dict[str, Any] = {
    "empty": ("", "empty"),
    "blank": (" \t\n\u2003", "empty"),
    "ten megabytes on one line": (HUGE, "context"),
    "lone surrogate": ("a\ud800b", "text"),
    "nothing the vocabulary knows": ("\x00\x01\x1b", "no tokens"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_text_is_refused_in_bounded_time(case: str) -> None:
    text, message = TEXTS[case]
    started = time.process_time()
    with pytest.raises(QsJaxError, match=message) as error:
        generate(tiny_model("gpt2", tokenizer=True), text, max_new_tokens=4)
    assert len(one_line(error.value)) < 300
    assert time.process_time() - started < SECONDS_PER_INPUT
