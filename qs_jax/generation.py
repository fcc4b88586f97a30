"""The host API: prompts in, text out, with Hugging Face's names and semantics."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from qs_jax.adaptive.precision import FULL
from qs_jax.engine.decode import Chosen
from qs_jax.engine.session import Request, Session
from qs_jax.engine.stopping import Detokenizer, ends_with_stop
from qs_jax.errors import GenerationError
from qs_jax.generation_config import GenerationConfig
from qs_jax.loading import Model
from qs_jax.matryoshka.linear import at_bits, has_planes
from qs_jax.models.base import CausalLM
from qs_jax.request import Prompt, prepare

FinishReason = Literal["eos", "stop_string", "length"]

CHUNK = 32
"""Decode steps per call of the compiled program."""

_STREAMING_CHUNK = 8


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns. Rows are prompt-major: all sequences of the first prompt, then of the second.

    `tokens` holds only new tokens, the end-of-text id included where one was produced; `sequences` is the same as one
    rectangle, padded on the right. `logprobs` are natural log-probabilities of the tokens under the model's own
    distribution, before temperature or penalties. `texts` is the new text. `seeds` repeats the call.
    `trace` says what was spent on each token: `layers_run`, `bits` (mean over those layers) and `signal` (at the last
    decision to halt) per row and new token, of the pass that chose it; `prompt_layers_run`, `prompt_fused_with` (index
    of the prompt token it went on in, or -1) and `prompt_signal` per prompt and token. Times in `timing` are seconds
    of wall clock; `compile_s` is included in the phase in which it happened.
    """

    texts: list[str]
    tokens: list[list[int]]
    sequences: Int[np.ndarray, "rows longest"]
    lengths: list[int]
    finish_reasons: list[FinishReason]
    logprobs: list[list[float]]
    seeds: list[int]
    trace: dict[str, Any]
    ledger: dict[str, float]
    timing: dict[str, float]


@dataclass(frozen=True)
class StreamPiece:
    """Text and tokens a row gained; `finish_reason` is set on its last piece."""

    row: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None


@dataclass
class _Row:
    """A row's output so far. Text is made as tokens arrive only where somebody looks at it before the end."""

    detokenizer: Detokenizer | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    layers_run: list[int] = field(default_factory=list)
    bits_read: list[int] = field(default_factory=list)
    signal: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class _Generation:
    """One request on its way through a session: rows grow, end, and become output."""

    def __init__(self, model: Model, config: GenerationConfig, request: Request, *, streaming: bool):
        self.session = Session(network_at(model, config.bits), request, bits=config.bits or FULL)
        self.request = request
        self.stop_strings = config.stop_strings
        self.pad_token_id = _pad_token_id(model, config)
        self.watching = streaming or bool(config.stop_strings)
        prompts = [prompt for prompt in request.prompts for _ in range(request.copies)]
        self.rows = [_Row(Detokenizer(model.tokenizer, p) if model.tokenizer else None) for p in prompts]

    def pieces(self) -> Iterator[StreamPiece]:
        """Run to the end; yields what each row gained in each chunk."""
        for chosen in self.session.chunks():
            for index, row in enumerate(self.rows):
                if row.finish_reason is None:
                    yield self._extend(index, row, _of_row(chosen, index))

    def _extend(self, index: int, row: _Row, chosen: Chosen) -> StreamPiece:
        tokens: list[int] = chosen.tokens.tolist()
        text, used = "", 0
        for token in tokens:
            used += 1
            piece = row.detokenizer.push(token) if row.detokenizer and self.watching else ""
            text += piece
            row.finish_reason = self._finish_reason(row, token, piece, len(row.tokens) + used)
            if row.finish_reason:
                self.session.finish(index)
                break
        row.tokens += tokens[:used]
        for name in ("logprobs", "layers_run", "bits_read", "signal"):
            getattr(row, name).extend(getattr(chosen, name)[:used].tolist())
        if row.finish_reason and row.detokenizer and self.watching:
            text += row.detokenizer.flush()
        return StreamPiece(index, text, tokens[:used], row.finish_reason)

    def _finish_reason(self, row: _Row, token: int, piece: str, length: int) -> FinishReason | None:
        if token in self.request.eos_token_ids:
            return "eos"
        if piece and row.detokenizer and ends_with_stop(row.detokenizer.text, piece, self.stop_strings):
            return "stop_string"
        return "length" if length >= self.request.max_new_tokens else None

    def output(self, elapsed: float) -> GenerateOutput:
        lengths = [len(row.tokens) for row in self.rows]
        decode_s = self.session.decode_seconds
        return GenerateOutput(
            texts=[self._text(row) for row in self.rows],
            tokens=[row.tokens for row in self.rows],
            sequences=_rectangle([row.tokens for row in self.rows], self.pad_token_id),
            lengths=lengths,
            finish_reasons=[row.finish_reason or "length" for row in self.rows],
            logprobs=[row.logprobs for row in self.rows],
            seeds=[seed for seed, _ in self.request.seeds],
            trace=self._trace(),
            ledger=self.session.ledger.to_json(),
            timing={
                "total_s": elapsed,
                "prefill_s": self.session.prefill_seconds,
                "decode_s": decode_s,
                "decode_steps": self.session.decode_steps,
                "compile_s": self.session.compile_seconds,
                "tokens_per_second": sum(lengths) / elapsed,
            },
        )

    def _trace(self) -> dict[str, Any]:
        assert self.session.prefilled is not None
        prompt = self.session.prefilled.trace
        ledger = self.session.ledger
        constant = float(ledger.bits if ledger.costs.planes else ledger.costs.weight_bits)
        return {
            "layers_run": [row.layers_run for row in self.rows],
            "bits": [_mean_bits(row, constant, adapts=ledger.structure.adapts_bits) for row in self.rows],
            "signal": [row.signal for row in self.rows],
            "prompt_layers_run": [layers.tolist() for layers in prompt.layers_run],
            "prompt_fused_with": [tokens.tolist() for tokens in prompt.fused_with],
            "prompt_signal": [values.tolist() for values in prompt.signal],
        }

    def _text(self, row: _Row) -> str:
        if row.detokenizer is None:
            return ""
        if not self.watching:
            for token in row.tokens:
                row.detokenizer.push(token)
            row.detokenizer.flush()
        return row.detokenizer.text


