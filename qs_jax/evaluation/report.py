"""`qs-jax report`: results of `generate`, `eval` and `calibrate` as one self-contained page."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2

from qs_jax.errors import EvaluationError
from qs_jax.evaluation.goal import broken
from qs_jax.evaluation.plot import histogram, pareto
from qs_jax.files import write_whole

_TEMPLATE = "report.html.jinja"
_EVAL_KEYS = ("model", "perplexity", "perplexity_off", "ledger", "protocol", "samples", "layers_histogram")
_CALIBRATION_KEYS = ("max_ppl_increase", "tested", "policy")
_GENERATE_KEYS = ("model", "depth", "prompts", "pieces", "settings", "ledger", "timing")

_NO_ROUND = -1


def read_result(path: Path) -> dict[str, Any]:
    """A result as `--json` printed it.

    Raises:
        EvaluationError: not JSON, or not a result of generate, eval or calibrate.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: cannot be read as JSON ({type(error).__name__}); restore the file") from None
    if not isinstance(raw, dict) or not any(
        all(key in raw for key in keys) for keys in (_EVAL_KEYS, _CALIBRATION_KEYS, _GENERATE_KEYS)
    ):
        raise EvaluationError(
            f"{path}: not a result of qs-jax generate, eval or calibrate; make it with --json and this version"
        )
    return raw


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """The page. All text in results is escaped.

    Raises:
        EvaluationError: a result lacks what the page shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qs_jax.evaluation", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "pareto": pareto,
        "histogram": histogram,
        "tokens": tokens,
        "continuation": continuation,
        "broken": broken,
    }
    environment.filters |= {"percent": _percent, "signed": _signed, "number": _number}
    studies = [result for result in results if "samples" in result]
    calibrations = [result for result in results if "tested" in result]
    generations = [{**result, "draft": _draft(result)} for result in results if "pieces" in result]
    try:
        return environment.get_template(_TEMPLATE).render(
            studies=studies, calibrations=calibrations, generations=generations
        )
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError, IndexError) as error:
        raise EvaluationError(
            f"a result lacks what the report shows ({error}); make it again with this version"
        ) from None


def tokens(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A window token by token: `saved` is the share of layers not run, `note` the tooltip."""
    depth, found = sample["depth"], []
    prompt = zip(sample["prompt"], sample["prompt_layers_run"], sample["prompt_fused_with"], strict=True)
    for text, layers, fused in prompt:
        note = f"prompt, {layers} of {depth} layers" + (", fused into a later token" if fused >= 0 else "")
        found.append({"text": text, "saved": 1 - layers / depth, "fused": fused >= 0, "low": False, "note": note})
    scored = zip(sample["text"], sample["layers_run"], sample["bits"], sample["logprobs"], strict=True)
    for text, layers, bits, logprob in scored:
        note = f"scored, {layers} of {depth} layers, {bits:.3g} bits, log-probability {logprob:.2f}"
        found.append({"text": text, "saved": 1 - layers / depth, "fused": False, "low": bits < 8, "note": note})
    for number, token in enumerate(found):
        token["scored"] = number >= len(sample["prompt"])
    return found


def continuation(result: Mapping[str, Any], row: int) -> list[dict[str, Any]]:
    """What a row of `generate` gained, token by token; `marks` are the classes that show how it was read, or in exact
    mode who made it and where a round begins."""
    depth, draft, found = result["depth"], _draft(result), []
    spent = zip(*(result[name][row] for name in ("pieces", "layers_run", "bits", "logprobs")), strict=True)
    for text, layers, bits, logprob in spent:
        note = f"{layers} of {depth} layers, {bits:.3g} bits, log-probability {logprob:.2f}"
        found.append({"text": text, "saved": 1 - layers / depth, "note": note, "marks": ["low"] if bits < 8 else []})
    if draft is not None:  # and all tokens are read alike
        _mark_rounds(
            found, draft["kind"], *(result[name][row] for name in ("draft_by_round", "from_draft", "in_round"))
        )
    return found


def _mark_rounds(
    found: list[dict[str, Any]], kind: str, drafts: list[str], from_draft: list[bool], in_round: list[int]
) -> None:
    """Say who made each token; drafts of another kind than the text's have that one's colour."""
    before = _NO_ROUND
    for token, right, number in zip(found, from_draft, in_round, strict=True):
        if number == _NO_ROUND:
            token["note"], token["marks"] = f"decoded plainly; {token['note']}", []
        else:
            draft = drafts[number]
            source, mark = (f"drafted by {draft}", "drafted") if right else ("the dense model's own", "own")
            token["note"] = f"round {number + 1}, {source}; {token['note']}"
            token["marks"] = [mark] if number == before else ["begins", mark]
            token["marks"] += [f"by-{_kind(draft)}"] if right and _kind(draft) != kind else []
        before = number


def _draft(result: Mapping[str, Any]) -> dict[str, str] | None:
    """What drafted in exact mode, and the kind that has the text's colour: that of the first."""
    if "in_round" not in result:
        return None
    used = list(dict.fromkeys(chain(*result["draft_by_round"]))) or ["nothing"]
    names = (f"the cascade {name}" if _kind(name) == "cascade" else name for name in used)
    return {"name": " and ".join(names), "kind": _kind(used[0])}


def _kind(draft: str) -> str:
    """A draft's kind, which has a colour, from its name in a trace."""
    return "cascade" if " → " in draft else draft.partition(":")[0]


def write_report(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Render to a file, which appears whole or not at all.

    Raises:
        EvaluationError: as `render`, or nothing can be written there.
    """
    page = render(results)
    try:
        write_whole(out, page)
    except OSError as error:
        raise EvaluationError(f"{out}: cannot be written ({error.strerror}); choose another place") from None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:z.1f} %"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+z.3f}".replace("-", "−")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
