"""Rows join a running batch and leave it, and none is different for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import qs_jax
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.engine.compilation import METER
from qs_jax.engine.places import Alone, Gain, Places
from qs_jax.engine.session import Request
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from qs_jax.request import prepare
from qs_jax.settings import in_force
from tests.tiny import quantised, tiny_model

CHUNK = 4
_STOP = Halting("relative_drift", 0.35)
HALF = Policy("half", prompt_halting=_STOP, decode_halting=_STOP, kv_rule="drop")
PENALISED = {"repetition_penalty": 1.3}


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    settings: dict[str, Any]


def request(model: Model, asked: Asked) -> Request:
    settings = in_force(GenerationConfig.of(None, **asked.settings), model.defaults, model.config)
    return prepare(model, [asked.prompt], settings, chunk_size=CHUNK)


def some(seed: int, count: int = 7, longest: int = 30, **common: Any) -> list[Asked]:
    """Requests of all lengths, every second of which samples, each in its own way."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        sampled = {
            "do_sample": True,
            "temperature": float(random.uniform(0.5, 2)),
            "top_k": int(random.integers(5, 50)),
            "top_p": 0.9,
            "seed": int(random.integers(100)),
        }
        settings = {"max_new_tokens": int(random.integers(1, 40)), **common, **(sampled if number % 2 else {})}
        found.append(Asked(random.integers(0, 97, int(random.integers(3, longest))).tolist(), settings))
    return found


def together(model: Model, asked: Sequence[Asked], *, most: int = 4, seed: int = 0) -> list[list[Gain]]:
    """All of them through one batch, joining when chance has it; what each gained."""
    requests = [request(model, one) for one in asked]
    random, batch = np.random.default_rng(seed), Places(model.network, requests[0], most=most)
    waiting, found, who = list(range(len(asked))), [[] for _ in asked], {}
    while waiting or batch.live:
        while waiting and batch.free and (not batch.live or random.random() < 0.5):
            number = waiting.pop(0)
            gain = batch.join(requests[number])
            who[gain.ticket] = number
            found[number].append(gain)
        for gain in batch.step() if batch.live else ():
            found[who[gain.ticket]].append(gain)
    for ticket in who:
        batch.leave(ticket)
    return found


def tokens(gains: Sequence[Gain]) -> list[int]:
    return [token for gain in gains for token in gain.chosen.tokens.tolist()]


@pytest.mark.parametrize(
    ("name", "common"),
    [
        pytest.param("llama", {}, id="dense"),
        pytest.param("gpt2", PENALISED, id="penalised"),
        pytest.param("llama", {"policy": HALF}, id="halting"),
        pytest.param("gpt2", {"policy": HALF}, id="gpt2-halting", marks=pytest.mark.slow),
    ],
)
def test_a_row_that_joins_is_the_row_alone(name: str, common: dict[str, Any]) -> None:
    model = tiny_model(name)
    asked = some(1, **common)
    for one, gains in zip(asked, together(model, asked), strict=True):
        alone = qs_jax.generate(model, one.prompt, None, **one.settings)
        assert tokens(gains) == alone.tokens[0]
        assert [n for gain in gains for n in gain.chosen.layers_run.tolist()] == alone.trace["layers_run"][0]
        logprobs = [value for gain in gains for value in gain.chosen.logprobs.tolist()]
        np.testing.assert_allclose(logprobs, alone.logprobs[0], atol=1e-4)
        assert gains[0].prompt is not None
        assert gains[0].prompt.layers_run[0].tolist() == alone.trace["prompt_layers_run"][0]
        assert [gain.over for gain in gains] == [False] * (len(gains) - 1) + [True]


def test_at_fewer_bits_a_row_that_joins_is_the_row_alone() -> None:
    model = quantised(tiny_model("llama"))
    asked = some(2, 4)
    read = replace(model, network=model.network_at(4))
    for one, gains in zip(asked, together(read, asked), strict=True):
        assert tokens(gains) == qs_jax.generate(model, one.prompt, None, bits=4, **one.settings).tokens[0]


def test_caches_grow_for_a_row_that_is_longer() -> None:
    model = tiny_model("llama")
    asked = [
        Asked([3, 4, 5], {"max_new_tokens": 60}),
        Asked(list(range(90)) * 3, {"max_new_tokens": 30}),  # more slots than a batch begins with
        Asked([9] * 240, {"max_new_tokens": 40}),  # and grows beyond them while it runs
    ]
    for one, gains in zip(asked, together(model, asked), strict=True):
        assert tokens(gains) == qs_jax.generate(model, one.prompt, None, **one.settings).tokens[0]


def test_joining_compiles_nothing() -> None:
    """Once a batch of each size has run greedily and sampled, on prompts of these widths."""
    model = tiny_model("llama")
    for seed in range(3):
        together(model, some(seed, 12, 16), seed=seed)
    before = METER.reading()
    for seed in range(10, 16):
        together(model, some(seed, 9, 16), seed=seed)
    assert METER.since(before).programs == 0