def _of_row(chosen: Chosen, index: int) -> Chosen:
    """What a row emitted in a chunk."""
    emitted = chosen.emitted[:, index]
    return jax.tree.map(lambda leaf: leaf[emitted, index], chosen)


def _mean_bits(row: _Row, constant: float, *, adapts: bool) -> list[float]:
    """Precision per token, averaged over the layers it ran; the prefill's token is read at the constant one."""
    spent = zip(row.bits_read, row.layers_run, strict=True)
    return [read / ran if adapts and read else constant for read, ran in spent]


def generate(model: Model, prompts: Prompt | Sequence[Prompt], **settings: Any) -> GenerateOutput:
    """Continue one prompt or a batch of them.

    Prompts are strings, chat conversations (lists of `{"role", "content"}` messages, where the tokenizer has a chat
    template) or lists of token ids, and may be of any lengths: each row gets what it would get alone.

    Args:
        model: what `qs_jax.load` returned.
        prompts: one prompt or a list of them.
        **settings: the fields of `GenerationConfig`.

    Raises:
        GenerationError: an empty or over-long prompt, or a setting that is unknown or out of range.
        TokenizerError: text was given and the model has no tokenizer, or chat and it has no template.
    """
    started = time.perf_counter()
    config = GenerationConfig.of(**settings)
    generation = _Generation(model, config, prepare(model, prompts, config, chunk_size=CHUNK), streaming=False)
    for _ in generation.pieces():
        pass
    return generation.output(time.perf_counter() - started)


def stream(
    model: Model, prompts: Prompt | Sequence[Prompt], **settings: Any
) -> Generator[StreamPiece, None, GenerateOutput]:
    """Like `generate`, but yields each row's text as it is made; the generator's return value is the whole output.

    The pieces of a row join to exactly the text that `generate` returns. Arguments and errors are those of
    `generate`; a bad request is refused before the first piece is asked for.
    """
    started = time.perf_counter()
    config = GenerationConfig.of(**settings)
    request = prepare(model, prompts, config, chunk_size=_STREAMING_CHUNK)
    generation = _Generation(model, config, request, streaming=True)

    def pieces() -> Generator[StreamPiece, None, GenerateOutput]:
        yield from generation.pieces()
        return generation.output(time.perf_counter() - started)

    return pieces()


def network_at(model: Model, bits: int | None) -> CausalLM:
    """The model's network, every kernel read at `bits`.

    Raises:
        GenerationError: bits are asked for and the model's weights are not Matryoshka.
    """
    if bits is None:
        return model.network
    if not has_planes(model.network):
        raise GenerationError(f"bits is {bits}, but {model.name} has no Matryoshka weights; qs-convert --quantize")
    return at_bits(model.network, bits)


def _pad_token_id(model: Model, config: GenerationConfig) -> int:
    """The id asked for, else the model's, else its end of text (as Hugging Face does), else 0."""
    choices = (config.pad_token_id, model.config.pad_token_id, *model.config.eos_token_ids, 0)
    return next(choice for choice in choices if choice is not None)


def _rectangle(rows: Sequence[Sequence[int]], pad_token_id: int) -> Int[np.ndarray, "rows longest"]:
    array = np.full((len(rows), max(map(len, rows), default=0)), pad_token_id, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
