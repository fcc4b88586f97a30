"""Held-out text for the reference models: which slices there are, and how they are cut into scored windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from qs_jax.models import CausalLM, forward
from reference_models.data import load_sources, text_folder
from reference_models.tokens import pack

WINDOW = 512
LIMIT = 16_384
BATCH = 4
TEST = "wikitext103-test"


@dataclass(frozen=True)
class Slice:
    """Text that no training run has seen; `note` says which part of its source it is."""

    name: str
    note: str
    documents: tuple[str, ...]


def slices() -> list[Slice]:
    """The held-out end of every training source, and the WikiText-103 test text.

    Raises:
        DataError: the text is not here.
    """
    folder = text_folder()
    held_out = [Slice(s.name, s.held_out_note, s.held_out) for s in load_sources(folder).values()]
    test = (folder / "wikitext103-test.raw.txt").read_text("utf-8")
    return [*held_out, Slice(TEST, "the WikiText-103 test text, raw", (test,))]


def packed(tokenizer: Path, documents: Sequence[str], limit: int = LIMIT) -> tuple[Int[np.ndarray, " tokens"], int]:
    """The first `limit` tokens of the documents, the separator before each, and how many bytes of text they are."""
    backend = Tokenizer.from_file(str(tokenizer))
    stream = pack(backend, documents)[:limit].astype(np.int32)
    return stream, sum(token_bytes(backend, token) for token in stream[1:].tolist())


def token_bytes(tokenizer: Tokenizer, token: int) -> int:
    """Bytes of text that a token of a byte-level vocabulary stands for; a separator stands for none."""
    if token in tokenizer.get_added_tokens_decoder():
        return 0
    piece = tokenizer.id_to_token(token)
    return 0 if piece is None else len(piece)


def windows(stream: Int[np.ndarray, " tokens"], window: int = WINDOW) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Overlapping windows and, for each, which of its tokens count: every token of the stream but the first, once.

    Windows advance by half their length, so a token is predicted from at least that many (but at the start of the
    text). The last window is padded.
    """
    stride = window // 2
    for start in range(0, max(1, len(stream) - stride), stride):
        part = stream[start : start + window]
        places = np.arange(window)
        counts = (places >= (1 if start == 0 else stride)) & (places < len(part))
        yield np.pad(part, (0, window - len(part))), counts


@jax.jit
def token_nats(network: CausalLM, tokens: Int[Array, "batch window"]) -> Float[Array, "batch window"]:
    """Negative log-likelihood of every token but each row's first, whose entry is zero."""
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(network, tokens[:, :-1]), tokens[:, 1:])
    return jnp.pad(losses, ((0, 0), (1, 0)))


def total_nats(network: CausalLM, stream: Int[np.ndarray, " tokens"], window: int = WINDOW) -> tuple[float, int]:
    """Summed negative log-likelihood of a stream in nats, and how many tokens that is."""
    pairs = list(windows(stream, window))
    total, count = 0.0, 0
    for start in range(0, len(pairs), BATCH):
        group = pairs[start : start + BATCH]
        tokens = np.zeros((BATCH, window), np.int32)
        counts = np.zeros((BATCH, window), bool)
        for row, (part, scored) in enumerate(group):
            tokens[row], counts[row] = part, scored
        total += float(np.asarray(token_nats(network, jnp.asarray(tokens)), np.float64)[counts].sum())
        count += int(counts.sum())
    return total, count
