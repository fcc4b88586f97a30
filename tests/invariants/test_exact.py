"""Exact mode makes the text of plain decoding, whatever is drafted, and no round more than the drafts deserve."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qs_jax
from benchmarks.break_even import Scripted
from qs_jax.adaptive.binding import bind, dense
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.kv_rules import Means
from qs_jax.adaptive.ledger import PassCosts
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.cache import allocate
from qs_jax.engine import session as sessions
from qs_jax.engine.compilation import METER
from qs_jax.engine.drafts import Lookup, Steps
from qs_jax.engine.exact import exact_round
from qs_jax.engine.pacing import Pacing, Way
from qs_jax.engine.replay import TextIndex
from qs_jax.engine.sampling import Sampling
from qs_jax.model import Model
from qs_jax.models import parse_config, random_network
from tests.invariants.cases import (
    GPT2_DROP,
    GPT2_FROZEN,
    GPT2_SHALLOW,
    GPT2_ZERO,
    LLAMA_AFFINE,
    LLAMA_DROP,
    LLAMA_LADDER,
    Case,
    each,
    halfway,
)
from tests.invariants.rounds import CLOSE, COUNT, Ran, assert_same, run, script
from tests.invariants.running import SPECIAL_IDS, imagine_rounds, step_arguments
from tests.invariants.test_ledger import WIDER
from tests.tiny import CONFIGS, PROMPTS, SAMPLING, quantised, tiny_model, with_random_lens

TOKENS = 14
_random = np.random.default_rng(8)
ROWS = [_random.integers(12, 97, length).tolist() for length in (16, 5, 11, 1)]
NAMES = ("gpt2", "llama")


def rounds_of(text: Sequence[int], drafts: Sequence[int], count: int) -> list[int]:
    """How many drafts each round accepts, of a text whose first token is the prompt's: counted by hand."""
    accepted, at = [], 1
    while at < len(text):
        right = 0
        while right < count and at + right < len(text) and drafts[at + right] == text[at + right]:
            right += 1
        accepted.append(right)
        at += right + 1
    return accepted


def assert_told(exact: Ran) -> None:
    """The trace says of tokens what it says of rounds: each has its right drafts, and then one that was no draft."""
    assert exact.session.drafts is not None
    trace = exact.session.drafts.trace
    for row, tokens in enumerate(exact.tokens):
        expected = [(False, -1)]
        for number, accepted in enumerate(trace["accepted_by_round"][row]):
            expected += [(True, number)] * accepted + [(False, number)]
        assert len(expected) - len(tokens) in (0, 1)  # a draft that was right may be the last token
        assert [*zip(trace["from_draft"][row], trace["in_round"][row], strict=True)] == expected[: len(tokens)]


GREEDY = Sampling.of()
SAMPLED = Sampling.of(do_sample=True, temperature=1.3, top_p=0.9, top_k=40, repetition_penalty=1.2)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(data=st.data())
def test_text_is_plain_whatever_is_drafted(name: str, sampling: Sampling, data: st.DataObject) -> None:
    """Drafts that are right, wrong or missing anywhere, ends of text anywhere, limits anywhere; in a ragged batch."""
    model, new_tokens = tiny_model(name), data.draw(st.integers(1, TOKENS))
    free = run(model, ROWS, TOKENS, sampling=sampling)
    eos = data.draw(st.lists(st.sampled_from(sorted({*free.tokens[0][1:], *free.tokens[2][1:]})), max_size=1))
    plain = run(model, ROWS, new_tokens, eos=eos, sampling=sampling)
    drafts = script(ROWS, free.tokens)
    for row, prompt in enumerate(ROWS):
        for place in data.draw(st.sets(st.integers(1, TOKENS - 1), max_size=6)):
            drafts[row, len(prompt) + place] = data.draw(st.integers(-1, 96))
    exact = run(model, ROWS, new_tokens, Scripted(jnp.asarray(drafts)), eos=eos, sampling=sampling)
    assert_same(exact, plain)
    for row, prompt in enumerate(ROWS):
        assert exact.accepted[row] == rounds_of(plain.tokens[row], drafts[row, len(prompt) :].tolist(), COUNT)
    assert_told(exact)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_that_is_always_right_and_one_that_never_is(sampling: Sampling) -> None:
    model = tiny_model("llama")
    plain = run(model, ROWS, TOKENS, sampling=sampling)
    right = script(ROWS, plain.tokens)
    oracle = run(model, ROWS, TOKENS, Scripted(jnp.asarray(right)), sampling=sampling)
    liar = run(model, ROWS, TOKENS, Scripted(jnp.asarray((right + 1) % 97)), sampling=sampling)
    assert_same(oracle, plain)
    assert_same(liar, plain)
    assert oracle.accepted == [[3, 3, 3, 1]] * len(ROWS)  # 13 tokens after the prompt's, of which 3 are no drafts
    assert liar.accepted == [[0] * (TOKENS - 1)] * len(ROWS)
    assert (oracle.session.decode_steps, liar.session.decode_steps) == (4, TOKENS - 1)


