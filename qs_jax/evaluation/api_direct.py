"""The direct lens as a call: text in, a lens out. What `qs-jax lens --direct` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qs_jax.choices import DOCUMENTS
from qs_jax.corpus import Corpus, Text
from qs_jax.errors import EvaluationError
from qs_jax.evaluation import tuning
from qs_jax.evaluation.api import Watch
from qs_jax.evaluation.defaults import DIRECT_LENS_TOKENS, RARE_SHARE, TUNED_LAST
from qs_jax.evaluation.direct import fit_direct, states_of
from qs_jax.evaluation.target import free_target
from qs_jax.evaluation.windows import whole
from qs_jax.hosts import refuse_several
from qs_jax.lens import DirectLens, rarity_of
from qs_jax.model import Model
from qs_jax.progress import Advance, unseen


@dataclass(frozen=True)
class FittedDirectLens:
    """A direct lens, on how many `tokens` it was fitted, and by stop: after how many layers it `looks_back`, the share
    of the variance of keys and values that it `explained` on windows held out, by layer from the stop on, and if it was
    tuned the `curve` of that: minutes, steps and KL divergence from the dense model on held-out windows, in nats per
    token. `out` and `timing` as for `FittedLens`."""

    lens: DirectLens
    tokens: int
    explained: dict[int, list[float]]
    curves: dict[int, list[dict[str, float]]]
    out: Path | None
    timing: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """What `qs-jax lens --direct --json` prints."""
        return {
            "out": None if self.out is None else str(self.out),
            "tokens": self.tokens,
            "stops": {
                one.stop: {
                    "looks_back": one.inputs,
                    "rank": len(one.down),
                    "explained": self.explained.get(one.stop),
                    "curve": self.curves.get(one.stop),
                }
                for one in self.lens.maps
            },
            "timing": self.timing,
        }

    def lines(self) -> list[str]:
        """The same for people."""
        found: list[str] = []
        for stop, explained in self.explained.items():
            found += [
                f"stop after {stop}, layer {layer:3}: {share:z6.1%} of its keys and values is linear in what it showed"
                for layer, share in enumerate(explained, start=stop + 1)
            ]
        for stop, curve in self.curves.items():
            first, best = curve[0]["held_out"], min(point["held_out"] for point in curve)
            found.append(f"stop after {stop}: tuned from {first:.4f} to {best:.4f} nats per token on windows held out")
        return found


def fit_direct_lens(
    model: Model,
    text: Text,
    stops: Sequence[int],
    *,
    documents: str = DOCUMENTS,
    out: str | Path | None = None,
    rank: int | None = None,
    tune: float = 0.0,
    resume: bool = False,
    max_tokens: int = DIRECT_LENS_TOKENS,
    overwrite: bool = False,
    advance: Advance = unseen,
) -> FittedDirectLens:
    """Fit the direct lens: keys and values of all layers that prompt tokens skip, straight from what they showed. In
    closed form; `tune` then lowers what it costs the text that follows. The model stays as it is; beyond the paper.

    Args:
        model, text, documents: as for `fit_lens`.
        stops: after how many layers prompt tokens may stop, under policies with `kv_rule` direct.
        out: file to write; `direct_lens.safetensors` in a model's folder is found by `qs_jax.load`. While it is tuned
            the file always holds the best so far. None: nothing is written (the command writes it there).
        rank: numbers kept of a token, from 1 to the hidden size. None: the hidden size.
        tune: minutes for each stop, compilation apart.
        resume: tune on from what `out` holds, in place of the closed form.
        max_tokens: most tokens to fit on, in windows spread over the text.
        overwrite: replace the file if it is there.
        advance: called after every layer and every tenth of a tuning, for a progress bar.

    Raises:
        EvaluationError: too little text, a stop or a rank out of range, minutes below 0, states that are not finite, or
            a file that cannot be written.
        CheckpointError: there is nothing to go on from, or of another model.
        TokenizerError: the model has no tokenizer.

    Example:
        >>> qs_jax.fit_direct_lens(model, "some.txt", [18], out="model/direct_lens.safetensors", tune=10).curves
        >>> model = qs_jax.load("model")  # qs_jax.calibrate tries it from here on
    """
    watch = Watch()
    refuse_several("a lens is fitted")
    if tune < 0 or not stops:
        raise EvaluationError(f"tune is {tune:g} minutes and stops are {list(stops)}; give 0 or more, and one or more")
    if resume and out is None:
        raise EvaluationError("there is nothing to resume: give the file in out")
    target = None if out is None else Path(out) if resume else free_target(Path(out), overwrite=overwrite)
    before = DirectLens.load(target, model.config) if resume and target else DirectLens(())
    known = {one.stop: one for one in before.maps}
    corpus, asked = Corpus.of(text, documents), sorted(set(stops))
    for stop in asked:
        if stop in known and not {*known[stop].inputs} <= {*states_of(stop)}:
            raise EvaluationError(f"the lens for a stop after {stop} layers reads other states; fit it anew")
    windows = whole(model, corpus.documents, max_tokens)
    last = min(TUNED_LAST, windows.shape[1] // 4)
    advance(0, total=model.config.num_hidden_layers + len(asked) * (tuning.CHECKS + 1) * (tune > 0))
    fits, seen = fit_direct(model, windows, asked, rank=rank, last=last, advance=advance)
    maps = {fit.map.stop: fit.map for fit in fits} | known
    rarity = rarity_of(windows, model.config.vocab_size) if before.rarity is None else before.rarity
    curves: dict[int, list[dict[str, float]]] = {}

    def made() -> DirectLens:
        return DirectLens(tuple(maps[stop] for stop in sorted(maps)), rarity)

    def save(found: tuning.Tuned) -> None:
        maps[found.map.stop] = found.map
        if target is not None:
            made().save(target)

    for stop in asked:
        found = None
        if tune:
            share = RARE_SHARE  # of the prompt runs under policies that calibration finds
            found = tuning.tune(model.network, maps[stop], seen, tune, share=share, keep=save, advance=advance)
        if found is not None:
            save(found)
            curves[stop] = found.curve
    lens = made()
    if target is not None:
        lens.save(target)
    explained = {fit.map.stop: fit.explained for fit in fits}
    return FittedDirectLens(lens, windows.size, explained, curves, target, watch.timing)
