"""Settings of a call: what is said, what the model's file may say, and that each is looked at once."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import qs_jax
from qs_jax.adaptive.policy import Policy
from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationConfig, GenerationOptions, GenerationSettings
from qs_jax.generation_defaults import IDS, NEUTRAL, OPEN
from qs_jax.model import Model
from qs_jax.settings import in_force
from tests.study import command, model_folder
from tests.tiny import PROMPTS, tiny_model

CHAT = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 64}


def chat_model() -> Model:
    """A model whose `generation_config.json` samples, and ends at a token of its own."""
    return replace(tiny_model("llama"), defaults=CHAT)


def test_the_typed_names_are_the_fields_and_their_types() -> None:
    assert get_type_hints(GenerationOptions) == get_type_hints(GenerationConfig)
    assert not GenerationOptions.__required_keys__


def test_what_a_model_may_say_is_open_and_has_a_neutral_value() -> None:
    unsaid = {field.name for field in fields(GenerationConfig) if field.name in OPEN}
    assert {name for name in unsaid if getattr(GenerationConfig(), name) is None} == set(OPEN) == {*NEUTRAL, *IDS}


def test_nothing_is_left_open_once_a_model_is_known() -> None:
    settings = in_force(GenerationConfig(), {}, tiny_model("llama").config)
    assert {field.name for field in fields(GenerationSettings) if getattr(settings, field.name) is None} == {
        "bits",
        "seed",
    }
    assert {name: getattr(settings, name) for name in NEUTRAL} == NEUTRAL


def test_a_config_passed_whole_leaves_the_model_its_word() -> None:
    """Its defaults are not settings: the chat model's own end of text and sampling stay in force."""
    settings = in_force(GenerationConfig(max_new_tokens=20), CHAT, chat_model().config)
    assert (settings.max_new_tokens, settings.do_sample, settings.temperature, settings.top_p) == (20, True, 0.6, 0.9)
    assert settings.eos_token_ids == (64,)
    assert settings.from_generation_config == ("do_sample", "eos_token_id", "temperature", "top_p")
    ignored = in_force(GenerationConfig(use_model_defaults=False), CHAT, chat_model().config)
    assert (ignored.do_sample, ignored.temperature) == (False, 1.0)
    assert ignored.from_generation_config == ()


def test_through_generate_a_config_is_what_the_same_settings_are_by_name() -> None:
    model = chat_model()
    whole = qs_jax.generate(model, PROMPTS[0], GenerationConfig(max_new_tokens=6), seed=3)
    assert whole.settings["eos_token_id"] == [64]
    assert whole.settings["from_generation_config"] == ["do_sample", "eos_token_id", "temperature", "top_p"]
    named = qs_jax.generate(model, PROMPTS[0], max_new_tokens=6, seed=3)
    assert (whole.tokens, whole.settings) == (named.tokens, named.settings)
    streamed = list(qs_jax.stream(model, PROMPTS[0], GenerationConfig(max_new_tokens=6, seed=3)))
    assert [token for piece in streamed for token in piece.tokens] == whole.tokens[0]


def test_overrides_replace_and_none_takes_back() -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.5, top_k=3)
    changed = GenerationConfig.of(config, top_k=7, temperature=None, max_new_tokens=None)
    assert (changed.top_k, changed.temperature, changed.max_new_tokens) == (7, None, 9)
    assert GenerationConfig.of(config) is config
    assert GenerationConfig(stop_strings="ab").stop_strings == ("ab",)
    assert GenerationConfig(eos_token_id=iter([1, 2])).eos_token_id == (1, 2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"use_model_defaults": False}])
def test_sampling_where_decoding_is_sure_to_be_greedy_is_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match="need do_sample=True"):
        GenerationConfig(temperature=0.7, **settings)
    with pytest.raises(GenerationError, match="need do_sample=True"):
        GenerationConfig(num_return_sequences=2, **settings)
    assert GenerationConfig(temperature=1.0, top_k=0, **settings).temperature == 1.0


def test_sampling_that_only_the_models_file_asks_for() -> None:
    config, model = GenerationConfig(temperature=0.7), tiny_model("llama")
    assert in_force(config, {"do_sample": True}, model.config).temperature == 0.7
    for file in ({}, {"do_sample": False}, {"temperature": 0.5}):
        with pytest.raises(GenerationError, match=r"^temperature, top_k, .* need do_sample=True"):
            in_force(config, file, model.config)


@pytest.mark.parametrize("config", [20, {"max_new_tokens": 20}, "off"])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(GenerationError, match="expected a GenerationConfig"):
        qs_jax.generate(tiny_model("llama"), PROMPTS[0], config)


@pytest.mark.parametrize("stops", [5, [5], [""], b"x", {"a": 1}])
def test_stop_strings_that_are_none_are_refused(stops: Any) -> None:
    with pytest.raises(GenerationError, match="stop_strings is"):
        GenerationConfig(stop_strings=stops)


def test_every_setting_is_checked_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[GenerationConfig] = []
    check = GenerationConfig.__post_init__
    monkeypatch.setattr(GenerationConfig, "__post_init__", lambda self: (checked.append(self), check(self))[1])
    in_force(GenerationConfig.of(max_new_tokens=3, seed=5), {}, tiny_model("llama").config)
    assert [config.seed for config in checked if config.seed is not None] == [5]


def test_a_policy_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `generate`, with a config or without, by `stream` and by the commands that take one."""
    reads: list[Path] = []
    load = Policy.load.__func__  # pyright: ignore[reportFunctionMemberAccess]
    monkeypatch.setattr(Policy, "load", classmethod(lambda cls, path: (reads.append(Path(path)), load(cls, path))[1]))
    folder, file = model_folder(tmp_path / "model"), tmp_path / "policy.json"
    Policy(name="mine").save(file)
    (tmp_path / "text.txt").write_text("once upon a time " * 40)
    model = tiny_model("llama")
    cut = ("--text", tmp_path / "text.txt", "--prefix", 16, "--window", 8, "--max-tokens", 16)
    calls = {
        "generate": lambda: qs_jax.generate(model, PROMPTS[0], policy=str(file), max_new_tokens=2),
        "a config": lambda: qs_jax.generate(model, PROMPTS[0], GenerationConfig(policy=file), max_new_tokens=2),
        "stream": lambda: list(qs_jax.stream(model, PROMPTS[0], policy=file, max_new_tokens=2)),
        "qs-jax generate": lambda: command(
            "generate", folder, "--prompt", "once", "--policy", file, "--max-new-tokens", 2
        ),
        "qs-jax eval": lambda: command("eval", folder, *cut, "--policy", file, "--debug"),
        "qs-jax bench": lambda: command(
            "bench", folder, "--policy", file, "--prompt-tokens", 4, "--new-tokens", 2, "--debug"
        ),
    }
    for name, call in calls.items():
        reads.clear()
        call()
        assert reads == [file], name