def test_rows_that_are_done_are_dropped() -> None:
    """Once three of four rows have ended the device goes on with fewer, at the last one's own pace."""
    model, tokens = tiny_model("llama"), 60
    free = run(model, ROWS, tokens).tokens
    ends = [next(token for token in free[row][2:] if token not in free[2]) for row in (0, 1, 3)]
    plain = run(model, ROWS, tokens, eos=ends)
    exact = run(model, ROWS, tokens, Lookup(), eos=ends)
    assert_same(exact, plain)
    assert_told(exact)
    assert exact.rows_held[0] == 4 > exact.rows_held[-1]
    assert sum(exact.accepted[2]) + len(exact.accepted[2]) in (tokens - 1, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_places_of_the_context(name: str) -> None:
    """Drafts reach beyond it, and what is beyond has neither a slot nor a position."""
    model = with_random_lens(tiny_model(name))
    limit = model.config.max_position_embeddings
    prompts = [_random.integers(12, 97, limit - short).tolist() for short in (9, 10)]
    plain = run(model, prompts, 9)
    exact = run(model, prompts, 9, Lookup(), count=8)
    assert_same(exact, plain)
    halting = Halting("relative_drift", math.inf, layers=(1,))
    policy = Policy("early", decode_halting=halting, kv_rule="affine")
    lens = Steps(bind(policy, model.config, Means(lens=True)))
    assert_same(run(model, prompts, 9, lens), plain)


@each((GPT2_FROZEN, LLAMA_DROP), slow=(GPT2_ZERO, GPT2_DROP, LLAMA_AFFINE, GPT2_SHALLOW, LLAMA_LADDER))
def test_a_policy_drafts(case: Case) -> None:
    """Under any policy: what drafts write is taken back, and what they remember is the dense model's."""
    policy = bind(
        halfway(case, 0.5),
        case.model.config,
        Means.of(case.model.network),
        special_ids=SPECIAL_IDS,
    )
    plain = run(case.model, ROWS, TOKENS)
    exact = run(case.model, ROWS, TOKENS, Steps(policy))
    assert_same(exact, plain)
    drafts = exact.session.drafts
    assert drafts is not None
    assert 0 < sum(map(sum, drafts.accepted)) <= sum(map(sum, drafts.drafted))


def test_the_policy_that_is_off_drafts_the_text_itself() -> None:
    """But for rounding, which turned none of these tokens: drafts see all that the dense model sees."""
    model = tiny_model("llama")
    exact = run(model, ROWS, TOKENS, Steps(dense(model.config)))
    assert exact.accepted == [[3, 3, 3, 1]] * len(ROWS)


def calls(model: Model, **options: Any) -> list[Any]:
    """The same request plainly and in exact mode."""
    draft = options.pop("draft")
    plain = qs_jax.generate(model, PROMPTS, max_new_tokens=33, **options)
    return [plain, qs_jax.generate(model, PROMPTS, max_new_tokens=33, exact=True, draft=draft, **options)]


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param("bits:4", marks=pytest.mark.slow),
        ("lookup", "bits:4"),
        pytest.param(("bits:2", "bits:4"), marks=pytest.mark.slow),
        pytest.param(("lookup", "bits:2", "bits:4"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_codes_draft_for_codes(draft: str | tuple[str, ...]) -> None:
    plain, exact = calls(quantised(tiny_model("llama")), draft=draft)
    assert exact.tokens == plain.tokens
    assert exact.ledger["draft_bytes"] > 0
    assert exact.timing["accepted"] > 0


@pytest.mark.parametrize(
    "sampled", [pytest.param({}, id="greedy"), pytest.param(SAMPLING, id="sampled", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("draft", ["bits:8", "bits:4", ("lookup", "bits:4")], ids=str)
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def test_codes_draft_for_the_dense_weights_beside_them(
    name: str, draft: str | tuple[str, ...], sampled: dict[str, Any]
) -> None:
    """The text is that of a model without codes; what a round verifies reads dense weights, its drafts read codes."""
    model, plain = quantised(tiny_model(name), keep_dense=True), tiny_model(name)
    text = qs_jax.generate(plain, PROMPTS[:2], max_new_tokens=33, **sampled)
    exact = qs_jax.generate(model, PROMPTS[:2], max_new_tokens=33, exact=True, draft=draft, **sampled)
    assert exact.tokens == text.tokens
    assert exact.timing["accepted"] > 0
    assert exact.ledger["weight_bytes_off"] == text.ledger["weight_bytes_off"]
    assert exact.ledger["bits_mean"] == 32


@pytest.mark.parametrize("bits", [8, 4])
def test_drafts_read_the_bytes_of_codes_and_passes_those_of_dense_weights(bits: int) -> None:
    """Counted by hand: what remains of the run without drafts are passes over dense weights."""
    plain, codes = tiny_model("llama"), quantised(tiny_model("llama"))
    model, row = quantised(plain, keep_dense=True), ROWS[:1]
    ledger = run(model, row, TOKENS, Steps(dense(model.config), bits)).session.ledger
    alone = run(plain, row, TOKENS).session.ledger
    prompt = alone.run.weight_bytes - (TOKENS - 1) * Costs.of(plain.network).step_bytes()
    drafts, rest = divmod(ledger.draft_bytes, Costs.of(codes.network).step_bytes(bits))
    assert (rest, drafts >= 10) == (0, True)
    passes, rest = divmod(ledger.run.weight_bytes - ledger.draft_bytes - prompt, Costs.of(plain.network).step_bytes())
    assert (rest, 4 <= passes < TOKENS - 1) == (0, True)
    assert ledger.twin == alone.twin


@pytest.mark.parametrize("sampled", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_a_text_may_be_drafted_in_every_way_in_turn(sampled: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `auto` chooses among, in any order: the same text, told apart by round, and nothing compiled anew."""
    model = quantised(tiny_model("llama"), keep_dense=True)
    text = qs_jax.generate(tiny_model("llama"), PROMPTS[:2], max_new_tokens=60, **sampled)

    def in_turn(turns: Iterator[int]) -> Any:
        def choose(pacing: Any, *_: Any) -> Way | None:
            ways = [pacing._ways[1], None, *pacing._ways[3:]]
            return ways[next(turns) % len(ways)]

        return choose

    before = METER.reading()
    for first in range(2):
        monkeypatch.setattr(Pacing, "choose", in_turn(itertools.count(first)))
        before = METER.reading()
        exact = qs_jax.generate(model, PROMPTS[:2], exact=True, max_new_tokens=60, **sampled)
        assert exact.tokens == text.tokens
        for row, names in enumerate(exact.trace["draft_by_round"]):
            assert set(names) == {"lookup", "bits:8", "bits:4"}
            assert len(names) == exact.trace["rounds"][row] == len(exact.trace["accepted_by_round"][row])
    assert METER.since(before).programs == 0


def test_several_sequences_of_a_prompt() -> None:
    """With top-k, top-p and a penalty: each draws its own tokens, and the same as without drafts."""
    plain, exact = calls(tiny_model("llama"), draft="lookup", num_return_sequences=2, **SAMPLING)
    assert exact.tokens == plain.tokens
    assert len({tuple(tokens) for tokens in exact.tokens}) == 2 * len(PROMPTS)


def test_stop_strings_and_streaming() -> None:
    """A text that stops within a round stops there, and its pieces join to it."""
    model, prompt = tiny_model("llama", tokenizer=True), "once upon a time"
    free = qs_jax.generate(model, prompt, max_new_tokens=30)
    options: dict[str, Any] = {"max_new_tokens": 30, "stop_strings": free.texts[0][11:13]}
    plain = qs_jax.generate(model, prompt, **options)
    exact: Any = None
    pieces, stream = [], qs_jax.stream(model, prompt, exact=True, draft="lookup", **options)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as ended:
            exact = ended.value
            break
    assert exact.finish_reasons == plain.finish_reasons == ["stop_string"]
    assert (exact.tokens, exact.texts) == (plain.tokens, plain.texts)
    assert "".join(piece.text for piece in pieces) == plain.texts[0]
    assert [len(exact.trace[name][0]) for name in ("from_draft", "in_round")] == exact.lengths * 2


@pytest.mark.parametrize("name", NAMES)
def test_rounds_are_the_oracle_s(name: str) -> None:
    """In float64, one token at a time, and taken back by hand: the same text, as many drafts right a round."""
    model, prompt = tiny_model(name), PROMPTS[0]
    tokens, accepted, margin = imagine_rounds(model, prompt, 40, lambda text: TextIndex(text).continuation(COUNT))
    assert margin > CLOSE
    exact = run(model, [prompt], 40, Lookup())
    assert exact.tokens == [tokens]
    assert exact.accepted == [accepted]
    assert 0 < sum(accepted) < 39


def test_another_text_and_other_numbers_compile_nothing() -> None:
    model = with_random_lens(tiny_model("gpt2", 4))

    def again(share: float, first: int, temperature: float) -> None:
        bound = bind(halfway(GPT2_FROZEN, share), model.config, special_ids=SPECIAL_IDS)
        sampling = Sampling.of(do_sample=True, temperature=temperature)
        run(model, [[first, *row[1:]] for row in ROWS], TOKENS - first % 3, Steps(bound), sampling=sampling)

    again(0.5, 12, 1.0)
    before = METER.reading()
    again(0.45, 13, 0.7)
    again(0.6, 20, 1.4)
    assert METER.since(before).programs == 0


def test_an_interrupt_between_rounds_leaves_nothing_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = run(model, ROWS, TOKENS)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "exact_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qs_jax.generate(model, ROWS, max_new_tokens=TOKENS, exact=True, draft="lookup")
    assert_same(run(model, ROWS, TOKENS, Lookup()), plain)


def test_the_ledger_counts_passes_and_drafts_beside_the_twin() -> None:
    """The twin is the plain request; a pass costs by its tokens, kept or not, and reads the weights once."""
    model, row = tiny_model("llama"), ROWS[:1]
    plain = run(model, row, TOKENS).session.ledger
    right = Scripted(jnp.asarray(script(row, run(model, row, TOKENS).tokens)))
    exact, drafted = (run(model, row, TOKENS, draft).session.ledger for draft in (right, Steps(dense(model.config))))
    assert exact.twin == drafted.twin == plain.twin
    assert exact.run.kv_slots == plain.run.kv_slots
    costs = PassCosts(plain.costs, 1, [64] * model.config.num_hidden_layers, plain.bits)
    steps, passes = costs.of(TOKENS - 1, 1), costs.of(4, COUNT + 1)
    for tally in (exact.run, drafted.run):
        own = drafted if tally is drafted.run else exact
        assert tally.flops - own.draft_flops == plain.run.flops - steps.flops + passes.flops
        assert tally.weight_bytes - own.draft_bytes == plain.run.weight_bytes - steps.weight_bytes + passes.weight_bytes
    assert (exact.draft_flops, exact.draft_bytes) == (0, 0)
    # three rounds of three drafts; in the last one token remains, and one is drafted
    assert drafted.draft_flops == costs.of(10, 1).flops
    assert drafted.draft_bytes == 10 * plain.costs.step_bytes()


def test_the_ledger_of_a_pass_is_xla_s_own_count() -> None:
    """Within 2 % on a model wide enough: a round whose drafts cost nothing."""
    config = parse_config({**CONFIGS["llama"], **WIDER["llama"]}, "test")
    network = random_network(config, seed=0)
    _, state, _, controls = step_arguments(
        Model(config, network, None, jnp.dtype("float32"), "wide"), Policy.off(), rows=2, capacity=256
    )
    cache = tuple(allocate(config, 2, 256, jnp.dtype("float32")) for _ in range(config.num_hidden_layers))
    history = jnp.zeros((2, 256), jnp.int32)
    lowered: Any = jax.jit(exact_round, static_argnums=5).lower(
        network, replace(state, cache=cache), history, Scripted(history), controls, 4
    )
    counted = lowered.cost_analysis()["flops"]
    costs = Costs.of(network)
    expected = PassCosts(costs, 2, [256] * config.num_hidden_layers, costs.bits).of(1, 5).flops
    assert counted == pytest.approx(expected, rel=0.02)


def test_tokens_that_end_a_text_are_known_in_the_middle_of_a_round() -> None:
    """A right draft behind the end is no token of the text."""
    model = tiny_model("llama")
    free = run(model, ROWS[:1], TOKENS).tokens[0]
    inside = [place for place in range(2, TOKENS) if (place - 1) % (COUNT + 1) < COUNT]
    end = next(place for place in inside if free[place] not in free[:place])
    exact = run(model, ROWS[:1], TOKENS, Scripted(jnp.asarray(script(ROWS[:1], [free]))), eos=[free[end]])
    assert exact.tokens == [free[: end + 1]]
    assert sum(exact.accepted[0]) + len(exact.accepted[0]) == end + 1  # the end itself was a right draft
