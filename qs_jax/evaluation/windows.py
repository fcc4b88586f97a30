"""Text cut into equal windows: an unscored prefix and the scored tokens that follow it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from qs_jax.errors import EvaluationError, TokenizerError
from qs_jax.evaluation.defaults import BATCH, SCORED_TOKENS, WINDOW
from qs_jax.model import Model

LONGEST_PREFIX = 512
"""Unscored tokens before the scored ones, where the context allows it and nothing else is asked for."""


@dataclass(frozen=True)
class Window:
    """Token ids of a prefix (the prompt) and of what is scored, and the stretch of text behind each of them; and of
    several texts the number of the one that it is of."""

    prompt: tuple[int, ...]
    scored: tuple[int, ...]
    prompt_pieces: tuple[str, ...]
    scored_pieces: tuple[str, ...]
    text: int = 0

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of the scored text."""
        return len("".join(self.scored_pieces).encode())


@dataclass(frozen=True)
class Plan:
    """How text is cut. `prefix` 0 is the paper's protocol: every token of the window is scored, after nothing but the
    token that starts a text. `max_tokens` bounds the scored tokens; `batch` windows are run together."""

    prefix: int | None = None
    window: int = WINDOW
    max_tokens: int = SCORED_TOKENS
    batch: int = BATCH

    def __post_init__(self) -> None:
        least = {"prefix": 0, "window": 1, "max_tokens": 1, "batch": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise EvaluationError(f"{name} is {value}, expected a whole number from {low}")


def cut(model: Model, documents: Sequence[str], plan: Plan) -> list[Window]:
    """Windows spread evenly over the text, without overlap, as many as `plan` asks for or the text holds.

    Documents are joined with the token that starts a text before each. The number of windows is a multiple of the
    batch, or below it.

    Raises:
        EvaluationError: the text is shorter than a window, or a window longer than the model's context.
        TokenizerError: the model has no tokenizer, or another model's.
    """
    if model.tokenizer is None:
        raise TokenizerError(model.no_tokenizer)
    limit, start = model.config.max_position_embeddings, start_token(model)
    prefix = _default_prefix(limit - plan.window) if plan.prefix is None else plan.prefix
    if prefix < 0 or max(prefix, 1) + plan.window > limit:
        raise EvaluationError(
            f"a window of {max(prefix, 0)} + {plan.window} tokens is longer than the model's context of {limit}; "
            "lower prefix or window"
        )
    ids, pieces = _stream(model, documents, start)
    size = prefix + plan.window
    count = min(len(ids) // size, plan.max_tokens // plan.window)
    if not count:
        raise EvaluationError(
            f"the text has {len(ids)} tokens and max_tokens is {plan.max_tokens}, but one window takes "
            f"{prefix} + {plan.window}; give more text or smaller windows"
        )
    count -= count % plan.batch if count > plan.batch else 0
    windows = []
    for number in np.linspace(0, len(ids) // size - 1, count).round().astype(int):
        middle, end = number * size + prefix, (number + 1) * size
        before = slice(number * size, middle)
        windows.append(
            Window(
                prompt=tuple(ids[before]) or (start,),
                scored=tuple(ids[middle:end]),
                prompt_pieces=tuple(pieces[before]) or ("",),
                scored_pieces=tuple(pieces[middle:end]),
            )
        )
    return windows


def whole(model: Model, documents: Sequence[str], max_tokens: int) -> Int[np.ndarray, "windows tokens"]:
    """Token ids of windows of the default size, prefix and all, `max_tokens` of them at most.

    Raises: as `cut`.
    """
    plan = Plan(batch=1)
    size = _default_prefix(model.config.max_position_embeddings - plan.window) + plan.window
    windows = cut(model, documents, replace(plan, max_tokens=max(1, max_tokens // size) * plan.window))
    return np.asarray([window.prompt + window.scored for window in windows], np.int32)


def _default_prefix(room: int) -> int:
    """The largest power of two that fits, up to `LONGEST_PREFIX`: such a prompt fills its bucket, so that no saving
    is only padding that the dense model would have computed."""
    return min(LONGEST_PREFIX, 1 << max(0, room.bit_length() - 1)) if room > 0 else 0


def start_token(model: Model) -> int:
    """The token that stands before a text: beginning of text, or end of text where the model has no other.

    Raises:
        EvaluationError: the model has neither.
    """
    config = model.config
    for token in (config.bos_token_id, *config.eos_token_ids):
        if token is not None:
            return token
    raise EvaluationError(f"{model.name}: config.json names no bos_token_id and no eos_token_id; add one")


def _stream(model: Model, documents: Sequence[str], start: int) -> tuple[list[int], list[str]]:
    """All documents end to end."""
    assert model.tokenizer is not None
    ids: list[int] = []
    pieces: list[str] = []
    for document in documents:
        tokens, stretches = model.tokenizer.encode_with_pieces(document)
        if tokens[:1] != [start]:
            tokens, stretches = [start, *tokens], ["", *stretches]
        ids += tokens
        pieces += stretches
    if (largest := max(ids, default=0)) >= model.config.vocab_size:
        raise TokenizerError(
            f"{model.name}: the tokenizer gives token {largest}, the model knows {model.config.vocab_size}; put the "
            "model's own tokenizer files beside its weights"
        )
    return ids, pieces
