"""The text that quantised models are judged on, and how far a network is from it."""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from qs_jax.config import ModelConfig
from qs_jax.model import Model
from qs_jax.models import CausalLM, forward

WINDOW = 256
SCORED_TOKENS = 8192
BATCH = 8

_TITLE = re.compile(r"^ = [^=\n]+ = $", re.MULTILINE)

Text = tuple[Int[np.ndarray, "rows window"], Bool[np.ndarray, "rows window"]]
"""Tokens, and which of them are text; the first of a row is never scored."""


def articles(wikitext: str) -> list[str]:
    """The articles of a WikiText file, which one line with a title each begins."""
    starts = [found.start() for found in _TITLE.finditer(wikitext)]
    return [wikitext[start:stop] for start, stop in zip(starts, [*starts[1:], len(wikitext)], strict=True)]


def scored_text(model: Model, documents: Sequence[str], *, whole: bool = False) -> Text:
    """Documents cut to one window and padded, until there are tokens enough; rows are a multiple of the batch.

    With `whole`, only documents that fill a window.
    """
    assert model.tokenizer is not None
    window = min(WINDOW, model.config.max_position_embeddings)
    tokens: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for document in documents:
        ids = _started(model.tokenizer.encode(document), model.config)[:window]
        if whole and len(ids) < window:
            continue
        tokens.append(np.pad(np.asarray(ids, np.int32), (0, window - len(ids))))
        scored.append(np.arange(window) < len(ids))
        if sum(map(np.sum, scored)) >= SCORED_TOKENS:
            break
    missing = -len(tokens) % BATCH
    tokens += [tokens[0]] * missing
    scored += [np.zeros(window, bool)] * missing
    return np.stack(tokens), np.stack(scored)


def _started(ids: list[int], config: ModelConfig) -> list[int]:
    starts = [token for token in (config.bos_token_id, *config.eos_token_ids) if token is not None][:1]
    return ids if ids[:1] == starts else starts + ids


@jax.jit
def _nats(
    network: CausalLM, tokens: Int[Array, "batch window"], scored: Bool[Array, "batch window"]
) -> Float[Array, " batch"]:
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(network, tokens[:, :-1]), tokens[:, 1:])
    return jnp.where(scored[:, 1:], losses, 0.0).sum(axis=1)


def nats(network: CausalLM, text: Text) -> Float[np.ndarray, " rows"]:
    """Negative log-likelihood of the scored tokens of every row, in nats."""
    tokens, scored = text
    pieces = range(0, len(tokens), BATCH)
    return np.concatenate([_nats(network, tokens[i : i + BATCH], scored[i : i + BATCH]) for i in pieces])


def perplexity(network: CausalLM, text: Text) -> float:
    """Per token, every document from its start and up to one window of it."""
    return math.exp(float(nats(network, text).sum(dtype=np.float64)) / scored_tokens(text))


def scored_tokens(text: Text) -> int:
    return int(text[1][:, 1:].sum())