def test_a_batch_grows_and_shrinks() -> None:
    model = tiny_model("llama")
    long = request(model, Asked([1, 2, 3], {"max_new_tokens": 60}))
    short = request(model, Asked([4, 5], {"max_new_tokens": 3}))
    batch, sizes = Places(model.network, long, most=3), []
    first = batch.join(long)
    found = [first]
    for _ in range(2):
        batch.join(short)
    assert (batch.live, batch.free, batch.size) == (3, 0, 3)
    with pytest.raises(ValueError, match="no place"):
        batch.join(short)
    while batch.live:
        found += [gain for gain in batch.step() if gain.ticket == first.ticket]
        sizes.append(batch.size)
    assert sizes[0] == 3
    assert sizes[-1] == 1
    assert tokens(found) == qs_jax.generate(model, [1, 2, 3], max_new_tokens=60).tokens[0]


def test_a_row_that_leaves_takes_nothing_with_it() -> None:
    model = tiny_model("llama")
    asked = [request(model, Asked([n, n + 1], {"max_new_tokens": 20})) for n in (1, 5, 9)]
    batch = Places(model.network, asked[0], most=2)
    first, second = batch.join(asked[0]), batch.join(asked[1])
    batch.step()
    ledger = batch.leave(first.ticket)
    assert ledger.to_json()["kv_slots"] == 2 * (2 + CHUNK)
    third = batch.join(asked[2])
    assert third.ticket not in (first.ticket, second.ticket)
    alone = [qs_jax.generate(model, [n, n + 1], max_new_tokens=20).tokens[0] for n in (5, 9)]
    rows = {second.ticket: alone[0][: 1 + CHUNK], third.ticket: tokens([third])}
    while batch.live:
        for gain in batch.step():
            rows[gain.ticket] += tokens([gain])
    assert list(rows.values()) == alone


def test_what_rows_spent_adds_up_to_what_ran() -> None:
    """Shares of a chunk are those of its tokens; a row's own tokens are counted as they are alone."""
    model = tiny_model("llama")
    asked = [request(model, Asked([n, 3, 4], {"max_new_tokens": 13, "policy": HALF})) for n in (1, 5)]
    batch = Places(model.network, asked[0], most=2)
    tickets = [batch.join(one).ticket for one in asked]
    while batch.live:
        batch.step()
    ledgers = [batch.leave(ticket).to_json() for ticket in tickets]
    alone = [qs_jax.generate(model, [n, 3, 4], max_new_tokens=13, policy=HALF).ledger for n in (1, 5)]
    for name in ("kv_slots", "kv_slots_off", "layers_run_mean"):
        assert [one[name] for one in ledgers] == [one[name] for one in alone]
    # two prompts and 12 steps together, where each alone takes a prompt and 12 steps
    assert sum(one["weight_bytes_off"] for one in ledgers) == round(14 / 13 * alone[0]["weight_bytes_off"])


def test_logits_are_handed_out_where_they_are_kept() -> None:
    model = tiny_model("llama")
    one = replace(request(model, Asked([1, 2, 3], {"max_new_tokens": 6})), keep_logits=True)
    batch = Places(model.network, one, most=2)
    gains = [batch.join(one)]
    while batch.live:
        gains += batch.step()
    for gain in gains:
        assert gain.chosen.logits.shape == (len(gain.chosen.tokens), model.config.vocab_size)
        assert gain.chosen.logits.argmax(axis=-1).tolist() == gain.chosen.tokens.tolist()


@pytest.mark.parametrize("end", ["length", "eos"])
def test_exact_mode_runs_alone(end: str) -> None:
    model, prompt = tiny_model("llama"), [5, 6, 7] * 5
    plain = qs_jax.generate(model, prompt, max_new_tokens=40).tokens[0]
    ends: dict[str, Any] = {"eos_token_id": plain[20]} if end == "eos" else {}
    expected = qs_jax.generate(model, prompt, None, max_new_tokens=40, **ends)
    batch = Alone(model.network)
    one = request(model, Asked(prompt, {"max_new_tokens": 40, "exact": True, "draft": "lookup", **ends}))
    assert (batch.live, batch.free) == (0, 1)
    gains = [batch.join(one)]
    assert (batch.live, batch.free) == (1, 0)
    with pytest.raises(ValueError, match="no place"):
        batch.join(one)
    while batch.live:
        gains += batch.step()
    assert tokens(gains) == expected.tokens[0]
    assert len([mark for gain in gains for mark in gain.from_draft]) == len(tokens(gains))
    assert batch.leave(0).to_json()["kv_slots"] > 0
    assert batch.free == 1


def test_only_what_is_alike_may_join() -> None:
    model = tiny_model("llama")
    plain = request(model, Asked([1], {"max_new_tokens": 4}))
    batch = Places(model.network, plain, most=2)
    with pytest.raises(ValueError, match="no place"):
        batch.join(request(model, Asked([1], {"max_new_tokens": 4, **PENALISED})))
    with pytest.raises(ValueError, match="no row"):
        batch.step()
