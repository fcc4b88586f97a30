"""The host API: prompts in, text out, with Hugging Face's names and semantics."""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Unpack

import jax
import numpy as np
from jaxtyping import Int

from qs_jax.engine.decode import Chosen
from qs_jax.engine.session import Session
from qs_jax.engine.stopping import Detokenizer, StopStrings
from qs_jax.generation_config import GenerationConfig, GenerationOptions, GenerationSettings
from qs_jax.generation_defaults import NEUTRAL
from qs_jax.model import Model
from qs_jax.request import Prompt, prepare
from qs_jax.settings import in_force

FinishReason = Literal["eos", "stop_string", "length", "not_finite"]
"""`not_finite`: the next logits were NaN or infinite, so that no token could be chosen; see `not_finite`."""

CHUNK = 32
"""Decode steps per call of the compiled program."""

_STREAMING_CHUNK = 8

_WATCHING_CHUNK = 16
"""Where what is drafted depends on the text so far: seen soon enough, and seldom enough."""


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns. Rows are prompt-major: all sequences of the first prompt, then of the second.

    `tokens` holds only new tokens, the end-of-text id included where one was produced; `sequences` is the same as one
    rectangle, padded on the right. `logprobs` are natural log-probabilities of the tokens under the model's own
    distribution, before temperature or penalties. `texts` is the new text, `pieces` what each token completed of it.
    `seeds` repeats the call.
    `settings` are those in force, and under `from_generation_config` which of them the model's file gave.
    `trace` says what was spent on each token: `layers_run`, `bits` (mean over those layers) and `signal` (at the last
    decision to halt) per row and new token, of the pass that chose it; `prompt_layers_run`, `prompt_fused_with` (index
    of the prompt token it went on in, or -1) and `prompt_signal` per prompt and token. Layers run are those after which
    a token halted or fused, or else all of them; for the last one see `qs_jax.engine.prefill.PromptTrace`. Times in
    `timing` are seconds of wall clock; `trace_s` and `compile_s` (or loading what was compiled before) are part of the
    phase in which they happened; `load_s`, of the model, is part of none. `decode_steps` are passes over the weights.
    In exact mode `timing` and, per row, `trace` have `rounds`, `drafted` and `accepted` (drafts, and those that were
    right); `trace` has the latter two by round as well, and what drafted there (`draft_by_round`), `timing` the plain
    steps among the passes as `fallback`. By token `trace` has `from_draft`, whether it was a draft, and `in_round`,
    which of the row's rounds it is of, counted from 0: -1 for the first token, which the prompt gives, and those of
    plain steps.
    """

    texts: list[str]
    pieces: list[list[str]]
    tokens: list[list[int]]
    sequences: Int[np.ndarray, "rows longest"]
    lengths: list[int]
    finish_reasons: list[FinishReason]
    logprobs: list[list[float]]
    seeds: list[int]
    settings: dict[str, Any]
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
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    layers_run: list[int] = field(default_factory=list)
    bits_read: list[int] = field(default_factory=list)
    signal: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def read(self, token: int) -> str:
        """The text that a token completes."""
        self.pieces.append(self.detokenizer.push(token) if self.detokenizer else "")
        return self.pieces[-1]

    def read_the_rest(self) -> str:
        """What is held back at the end, as the last token's."""
        rest = self.detokenizer.flush() if self.detokenizer and self.pieces else ""
        if rest:
            self.pieces[-1] += rest
        return rest


def _row(model: Model, prompt: Sequence[int], stop_strings: Sequence[str]) -> _Row:
    if model.tokenizer is None:
        return _Row(None, None)
    stops = StopStrings(model.tokenizer, prompt, stop_strings) if stop_strings else None
    return _Row(Detokenizer(model.tokenizer, prompt), stops)


