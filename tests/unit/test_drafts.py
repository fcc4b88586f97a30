"""Drafts: what a lookup finds, what cascades hand on, and what names stand for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qs_jax
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.engine.drafts import Cascade, Lookup, Steps
from qs_jax.engine.exact import Draft
from qs_jax.engine.pacing import Way
from qs_jax.engine.replay import TextIndex
from qs_jax.errors import GenerationError, PolicyError
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from qs_jax.request import prepare
from qs_jax.settings import in_force
from tests.tiny import PROMPTS, quantised, tiny_model, with_random_lens

PLACES = 24
_continuation = jax.jit(Lookup().continuation, static_argnums=2)


def looked_up(*texts: list[int], count: int = 4) -> list[list[int]]:
    """Behind every text; what lies behind its end is rubbish."""
    rows = np.full((len(texts), PLACES), 7, np.int32)
    for row, text in enumerate(texts):
        rows[row, : len(text)] = text
    last = np.asarray([len(text) - 1 for text in texts], np.int32)
    return np.asarray(_continuation(jnp.asarray(rows), jnp.asarray(last), count)).tolist()


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], [4, 9, 1, 2]),
        ([1, 2, 3, 4, 5, 2, 3, 6, 2, 3], [6, 2, 3, 6]),  # the latest of two, which is a repetition of three
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], [4, 9, 2, 3]),  # three tokens count more than the latest two
        ([5, 5], [5, 5, 5, 5]),
        ([3, 8], [-1, -1, -1, -1]),
        ([3], [-1, -1, -1, -1]),
        ([7, 7, 8, 7, 7], [8, 7, 7, 8]),  # nothing behind the end is text
    ],
)
def test_what_follows_the_latest_occurrence_of_the_longest_ending(text: list[int], drafts: list[int]) -> None:
    assert looked_up(text) == [drafts]


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=PLACES), min_size=3, max_size=3))
def test_the_host_s_index_finds_the_same(texts: list[list[int]]) -> None:
    """Two algorithms: comparing all places at once, and a table of endings. Rows of a batch are rows alone."""
    expected = [TextIndex(text).continuation(4) or [-1] * 4 for text in texts]
    assert looked_up(*texts) == expected


def asked(model: Model, **settings: Any) -> Any:
    """How a request of exact mode drafts."""
    options = GenerationConfig.of(exact=True, **settings)
    return prepare(model, PROMPTS[:1], in_force(options, {}, model.config), chunk_size=8).drafting


DECODE = Policy("p", decode_halting=Halting("relative_drift", 0.1))


def named(model: Model, **settings: Any) -> Any:
    """The draft that a request names, which uses no other."""
    (way,) = asked(model, **settings).ways
    return way.draft


def test_names_stand_for_drafts() -> None:
    codes = with_random_lens(quantised(tiny_model("llama", 4)))
    assert named(codes, draft="lookup") == Lookup()
    bits = named(codes, draft="bits:4")
    assert (type(bits), bits.bits, bits.policy.is_off) == (Steps, 4, True)
    policy = named(codes, draft="policy", policy=DECODE)
    assert (type(policy), policy.bits, policy.policy.decode_halting.layers) == (Steps, None, (2, 3))
    lens = named(codes, draft="lens").policy
    assert (lens.decode_halting.layers, lens.kv_rule.__class__.__name__) == ((3,), "Affine")
    assert float(lens.decode_halting.thresholds[3]) == math.inf
    assert named(codes, draft=["lens:1"]).policy.decode_halting.layers == (1,)
    cascade = named(codes, draft=["lookup", "bits:2", "bits:4"])
    assert (type(cascade), type(cascade.first)) == (Cascade, Cascade)
    assert (cascade.bits, cascade.first.bits, cascade.first.first) == (4, 2, Lookup())
    assert all(isinstance(draft, Draft) for draft in (Lookup(), bits, cascade))
    (way,) = asked(codes, draft=["lookup", "bits:4"]).ways
    assert way.name == "lookup → bits:4"


def test_auto_looks_up_and_may_try_codes_at_fewer_bits() -> None:
    """Those that the model has, below what it is read at, but for 2 bits."""
    plain, codes = tiny_model("llama"), quantised(tiny_model("llama"))
    both, looked_up = quantised(tiny_model("llama"), keep_dense=True), [Way("lookup", Lookup(), n) for n in (8, 4, 2)]
    for model, bits, expected in (
        (plain, None, {}),
        (codes, None, {"bits:4": 8 / 12}),
        (codes, 4, {}),
        (both, None, {"bits:8": 12 / 36, "bits:4": 8 / 36}),
        (both, 8, {"bits:4": 8 / 12}),
    ):
        auto = asked(model, bits=bits)
        assert auto.adapts
        assert [*auto.ways[:3]] == looked_up
        assert {way.name: way.price for way in auto.ways[3:]} == expected
        assert all((way.count, way.draft.bits) == (2, int(way.name[-1])) for way in auto.ways[3:])


def test_what_cannot_draft_is_refused_in_one_line() -> None:
    dense, codes = tiny_model("llama"), quantised(tiny_model("llama"))
    prompts_only = Policy("early", prompt_halting=Halting("relative_drift", 0.1))
    refused: list[tuple[Model, dict[str, Any], str]] = [
        (dense, {"draft": "bits:4"}, "needs Matryoshka codes.*qs-convert --quantize matryoshka --keep-dense"),
        (dense, {"draft": "lens"}, "needs a lens.*qs-jax lens"),
        (with_random_lens(dense), {"draft": "lens:2"}, "lens:2 is not between.*1 to 1"),
        (codes, {"draft": "bits:4", "bits": 4}, "reads no fewer bits"),
        (codes, {"draft": "bits:8"}, "reads no fewer bits.*--keep-dense"),
        (dense, {"policy": DECODE}, "policy p is at most a draft"),
        (dense, {"draft": "policy"}, "policy off does nothing on generated tokens"),
        (dense, {"draft": "policy", "policy": prompts_only}, "policy early does nothing on generated tokens"),
    ]
    for model, options, complaint in refused:
        with pytest.raises(GenerationError, match=complaint) as raised:
            qs_jax.generate(model, PROMPTS, exact=True, **options)
        assert "\n" not in str(raised.value)
    affine = Policy("a", decode_halting=Halting("relative_drift", 0.1), kv_rule="affine")
    with pytest.raises(PolicyError, match="needs a lens"):
        qs_jax.generate(dense, PROMPTS, exact=True, draft="policy", policy=affine)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"exact": 1}, "exact is 1, expected true or false"),
        ({"exact": True, "draft": "bits:3"}, "draft is 'bits:3', expected one of auto, lookup"),
        ({"exact": True, "draft": []}, r"draft is \[\], expected one of"),
        ({"exact": True, "draft": 4}, "draft is 4, expected one of"),
        ({"exact": True, "draft": [4]}, r"draft is \[4\], expected one of"),
        ({"exact": True, "draft": "lens:-1"}, "draft is 'lens:-1', expected one of"),
        ({"exact": True, "draft": ["bits:4", "lookup"]}, "a cascade, cheapest first"),
        ({"exact": True, "draft": ["bits:4", "bits:2"]}, "a cascade, cheapest first"),
        ({"exact": True, "draft": ["bits:4", "bits:4"]}, "a cascade, cheapest first"),
        ({"exact": True, "draft": ["auto", "bits:4"]}, "a cascade, cheapest first"),
        ({"draft": "lookup"}, "draft needs exact=True"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GenerationError, match=complaint):
        GenerationConfig.of(**settings)
