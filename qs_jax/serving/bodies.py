"""What OpenAI's two endpoints are asked, as this engine's settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qs_jax.adaptive.policy import Policy
from qs_jax.choices import BITS, DRAFTS, is_draft, is_whole
from qs_jax.generation_config import GenerationConfig
from qs_jax.serving.errors import ApiError, refused
from qs_jax.serving.fields import Fields, shown

COMPLETION_TOKENS = 16
"""What OpenAI's completions produce where nobody says how much."""

_MOST_SEQUENCES = 64
_MOST_PROMPTS = 256
_MOST_STOPS = 16
_MOST_TOP = {"completions": 5, "chat": 20}

_NO_EFFECT = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
    *("prompt_cache_retention", "verbosity", "stream_options"),
)
"""Fields of OpenAI's that tell of the caller, or of what only other fields would bring about."""

Prompt = str | tuple[int, ...] | list[dict[str, str]]
"""Text, token ids, or a conversation."""


@dataclass(frozen=True)
class Asked:
    """A request of either endpoint, understood. One choice per prompt and sequence, prompt-major.

    `max_new_tokens` is None for as many as there is room for. `top` is how many of the most likely tokens are told
    beside each token, None where not even the token's own log-probability is. `spent` asks for what each token took.
    """

    chat: bool
    prompts: tuple[Prompt, ...]
    sequences: int
    max_new_tokens: int | None
    stops: tuple[str, ...]
    top: int | None
    stream: bool
    include_usage: bool
    spent: bool
    ignore_eos: bool
    settings: Mapping[str, Any]

    def config(self, max_new_tokens: int) -> GenerationConfig:
        """As the engine is asked.

        Raises:
            GenerationError: a setting out of range.
        """
        ends: dict[str, Any] = {"eos_token_id": ()} if self.ignore_eos else {}
        return GenerationConfig.of(max_new_tokens=max_new_tokens, **self.settings, **ends)


def read_body(
    raw: dict[str, Any], *, chat: bool, names: Sequence[str], policies: Mapping[str, Policy], sampled: Mapping[str, Any]
) -> Asked:
    """Understand a request, or say what is wrong with it.

    Args:
        raw: the body's object.
        chat: of which endpoint it is.
        names: those of the model.
        policies: those that may be asked for, by name.
        sampled: what counts for sampling where the request says nothing.

    Raises:
        ApiError: a field is wrong, unknown, or asks for what there is not.
    """
    fields = Fields(raw)
    _check_model(fields, names)
    prompts = (_messages(fields),) if chat else _prompts(fields)
    _refuse_what_there_is_not(fields, chat=chat)
    sequences = fields.whole("n", 1, _MOST_SEQUENCES, 1)
    fields.only("best_of", (sequences,), "all sequences are returned; set n")
    stream = fields.flag("stream")
    asked = Asked(
        chat=chat,
        prompts=prompts,
        sequences=sequences,
        max_new_tokens=_max_tokens(fields, chat=chat),
        stops=_stops(fields),
        top=_top(fields, chat=chat),
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
        spent=fields.flag("spent"),
        ignore_eos=fields.flag("ignore_eos"),
        settings={**_sampling(fields, sampled), **_savings(fields, policies)},
    )
    fields.ignore(*_NO_EFFECT)
    fields.end()
    return asked


def _check_model(fields: Fields, names: Sequence[str]) -> None:
    name = fields.take("model", lambda v: isinstance(v, str), "text", names[0])
    if name not in names:
        raise ApiError(
            404, f"there is no model {shown(name)}; this is {names[0]}", param="model", code="model_not_found"
        )


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    expected = f"text, token ids, or a list of up to {_MOST_PROMPTS} of either"

    def is_one(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(map(is_whole, value)))

    def holds(value: Any) -> bool:
        return is_one(value) or (
            isinstance(value, list) and 0 < len(value) <= _MOST_PROMPTS and all(map(is_one, value))
        )

    value = fields.take("prompt", holds, expected)
    if value is None:
        raise refused(f"prompt is missing; give {expected}", "prompt")
    several = [value] if is_one(value) else value
    return tuple(one if isinstance(one, str) else tuple(one) for one in several)