class _Generation:
    """One request on its way through a session: rows grow, end, and become output."""

    def __init__(self, model: Model, prompts: Any, config: GenerationConfig, *, chunk_size: int, streaming: bool):
        self.started, self.load_seconds = time.perf_counter(), model.load_seconds
        self.settings = in_force(config, model.defaults, model.config)
        if self.settings.exact:
            chunk_size = min(chunk_size, _WATCHING_CHUNK)
        request = prepare(model, prompts, self.settings, chunk_size=chunk_size)
        bits = self.settings.bits
        self.session = Session(model.network_at(bits), request, bits=bits)
        self.request = request
        self.streaming = streaming
        self.rows = []
        for prompt in request.prompts_by_row:
            self.rows.append(_row(model, prompt, self.settings.stop_strings))

    def pieces(self) -> Iterator[StreamPiece]:
        """Run to the end; yields what each row gained in each chunk."""
        for chosen in self.session.chunks():
            for index, row in enumerate(self.rows):
                if row.finish_reason is None:
                    yield self._extend(index, row, _of_row(chosen, index))

    def _extend(self, index: int, row: _Row, chosen: Chosen) -> StreamPiece:
        tokens: list[int] = chosen.tokens.tolist()
        text, used = "", 0
        for token, finite in zip(tokens, np.isfinite(chosen.logprobs), strict=True):
            if not finite:
                row.finish_reason = "not_finite"
                break
            used += 1
            text += row.read(token) if self.streaming else ""
            row.finish_reason = self._finish_reason(row, token, len(row.tokens) + used)
            if row.finish_reason:
                break
        if row.finish_reason:
            self.session.finish(index)
        row.tokens += tokens[:used]
        for name in ("logprobs", "layers_run", "bits_read", "signal"):
            getattr(row, name).extend(getattr(chosen, name)[:used].tolist())
        if row.finish_reason and self.streaming:
            text += row.read_the_rest()
        return StreamPiece(index, text, tokens[:used], row.finish_reason)

    def _finish_reason(self, row: _Row, token: int, length: int) -> FinishReason | None:
        stopped = row.stops is not None and row.stops.push(token)
        if token in self.request.eos_token_ids:
            return "eos"
        if stopped:
            return "stop_string"
        return "length" if length >= self.request.max_new_tokens else None

    def output(self) -> GenerateOutput:
        elapsed = time.perf_counter() - self.started
        lengths = [len(row.tokens) for row in self.rows]
        decode_s = self.session.decode_seconds
        pieces = [self._pieces(row) for row in self.rows]
        return GenerateOutput(
            texts=["".join(row) for row in pieces],
            pieces=pieces,
            tokens=[row.tokens for row in self.rows],
            sequences=_rectangle([row.tokens for row in self.rows], self.settings.pad_token_id),
            lengths=lengths,
            finish_reasons=[row.finish_reason or "length" for row in self.rows],
            logprobs=[row.logprobs for row in self.rows],
            seeds=[seed for seed, _ in self.request.seeds],
            settings=_to_json(self.settings),
            trace=self._trace(),
            ledger=self.session.ledger.to_json(),
            timing={
                "load_s": self.load_seconds,
                "total_s": elapsed,
                "prefill_s": self.session.prefill_seconds,
                "decode_s": decode_s,
                "decode_steps": self.session.decode_steps,
                "trace_s": self.session.trace_seconds,
                "compile_s": self.session.compile_seconds,
                "tokens_per_second": sum(lengths) / elapsed,
                **self._drafting(),
            },
        )

    def _drafting(self) -> dict[str, float]:
        """What became of drafts, over all rows; nothing where there were none to be."""
        drafts = self.session.drafts
        if drafts is None:
            return {}
        return {
            "rounds": sum(map(len, drafts.drafted)),
            "drafted": sum(map(sum, drafts.drafted)),
            "accepted": sum(map(sum, drafts.accepted)),
            "fallback": self.session.decode_steps - self.session.rounds,
        }

    def _trace(self) -> dict[str, Any]:
        assert self.session.prefilled is not None
        prompt = self.session.prefilled.trace
        ledger = self.session.ledger
        return {
            "layers_run": [row.layers_run for row in self.rows],
            "bits": [_mean_bits(row, float(ledger.bits), adapts=ledger.policy.adapts_bits) for row in self.rows],
            "signal": [row.signal for row in self.rows],
            "prompt_layers_run": [layers.tolist() for layers in prompt.layers_run],
            "prompt_fused_with": [tokens.tolist() for tokens in prompt.fused_with],
            "prompt_signal": [values.tolist() for values in prompt.signal],
            **self._draft_trace(),
        }

    def _draft_trace(self) -> dict[str, Any]:
        if self.session.drafts is None:
            return {}
        trace = self.session.drafts.trace
        # the chunk in which a row ends may have gone on behind its end
        kept = {
            name: [places[: len(row.tokens)] for places, row in zip(trace[name], self.rows, strict=True)]
            for name in ("from_draft", "in_round")
        }
        return {**trace, **kept}

    def _pieces(self, row: _Row) -> list[str]:
        if not self.streaming:
            for token in row.tokens:
                row.read(token)
            row.read_the_rest()
        return row.pieces


