"""The studies as calls: text in, a result out. What `qs-jax eval`, `calibrate` and `lens` do, by the same names."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from qs_jax.adaptive.policy import KvRuleName, Policy, StateSignalName
from qs_jax.choices import BITS, DOCUMENTS, not_among
from qs_jax.corpus import Corpus, Text
from qs_jax.engine.compilation import METER
from qs_jax.errors import EvaluationError
from qs_jax.evaluation import lens as fitting
from qs_jax.evaluation.calibration import Calibrated
from qs_jax.evaluation.defaults import (
    BATCH,
    CALIBRATION_TOKENS,
    CONFIDENCE,
    LENS_TOKENS,
    MAX_PPL_INCREASE,
    SCORED_TOKENS,
    SIGNAL,
    WINDOW,
)
from qs_jax.evaluation.goal import Goal
from qs_jax.evaluation.perplexity import passes
from qs_jax.evaluation.study import calibrate_model, calibrated_on, study, tokens_to_calibrate_on
from qs_jax.evaluation.target import free_target
from qs_jax.evaluation.windows import Plan, cut, whole
from qs_jax.lens import Lens
from qs_jax.model import Model
from qs_jax.progress import Advance, unseen

_MEASUREMENTS = 40
"""About how many a calibration takes, for a progress bar."""

_OPTIONAL = ("free_run", "table", "subject", "oracle", "calibrated")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; `to_json` is what `qs-jax eval --json` prints.

    Perplexities are per token; `perplexity_increase` is above the dense model's (`perplexity_off`), with a 95 %
    interval where there are enough windows. `kl_nats` is the mean divergence of next tokens' distributions from the
    dense model's, `top1_agreement` the share of tokens whose most likely next one is the dense model's, `bits_per_byte`
    of UTF-8 text. `ledger` says what was executed and saved, `layers_histogram` how many tokens ran how many layers.
    `logprobs` are natural logarithms per window and scored token, `samples` the first windows token by token. Times are
    seconds, medians over batches. What was not asked for is None: `free_run`, and of an ablation `table`, `subject`,
    `oracle` and `calibrated`.
    """

    model: str
    policy: Policy
    mechanisms: list[str]
    bits: int | None
    protocol: dict[str, Any]
    perplexity: float
    perplexity_off: float
    perplexity_standard_error: float
    perplexity_increase: float
    perplexity_increase_interval: list[float] | None
    bits_per_byte: float | None
    bits_per_byte_off: float | None
    kl_nats: float
    top1_agreement: float
    tokens_scored: int
    windows: int
    ledger: dict[str, float]
    layers_histogram: list[int]
    prefill_s_per_batch: float
    decode_s_per_batch: float
    compile_s: float
    logprobs: list[list[float]]
    samples: list[dict[str, Any]]
    text: str
    documents: str
    free_run: dict[str, Any] | None = None
    table: list[dict[str, Any]] | None = None
    subject: dict[str, Any] | None = None
    oracle: dict[str, Any] | None = None
    calibrated: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what was not asked for is left out."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {name: value for name, value in found.items() if name not in _OPTIONAL or value is not None}
        return {**said, "policy": self.policy.to_json()}


@dataclass(frozen=True)
class Calibration:
    """A calibration's policy and how it was arrived at; `out` is the file it was written to, if any, `timing` what it
    took: `total_s`, and of that `trace_s` and `compile_s`."""

    found: Calibrated
    text: str
    documents: str
    out: Path | None
    timing: dict[str, float]

    @property
    def policy(self) -> Policy:
        """What saves most and can be trusted to stay within the budget; off, if nothing can."""
        return self.found.policy

    def to_json(self) -> dict[str, Any]:
        """What `qs-jax calibrate --json` prints."""
        return {
            **self.found.to_json(),
            "text": self.text,
            "documents": self.documents,
            "out": None if self.out is None else str(self.out),
            "timing": self.timing,
        }


