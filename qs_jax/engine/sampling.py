"""From logits to the next token: Hugging Face's logits processors, in its order, as traced arithmetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from qs_jax.pytree import STATIC
from qs_jax.sharding import mesh_of

Scalar = Float[Array | np.ndarray, "*#batch"]

_BLOCK = 512
"""Entries of the vocabulary that are reduced at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """What shapes the next-token distribution. Numbers are traced, so that changing one compiles nothing.

    Each number is one for all rows or one per row. Neutral: temperature 1, top_k 0, top_p 1, min_p 0,
    repetition_penalty 1. What the compiled step contains is static: greedy decoding (`do_sample` false) holds no
    sampling code, and without `penalise` there is no table of seen tokens. `greedy` marks, where some rows sample,
    those that do not; None if there are none.
    """

    temperature: Scalar
    top_k: Int[Array | np.ndarray, "*#batch"]
    top_p: Scalar
    min_p: Scalar
    repetition_penalty: Scalar
    do_sample: bool = field(default=False, metadata=STATIC)
    penalise: bool = field(default=False, metadata=STATIC)
    greedy: Bool[Array | np.ndarray, " batch"] | None = None

    @classmethod
    def of(
        cls,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """The same numbers for all rows; neutral and greedy unless said otherwise."""
        return cls(
            temperature=np.asarray(temperature, np.float32),
            top_k=np.asarray(top_k, np.int32),
            top_p=np.asarray(top_p, np.float32),
            min_p=np.asarray(min_p, np.float32),
            repetition_penalty=np.asarray(repetition_penalty, np.float32),
            do_sample=do_sample,
            penalise=repetition_penalty != 1.0,
        )

    @classmethod
    def of_rows(cls, rows: Sequence["Sampling"]) -> "Sampling":
        """Each row by its own numbers. As long as no row samples or is penalised it is the program of plain greedy
        decoding; as soon as one does, one program whatever the others ask for."""
        samples = any(row.do_sample for row in rows)
        penalises = any(row.penalise for row in rows)
        numbers = {
            name: np.stack([np.asarray(getattr(row, name)) for row in rows])
            for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        }
        if not samples and not penalises:
            return cls.of()
        greedy = np.asarray([not row.do_sample for row in rows]) if samples else None
        return cls(**numbers, do_sample=samples, penalise=penalises, greedy=greedy)


def process_logits(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Repetition penalty, temperature, top-k, top-p, min-p; -inf where a token is ruled out.

    `seen` marks the tokens of the row's prompt and output. The order and every inequality are those of Hugging
    Face's `LogitsProcessor` classes, so scores are equal to theirs; ties at a threshold are all kept.
    """
    scores = penalise(logits, seen, sampling) / _column(sampling.temperature)
    scores = _keep_top_k(scores, _column(sampling.top_k))
    scores = _keep_top_p(scores, _column(sampling.top_p))
    probabilities = jax.nn.softmax(scores, axis=-1)
    floor = _column(sampling.min_p) * probabilities.max(axis=-1, keepdims=True)
    return jnp.where(probabilities < floor, -jnp.inf, scores)


def penalise(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Make tokens that already occurred less likely (CTRL, arXiv 1909.05858)."""
    penalty = _column(sampling.repetition_penalty)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def next_tokens(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch seen_vocab"],
    noise: Key[Array, " batch"],
    sampling: Sampling,
) -> Int[Array, " batch"]:
    """Choose one token per row: the most likely, or a sample drawn with the row's own noise (Gumbel-max)."""
    if not sampling.do_sample:
        scores = penalise(logits, seen, sampling) if sampling.penalise else logits
        return most_likely(scores)
    return most_likely(noisy_scores(logits, seen, noise, sampling))


def noisy_scores(
    logits: Float[Array, "batch vocab"],
    seen: Bool[Array, "batch seen_vocab"],
    noise: Key[Array, " batch"],
    sampling: Sampling,
) -> Float[Array, "batch vocab"]:
    """What a drawn token is the greatest of: processed logits and the row's own noise."""
    if not sampling.penalise:
        seen = jnp.zeros(logits.shape, bool)
    gumbel = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(noise)
    if sampling.greedy is not None:
        gumbel = jnp.where(sampling.greedy[:, None], 0.0, gumbel)
    return process_logits(logits, seen, sampling) + gumbel


def most_likely(scores: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """The first of the greatest of every row."""

    def of_rows(rows: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
        return jnp.argmax(rows, axis=-1).astype(jnp.int32)

    def of_blocks(blocks: Float[Array, "blocks block batch"]) -> Int[Array, " batch"]:
        block = jnp.argmax(blocks.max(axis=1), axis=0).astype(jnp.int32)
        inside = blocks[block, :, jnp.arange(blocks.shape[2], dtype=jnp.int32)]
        return block * blocks.shape[1] + of_rows(inside)

    return _reduced(scores, of_rows, of_blocks)


def log_normaliser(logits: Float[Array, "batch vocab"]) -> Float[Array, " batch"]:
    """The logarithm of the sum of exponentials of every row."""

    def of_blocks(blocks: Float[Array, "blocks block batch"]) -> Float[Array, " batch"]:
        greatest = blocks.max(axis=1).max(axis=0)
        return greatest + jnp.log(jnp.exp(blocks - greatest).sum(axis=1).sum(axis=0))

    return _reduced(logits, lambda rows: jax.nn.logsumexp(rows, axis=-1), of_blocks)


def _reduced(
    logits: Float[Array, "batch vocab"], of_rows: Callable[[Array], Array], of_blocks: Callable[[Array], Array]
) -> Array:
    """One number per row. On CPU the head's product leaves several rows side by side; reduced as they lie, and in
    blocks of the vocabulary that all cores share, they take a fifth of the time."""
    if logits.shape[0] == 1 or mesh_of(logits) is not None:
        return of_rows(logits)

    def as_they_lie(logits: Array) -> Array:
        columns = jnp.pad(logits.T, ((0, -logits.shape[1] % _BLOCK), (0, 0)), constant_values=-jnp.inf)
        return of_blocks(jax.lax.optimization_barrier(columns).reshape(-1, _BLOCK, logits.shape[0]))

    return jax.lax.platform_dependent(logits, cpu=as_they_lie, default=of_rows)


def _keep_top_k(scores: Float[Array, "batch vocab"], top_k: Int[Array, "#batch 1"]) -> Float[Array, "batch vocab"]:
    limit = jnp.where(top_k > 0, top_k, scores.shape[-1]).astype(jnp.float32)
    return jnp.where(_within(scores, jnp.ones_like(scores), limit), scores, -jnp.inf)


def _keep_top_p(scores: Float[Array, "batch vocab"], top_p: Float[Array, "#batch 1"]) -> Float[Array, "batch vocab"]:
    probabilities = jax.nn.softmax(scores, axis=-1)
    kept = _within(probabilities, probabilities, top_p) | (top_p >= 1.0)
    return jnp.where(kept, scores, -jnp.inf)


def _within(
    values: Float[Array, "batch vocab"], weights: Float[Array, "batch vocab"], limit: Float[Array, "#batch 1"]
) -> Bool[Array, "batch vocab"]:
    """Entries such that everything strictly greater weighs less than `limit`; the greatest is always kept.

    Top-k (weights 1, limit k) and top-p (weights = probabilities, limit p) are both of this form. The threshold
    is found by bisection over the 2³² float32 bit patterns: 32 sums in place of a sort of the vocabulary.
    """
    order = _ordered_bits(values)

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // jnp.uint32(2)
        enough = jnp.where(order > middle, weights, 0.0).sum(axis=-1, keepdims=True) < limit
        return jnp.where(enough, low, middle + jnp.uint32(1)), jnp.where(enough, middle, high)

    greatest = order.max(axis=-1, keepdims=True)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (jnp.zeros_like(greatest), greatest))
    return order >= threshold


def _ordered_bits(x: Float[Array, "batch vocab"]) -> UInt[Array, "batch vocab"]:
    """Unsigned integers in the same order as the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _column(x: Array | np.ndarray) -> Array:
    """A setting given once or per row, as a column to set against (batch, vocab)."""
    return jnp.asarray(x).reshape(-1, 1)