def _of_row(chosen: Chosen, index: int) -> Chosen:
    """What a row emitted in a chunk."""
    emitted = chosen.emitted[:, index]
    return jax.tree.map(lambda leaf: leaf[emitted, index], chosen)


def _mean_bits(row: _Row, constant: float, *, adapts: bool) -> list[float]:
    """Precision per token, averaged over the layers it ran; the prefill's token is read at the constant one."""
    spent = zip(row.bits_read, row.layers_run, strict=True)
    return [read / ran if adapts and read else constant for read, ran in spent]


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    config: GenerationConfig | None = None,
    **overrides: Unpack[GenerationOptions],
) -> GenerateOutput:
    """Continue one prompt or a batch of them.

    Prompts are strings, chat conversations (lists of `{"role", "content"}` messages, where the tokenizer has a chat
    template) or lists of token ids, and may be of any lengths: each row gets what it would get alone.

    Args:
        model: what `qs_jax.load` returned.
        prompts: one prompt or a list of them.
        config: settings to keep and pass around; without it the defaults of `GenerationConfig`.
        **overrides: fields of `GenerationConfig` by name, in place of the config's. What neither says, the model's
            `generation_config.json` may say; `GenerateOutput.settings` has what was in force.

    Returns:
        Texts and tokens, why rows ended, and what was spent.

    Raises:
        GenerationError: an empty or over-long prompt, or a setting that is unknown or out of range.
        PolicyError: a policy that there is not, or that asks for what the model does not have.
        TokenizerError: text was given and the model has no tokenizer, or chat and it has no template.

    Example:
        >>> model = qs_jax.load("path/to/model")
        >>> qs_jax.generate(model, ["Once upon a time", "The weather"], max_new_tokens=64).texts
    """
    asked = GenerationConfig.of(config, **overrides)
    generation = _Generation(model, prompts, asked, chunk_size=CHUNK, streaming=False)
    for _ in generation.pieces():
        pass
    return generation.output()


def stream(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    config: GenerationConfig | None = None,
    **overrides: Unpack[GenerationOptions],
) -> Generator[StreamPiece, None, GenerateOutput]:
    """Like `generate`, but yields each row's text as it is made; the generator's return value is the whole output.

    The pieces of a row join to exactly the text that `generate` returns. Arguments and errors are those of
    `generate`; a bad request is refused before the first piece is asked for.

    Example:
        >>> for piece in qs_jax.stream(model, "Once upon a time", do_sample=True, temperature=0.8, seed=1):
        ...     print(piece.text, end="", flush=True)
    """
    asked = GenerationConfig.of(config, **overrides)
    generation = _Generation(model, prompts, asked, chunk_size=_STREAMING_CHUNK, streaming=True)

    def pieces() -> Generator[StreamPiece, None, GenerateOutput]:
        yield from generation.pieces()
        return generation.output()

    return pieces()


def not_finite(model: Model) -> str:
    """What to say of logits that were NaN or infinite, and what to do."""
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32"}.get(str(model.dtype))
    advice = f"load it with --dtype {wider}" if wider else "its weights are damaged or too large"
    return f"{model.name}: states and logits are not finite in {model.dtype}, so that nothing follows; {advice}"


def _to_json(settings: GenerationSettings) -> dict[str, Any]:
    """The settings that shape the output, as plain values."""
    return {
        **{name: getattr(settings, name) for name in NEUTRAL},
        "max_new_tokens": settings.max_new_tokens,
        "num_return_sequences": settings.num_return_sequences,
        "eos_token_id": list(settings.eos_token_ids),
        "pad_token_id": settings.pad_token_id,
        "stop_strings": list(settings.stop_strings),
        "bits": settings.bits,
        **({"exact": True, "draft": list(settings.draft)} if settings.exact else {}),
        "from_generation_config": list(settings.from_generation_config),
    }


def _rectangle(rows: Sequence[Sequence[int]], pad_token_id: int) -> Int[np.ndarray, "rows longest"]:
    array = np.full((len(rows), max(map(len, rows), default=0)), pad_token_id, np.int32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row
    return array