def _messages(fields: Fields) -> Prompt:
    messages = fields.take("messages", lambda v: isinstance(v, list) and bool(v), "a list of messages")
    if messages is None:
        raise refused("messages is missing; give a list of messages", "messages")
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(raw: Any, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    role = raw.get("role") if isinstance(raw, dict) else None
    if not isinstance(role, str):
        raise refused(f"{where} is {shown(raw)}, expected an object with role and content", "messages")
    content = raw.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise refused(f"{where} has content that is not text; this model reads text only", "messages")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise refused(f"{where} has no content; give text", "messages")
    if raw.get("tool_calls") or role in ("tool", "function"):
        raise refused(f"{where} is of a tool; tools are not supported", "messages")
    return {"role": role, "content": content}


def _refuse_what_there_is_not(fields: Fields, *, chat: bool) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, (0, 0.0), "the engine has repetition_penalty")
    fields.only("logit_bias", ({},), "the engine does not change single logits")
    if chat:
        for name in ("tools", "functions"):
            fields.only(name, ([],), "the model answers in text only")
        for name in ("tool_choice", "function_call"):
            fields.only(name, ("none", "auto"), "the model answers in text only")
        fields.only("response_format", ({"type": "text"},), "what the model writes is not constrained")
        fields.only("modalities", (["text"],), "the model answers in text only")
        for name in ("audio", "prediction", "web_search_options", "reasoning_effort"):
            fields.only(name, (), "the model answers in text only")
    else:
        fields.only("echo", (False,), "the answer does not repeat the prompt")
        fields.only("suffix", ("",), "nothing is filled in before a text")


def _max_tokens(fields: Fields, *, chat: bool) -> int | None:
    both = {name: fields.whole(name, 1, 2**31 - 1) for name in ("max_tokens", "max_completion_tokens")}
    said = {value for value in both.values() if value is not None}
    if len(said) > 1:
        raise refused("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
    return said.pop() if said else None if chat else COMPLETION_TOKENS


def _stops(fields: Fields) -> tuple[str, ...]:
    def holds(value: Any) -> bool:
        return isinstance(value, str) or (
            isinstance(value, list) and len(value) <= _MOST_STOPS and all(isinstance(stop, str) for stop in value)
        )

    value = fields.take("stop", holds, f"text, or a list of up to {_MOST_STOPS} texts", [])
    stops = (value,) if isinstance(value, str) else tuple(value)
    if "" in stops:
        raise refused("stop is empty text, which stands everywhere; leave it out", "stop")
    return stops


def _top(fields: Fields, *, chat: bool) -> int | None:
    if not chat:
        return fields.whole("logprobs", 0, _MOST_TOP["completions"])
    asked = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, _MOST_TOP["chat"])
    if top is not None and not asked:
        raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
    return (top or 0) if asked else None


def _include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.take("stream_options", lambda v: isinstance(v, dict), "an object", {})
    if options and not stream:
        raise refused("stream_options needs stream to be true", "stream_options")
    inner = Fields(options)
    include = inner.flag("include_usage")
    inner.ignore("include_obfuscation", "continuous_usage_stats")
    inner.end()
    return include


def _sampling(fields: Fields, sampled: Mapping[str, Any]) -> dict[str, Any]:
    said = {
        "temperature": fields.number("temperature", 0, 1e10),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.take("top_k", lambda v: is_whole(v, 0) or v == -1, "a whole number from 0 (0 or -1: all)"),
        "min_p": fields.number("min_p", 0, 1),
    }
    penalty = fields.number("repetition_penalty", 1e-10, 1e10)
    seed = fields.whole("seed", 0, 2**31 - 1)
    always = {"repetition_penalty": penalty, "seed": seed}
    chosen = {**sampled, **{name: value for name, value in said.items() if value is not None}}
    if chosen["temperature"] == 0 or chosen.get("top_p") == 0:
        return {"do_sample": False, **always}
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0
    return {"do_sample": True, **chosen, **always}


def _savings(fields: Fields, policies: Mapping[str, Policy]) -> dict[str, Any]:
    """What is this project's own: how little to spend."""
    name = fields.take("policy", lambda v: isinstance(v, str), "text", "off")
    if name not in policies:
        raise refused(f"there is no policy {shown(name)}; there are {', '.join(policies)}", "policy")
    bits = fields.take("bits", lambda v: is_whole(v) and v in BITS, f"one of {', '.join(map(str, BITS))}")
    exact = fields.flag("exact")

    def are_drafts(value: Any) -> bool:
        several = value if isinstance(value, list) else [value]
        return bool(several) and all(isinstance(one, str) and is_draft(one) for one in several)

    draft = fields.take("draft", are_drafts, f"one of {', '.join(DRAFTS)}, or a list of them")
    own = {"policy": policies[name], "bits": bits, "exact": exact}
    return own if draft is None else {**own, "draft": draft}
