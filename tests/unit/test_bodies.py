"""Requests are understood, or refused by the name of the field."""

from typing import Any

import pytest

from qs_jax.adaptive.policy import Policy
from qs_jax.serving.bodies import Asked, read_body
from qs_jax.serving.errors import ApiError
from qs_jax.serving.fields import parse_object

POLICIES = {"off": Policy.off(), "paper": Policy.paper()}
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def read(body: dict[str, Any], *, chat: bool = False) -> Asked:
    whole = {**(CHAT if chat else {"prompt": "Hi"}), **body}
    return read_body(whole, chat=chat, names=["tiny"], policies=POLICIES, sampled={"temperature": 0.7, "top_k": 5})


def test_what_is_left_out_is_as_in_openais_api() -> None:
    asked = read({"model": "tiny"})
    assert (asked.prompts, asked.sequences, asked.max_new_tokens, asked.stream) == (("Hi",), 1, 16, False)
    assert read({}, chat=True).max_new_tokens is None
    settings = read({"user": "me", "top_p": None, "presence_penalty": 0}).settings
    assert settings["do_sample"] is True
    assert (settings["temperature"], settings["top_k"]) == (0.7, 5)


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"temperature": 0.0, "top_p": 0.5}, {"top_p": 0}])
def test_temperature_zero_is_greedy(greedy: dict[str, Any]) -> None:
    settings = read(greedy).settings
    assert settings["do_sample"] is False
    assert not {"temperature", "top_p", "top_k"} & set(settings)
    read(greedy).config(5)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        ([[1], "b"], ((1,), "b")),
    ],
)
def test_prompts_are_text_ids_or_lists_of_them(prompt: Any, prompts: Any) -> None:
    assert read({"prompt": prompt}).prompts == prompts


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = read({"messages": [{"role": "user", "content": parts, "name": "me"}]}, chat=True)
    assert asked.prompts == ([{"role": "user", "content": "ab"}],)


def test_what_is_ours_goes_to_the_engine() -> None:
    settings = read({"policy": "paper", "bits": 4, "exact": True, "draft": ["lookup", "bits:2"]}).settings
    assert (settings["policy"].name, settings["bits"], settings["exact"]) == ("paper", 4, True)
    assert settings["draft"] == ["lookup", "bits:2"]
    assert read({"repetition_penalty": 1.2, "seed": 3, "stop": "x", "n": 2, "best_of": 2}).stops == ("x",)


WRONG: list[tuple[dict[str, Any], str, bool]] = [
    ({"model": "gpt-4"}, "model", False),
    ({"prompt": None}, "prompt", False),
    ({"prompt": []}, "prompt", False),
    ({"prompt": [1, "a"]}, "prompt", False),
    ({"prompt": [True]}, "prompt", False),
    ({"prompt": {"a": 1}}, "prompt", False),
    ({"prompt": [[]]}, "prompt", False),
    ({"max_tokens": 0}, "max_tokens", False),
    ({"max_tokens": 1.5}, "max_tokens", False),
    ({"max_tokens": "5"}, "max_tokens", False),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", True),
    ({"temperature": -1}, "temperature", False),
    ({"temperature": "hot"}, "temperature", False),
    ({"temperature": True}, "temperature", False),
    ({"top_p": 1.1}, "top_p", False),
    ({"n": 0}, "n", False),
    ({"n": 10**9}, "n", False),
    ({"best_of": 3}, "best_of", False),
    ({"stop": ""}, "stop", False),
    ({"stop": [1]}, "stop", False),
    ({"stop": ["x"] * 17}, "stop", False),
    ({"seed": -1}, "seed", False),
    ({"seed": 2**31}, "seed", False),
    ({"logprobs": 6}, "logprobs", False),
    ({"logprobs": 2}, "logprobs", True),
    ({"top_logprobs": 2}, "top_logprobs", True),
    ({"presence_penalty": 0.5}, "presence_penalty", False),
    ({"frequency_penalty": 1}, "frequency_penalty", True),
    ({"logit_bias": {"5": 1}}, "logit_bias", False),
    ({"echo": True}, "echo", False),
    ({"suffix": "x"}, "suffix", False),
    ({"tools": [{"type": "function"}]}, "tools", True),
    ({"response_format": {"type": "json_object"}}, "response_format", True),
    ({"messages": []}, "messages", True),
    ({"messages": ["hi"]}, "messages", True),
    ({"messages": [{"role": "user"}]}, "messages", True),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", True),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages", True),
    ({"stream": "yes"}, "stream", False),
    ({"stream_options": {"include_usage": True}}, "stream_options", False),
    ({"stream": True, "stream_options": {"what": 1}}, "what", False),
    ({"policy": "/etc/passwd"}, "policy", False),
    ({"policy": "../policy.json"}, "policy", False),
    ({"bits": 3}, "bits", False),
    ({"exact": 1}, "exact", False),
    ({"draft": "model"}, "draft", False),
    ({"prompts": "typo"}, "prompts", False),
]


@pytest.mark.parametrize(("body", "param", "chat"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said_by_name(body: dict[str, Any], param: str, chat: bool) -> None:
    with pytest.raises(ApiError) as raised:
        read(body, chat=chat)
    told = raised.value.to_json()["error"]
    assert told["param"] == param
    assert set(told) == {"message", "type", "param", "code"}
    assert "\n" not in told["message"]
    assert raised.value.status in (400, 404)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'"x"', b"[" * 10**5, b"\xff\xfe", b"1" * 10**5, b"{}{}"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as raised:
        parse_object(body)
    assert raised.value.status == 400
