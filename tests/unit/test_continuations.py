"""Continuations are scored as the model generates: in any company, at any length, under any policy."""

import math
from dataclasses import replace

import numpy as np
import pytest

from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.continuations import Continuation, Scored, _passes, score_continuations
from qs_jax.evaluation.scoring import score_alone
from qs_jax.evaluation.windows import Window
from qs_jax.generation import generate
from qs_jax.model import Model
from qs_jax.request import bind_policy
from tests.tiny import PROMPTS, quantised, reference_logits, tiny_model

STOPS = Policy("stops", prompt_halting=Halting("relative_drift", math.inf, layers=(1,)), kv_rule="drop", protect_last=1)
_random = np.random.default_rng(5)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(_random.integers(0, 97, count).tolist())


LENGTHS = [(40, 3), (5, 1), (90, 40), (1, 17), (7, 2)]
ASKED = [Continuation(tokens(context), tokens(scored)) for context, scored in LENGTHS]
ASKED += [Continuation(ASKED[0].context, tokens(count)) for count in (1, 5, 3)]


def scored(
    model: Model, asked: list[Continuation], policy: Policy | None = None, *, batch: int = 4, bits: int | None = None
) -> list[Scored]:
    bound = bind_policy(model, policy or Policy.off())
    return score_continuations(model, asked, bound, batch=batch, bits=bits)[0]


def expected(model: Model, one: Continuation) -> Scored:
    logits = reference_logits(model, [*one.context, *one.scored])[len(one.context) - 1 : -1].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    total = logprobs[np.arange(len(one.scored)), list(one.scored)].sum()
    return Scored(float(total), bool((logits.argmax(axis=-1) == one.scored).all()))


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_likelihoods_are_the_plain_forward_passs(model: Model, batch: int) -> None:
    for found, one in zip(scored(model, ASKED, batch=batch), ASKED, strict=True):
        told = expected(model, one)
        assert found.logprob == pytest.approx(told.logprob, abs=2e-4)
        assert found.greedy == told.greedy


@pytest.mark.parametrize("policy", [Policy.off(), STOPS], ids=lambda policy: policy.name)
def test_what_was_generated_is_greedy_and_scores_what_it_scored_then(policy: Policy) -> None:
    model = tiny_model("llama")
    output = generate(model, PROMPTS, policy=policy, max_new_tokens=20)
    asked = [Continuation(tuple(p), tuple(made)) for p, made in zip(PROMPTS, output.tokens, strict=True)]
    asked.append(replace(asked[0], scored=(*asked[0].scored[:-1], (asked[0].scored[-1] + 1) % 97)))
    found = scored(model, asked, policy)
    assert [one.greedy for one in found] == [True, True, True, False]
    for one, logprobs in zip(found, output.logprobs, strict=False):
        assert one.logprob == pytest.approx(sum(logprobs), abs=1e-4)


def test_a_policy_scores_as_it_does_windows() -> None:
    """And otherwise than the dense model, where a context is longer than what of it never halts."""
    model = tiny_model("llama")
    bound, dense = bind_policy(model, STOPS), scored(model, ASKED)
    found, ledger = score_continuations(model, ASKED, bound, batch=4)
    assert ledger.prompt_layers < 2 * ledger.prompt_tokens
    for one, answer, off in zip(ASKED, found, dense, strict=True):
        window = Window(one.context, one.scored, (), ())
        alone = score_alone(model, [window], bound, batch=1).logprobs.sum()
        assert answer.logprob == pytest.approx(float(alone), abs=1e-4)
        assert len(one.context) < 20 or abs(answer.logprob - off.logprob) > 1e-3


def test_bits_are_those_that_are_asked_for() -> None:
    model = quantised(tiny_model("llama"))
    output = generate(model, PROMPTS[0], bits=2, max_new_tokens=8)
    asked = [Continuation(tuple(PROMPTS[0]), tuple(output.tokens[0]))]
    (coarse,), (whole,) = scored(model, asked, bits=2), scored(model, asked)
    assert coarse.greedy
    assert coarse.logprob == pytest.approx(sum(output.logprobs[0]), abs=1e-4)
    assert abs(coarse.logprob - whole.logprob) > 1e-3


def test_the_whole_context_may_be_used() -> None:
    """512 tokens, and one more that is scored and never run."""
    model = tiny_model("llama")
    for context, count in ((600, 1), (600, 40), (1, 512)):
        one = Continuation.fitted(tokens(context), tokens(count), 512)
        assert len(one.context) + len(one.scored) == 513
        assert math.isfinite(scored(model, [one])[0].logprob)
    last = Continuation.fitted(tokens(600), tokens(1), 512)
    assert scored(model, [last])[0].logprob == pytest.approx(expected_at_the_end(model, last), abs=2e-4)


def expected_at_the_end(model: Model, one: Continuation) -> float:
    logits = reference_logits(model, list(one.context))[-1].astype(np.float64)
    return float(logits[one.scored[0]] - np.log(np.exp(logits).sum()))


@pytest.mark.parametrize(("context", "count"), [(0, 1), (3, 0), (3, 513)])
def test_what_cannot_be_scored_is_refused(context: int, count: int) -> None:
    with pytest.raises(EvaluationError, match="expected at least one"):
        Continuation.fitted(tokens(context), tokens(count), 512)


def test_passes_are_of_few_shapes_and_hold_everything() -> None:
    asked = [Continuation(tokens(20 + n), tokens(1 + n % 7)) for n in range(40)]
    asked += [Continuation(asked[n].context, tokens(4)) for n in range(10)]
    passes = list(_passes(asked, 8, 512))
    assert {number for one in passes for number in one.wanted} == set(range(50))
    assert {(len(one.contexts), len(one.wanted)) for one in passes} == {(4, 8), (8, 8)}
    for one in passes:
        copies = len(one.wanted) // len(one.contexts)
        owners = [asked[number].context for number in one.wanted]
        assert owners == [context for context in one.contexts for _ in range(copies)]