@dataclass(frozen=True)
class FittedLens:
    """A lens, on how many `tokens` it was fitted, and per layer from the second on the share of its update's variance
    that it explains on windows held out; `out` is the file it was written to, if any, `timing` as for `Calibration`."""

    lens: Lens
    tokens: int
    explained: list[float]
    out: Path | None
    timing: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What `qs-jax lens --json` prints."""
        return {
            "out": None if self.out is None else str(self.out),
            "tokens": self.tokens,
            "explained": self.explained,
            "timing": self.timing,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        return [
            f"layer {layer:3}: {share:z6.1%} of what it adds is affine in what enters it"
            for layer, share in enumerate(self.explained, start=2)
        ]


class Watch:
    """What goes by from here on."""

    def __init__(self) -> None:
        self._started, self._compiled = time.perf_counter(), METER.reading()

    @property
    def timing(self) -> dict[str, float]:
        compiled = METER.since(self._compiled)
        total = time.perf_counter() - self._started
        return {"total_s": total, "trace_s": compiled.trace_seconds, "compile_s": compiled.seconds}


def evaluate(
    model: Model,
    text: Text,
    *,
    documents: str = DOCUMENTS,
    policy: Policy | str | Path = "off",
    bits: int | None = None,
    prefix: int | None = None,
    window: int = WINDOW,
    max_tokens: int = SCORED_TOKENS,
    batch: int = BATCH,
    ablate: bool = False,
    calibration_text: Text | None = None,
    calibration_documents: str = DOCUMENTS,
    calibration_tokens: int = CALIBRATION_TOKENS,
    free_run: int = 0,
    advance: Advance = unseen,
) -> Evaluation:
    """Score text: perplexity under a policy beside the dense model's, with intervals, and what was saved.

    Args:
        model: what `qs_jax.load` returned.
        text: a file (txt, json, jsonl, each also .gz or .xz), `wikitext-103`, `wikitext-2` or `c4`, or a list of
            documents.
        documents: which documents of the text, as a slice: `0:500`, `500:`, `-100:`.
        policy: what to judge: `off`, `paper`, `balanced`, a policy file, or a `Policy`.
        bits: 8, 4 or 2, at which the policy's run reads Matryoshka weights; the dense model's are read in full.
        prefix: unscored tokens before each window; 0 scores every token. None: 512, or the power of 2 that fits.
        window: scored tokens per window.
        max_tokens: most tokens to score, in windows spread over the text.
        batch: windows run together; 1 shows what decoding alone saves.
        ablate: also every combination of the mechanisms, and baselines.
        calibration_text: with `ablate`, other text, to calibrate policies for several budgets on.
        calibration_documents: which documents of it, as a slice.
        calibration_tokens: most tokens of it to score.
        free_run: how many prefixes to continue greedily, beside the dense model.
        advance: called after every measurement, for a progress bar.

    Raises:
        EvaluationError: too little text, text that cannot be read, windows beyond the model's context, bits that there
            are not, or calibration text that is scored as well.
        PolicyError: a policy that there is not, or that asks for what the model does not have.
        GenerationError: bits are asked for and the model's weights are not Matryoshka.
        TokenizerError: the model has no tokenizer.

    Example:
        >>> found = qs_jax.evaluate(model, "test.txt", policy="policy.json")
        >>> found.perplexity_increase, found.ledger["flops_reduction"]
    """
    chosen, plan = Policy.of(policy), Plan(prefix, window, max_tokens, batch)
    if bits not in (None, *BITS):
        raise EvaluationError(not_among("bits", bits, BITS))
    if calibration_text is not None and not ablate:
        raise EvaluationError("calibration_text is for ablate; calibrate makes a policy to score")
    other = None if calibration_text is None else Corpus.of(calibration_text, calibration_documents)
    corpus = Corpus.of(text, documents)
    windows = cut(model, corpus.documents, plan)
    advance(0, total=_MEASUREMENTS if ablate else passes(windows, plan))
    found = None
    if other is not None:
        found = calibrated_on(model, other.documents, plan, calibration_tokens, judged=windows, advance=advance)
    result = study(
        model, windows, chosen, plan, bits=bits, ablated=ablate, found=found, free_runs=free_run, advance=advance
    )
    judged = Policy.from_json(result["policy"])
    return Evaluation(**{**result, "policy": judged, "text": corpus.name, "documents": corpus.chosen})


def calibrate(
    model: Model,
    text: Text,
    *,
    documents: str = DOCUMENTS,
    max_ppl_increase: float | str = MAX_PPL_INCREASE,
    confidence: float = CONFIDENCE,
    out: str | Path | None = None,
    signal: StateSignalName = SIGNAL,
    kv_rule: KvRuleName | None = None,
    prefix: int | None = None,
    window: int = WINDOW,
    max_tokens: int | None = None,
    batch: int = BATCH,
    further_text: Sequence[Text] | None = None,
    overwrite: bool = False,
    advance: Advance = unseen,
) -> Calibration:
    """Find the policy that saves most while perplexity rises no more than allowed, tested on text held back.

    Args:
        model, text, documents, prefix, window, batch, advance: as for `evaluate`; calibrate with the batch that will
            run.
        max_tokens: most tokens to score. None: 4,096, with a direct lens, whose stops are scored together, 12,288.
        max_ppl_increase: by how much perplexity may rise: points above 0, or percent of the dense model's as in `"1%"`.
        confidence: that it rises by no more, from 0.5 to below 1.
        out: policy file to write. An interrupted calibration goes on where it was when it is called again with the same
            arguments; what was measured is in a hidden file beside it. None: nothing is written (the command writes
            `policy.json` into the model's folder).
        signal: what halting looks at: `relative_drift`, `direction_drift`, `raw_drift` or `attention_update`.
        kv_rule: what deeper layers see of halted tokens, see `Policy`. None: `direct` where the model has such a lens,
            else `affine` if it has that, else `frozen`.
        further_text: texts of other kinds, whole, of which as much is taken: the budget holds on each of them.
        overwrite: replace the policy file if it is there.

    Raises:
        EvaluationError: too little text, a budget or confidence out of range, or a file that cannot be written.
        PolicyError: an unknown signal or rule, or one that the model has no means for.
        TokenizerError: the model has no tokenizer.

    Example:
        >>> policy = qs_jax.calibrate(model, "train.txt", max_ppl_increase=0.2).policy
        >>> qs_jax.generate(model, "Once upon a time", policy=policy)
    """
    watch = Watch()
    target = None if out is None else free_target(Path(out), overwrite=overwrite)
    if signal not in get_args(StateSignalName):
        raise EvaluationError(not_among("signal", signal, get_args(StateSignalName)))
    tokens = tokens_to_calibrate_on(model, kv_rule) if max_tokens is None else max_tokens
    goal, plan = Goal.of(max_ppl_increase, confidence), Plan(prefix, window, tokens, batch)
    corpus = Corpus.of(text, documents)
    texts = [corpus.documents, *(Corpus.of(one).documents for one in further_text or ())]
    windows = [replace(w, text=number) for number, one in enumerate(texts) for w in cut(model, one, plan)]
    advance(0, total=_MEASUREMENTS)
    found = calibrate_model(
        model, windows, plan, [goal], signal=signal, kv_rule=kv_rule, target=target, advance=advance
    )[0]
    if target is not None:
        found.policy.save(target)
    return Calibration(found, corpus.name, corpus.chosen, target, watch.timing)


def fit_lens(
    model: Model,
    text: Text,
    *,
    documents: str = DOCUMENTS,
    out: str | Path | None = None,
    rank: int | None = None,
    max_tokens: int = LENS_TOKENS,
    overwrite: bool = False,
    advance: Advance = unseen,
) -> FittedLens:
    """Fit the affine lens: what layers do to halted tokens, in closed form. Nothing is trained; beyond the paper.

    Args:
        model, text, documents: as for `evaluate`. Not the text that a policy is calibrated or tested on.
        out: file to write; `lens.safetensors` in a model's folder is found by `qs_jax.load`. None: nothing is written
            (the command writes it there).
        rank: of the maps, from 1 to the hidden size, which is what carrying a token costs. None: a quarter of it.
        max_tokens: most tokens to fit on, in windows spread over the text.
        overwrite: replace the file if it is there.
        advance: called after every layer, for a progress bar.

    Raises:
        EvaluationError: too little text, a rank out of range, a model of one layer, states that are not finite, or a
            file that cannot be written.
        TokenizerError: the model has no tokenizer.

    Example:
        >>> qs_jax.fit_lens(model, "some.txt", out="model/lens.safetensors").explained
        >>> model = qs_jax.load("model")  # halted tokens can follow it from here on
    """
    watch = Watch()
    target = None if out is None else free_target(Path(out), overwrite=overwrite)
    corpus = Corpus.of(text, documents)
    windows = whole(model, corpus.documents, max_tokens)
    advance(0, total=model.config.num_hidden_layers)
    fit = fitting.fit_lens(model, windows, rank=rank, advance=advance)
    if target is not None:
        fit.lens.save(target)
    return FittedLens(fit.lens, windows.size, fit.explained, target, watch.timing)
