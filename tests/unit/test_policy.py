"""Policies: JSON and back, and refusals in one line."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qs_jax.adaptive.policy import Fusion, Halting, Policy, Precision, Probe
from qs_jax.errors import PolicyError

numbers = st.floats(0, 1e6) | st.just(math.inf)
layers = st.none() | st.sets(st.integers(1, 40), min_size=1, max_size=4).map(lambda chosen: tuple(sorted(chosen)))
SIGNALS = ("relative_drift", "direction_drift", "raw_drift", "attention_update", "entropy", "random")


def halting(signals: tuple[str, ...]) -> st.SearchStrategy[Halting]:
    return st.builds(
        Halting,
        signal=st.sampled_from(signals),
        thresholds=numbers | st.lists(numbers, min_size=1, max_size=4).map(tuple),
        layers=layers,
        start=st.floats(0, 1),
        step=st.integers(1, 100),
        entropy_below=st.none() | numbers,
    )


policies = st.builds(
    Policy,
    name=st.text(),
    prompt_halting=st.none() | halting(SIGNALS),
    decode_halting=st.none() | halting((*SIGNALS, "previous_entropy")),
    kv_rule=st.sampled_from(("zero", "drop", "frozen", "affine", "shallow")),
    shallow_bits=st.sampled_from((2, 4, 8)),
    fusion=st.none()
    | st.builds(
        Fusion,
        distance=st.sampled_from(("cosine", "l2")),
        thresholds=numbers,
        layers=layers,
        position=st.sampled_from(("last", "mean", "first")),
        size_bias=st.booleans(),
    ),
    precision=st.none()
    | st.builds(
        Precision,
        signal=st.sampled_from(("previous_entropy", "entropy", "random")),
        two_below=numbers,
        four_below=numbers,
        layer=st.none() | st.integers(0, 40),
        pinned=st.lists(st.integers(-40, 40), max_size=3).map(tuple),
    ),
    probe=st.builds(Probe, st.integers(0, 1000)),
    protect_first=st.integers(0, 100),
    protect_last=st.integers(1, 100),
    protect_special=st.booleans(),
    protect_rare=st.none() | st.floats(0, 1e6),
)


@given(policies)
def test_a_policy_comes_back_from_strict_json(policy: Policy) -> None:
    text = json.dumps(policy.to_json(), allow_nan=False)
    assert Policy.from_json(json.loads(text)) == policy


@pytest.mark.parametrize("name", ["off", "paper", "balanced"])
def test_a_named_policy_comes_back_from_its_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "policy.json"
    policy = Policy.of(name)
    assert policy.name == name
    policy.save(path)
    assert Policy.of(path) == Policy.of(str(path)) == Policy.of(policy) == policy
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]


def test_the_paper_is_the_paper() -> None:
    paper = Policy.paper()
    assert paper.mechanisms == ("halting", "kv_skipping", "fusion", "precision")
    assert paper.decode_halting is not None
    assert (paper.decode_halting.signal, paper.decode_halting.thresholds) == ("raw_drift", 0.045)
    assert (paper.decode_halting.entropy_below, paper.kv_rule) == (1.15, "zero")
    assert Policy.off().mechanisms == ()


def test_mechanisms_are_taken_out_one_by_one() -> None:
    paper = Policy.paper()
    assert paper.without("halting").mechanisms == ("fusion", "precision")
    assert paper.without("kv_skipping").mechanisms == ("halting", "fusion", "precision")
    assert paper.without("fusion", "precision").mechanisms == ("halting", "kv_skipping")
    assert paper.without(*paper.mechanisms).mechanisms == ()


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Halting(signal="drift"), "halting.signal is 'drift', expected one of relative_drift"),  # type: ignore[arg-type]
    (lambda: Halting(thresholds=-1.0), "halting.thresholds is -1.0"),
    (lambda: Halting(thresholds=()), "halting.thresholds is ()"),
    (lambda: Halting(thresholds=math.nan), "halting.thresholds is nan"),
    (lambda: Halting(thresholds=True), "halting.thresholds is True"),
    (lambda: Halting(layers=(3, 2)), "halting.layers is (3, 2), expected rising layer numbers"),
    (lambda: Halting(layers=(0,)), "halting.layers is (0,)"),
    (lambda: Halting(layers=()), "halting.layers is ()"),
    (lambda: Halting(start=1.5), "halting.start is 1.5"),
    (lambda: Halting(step=0), "halting.step is 0"),
    (lambda: Halting(entropy_below=-0.1), "halting.entropy_below is -0.1"),
    (lambda: Halting(entropy_source="raw_drift"), "halting.entropy_source is 'raw_drift'"),  # type: ignore[arg-type]
    (lambda: Fusion(distance="l1"), "fusion.distance is 'l1'"),  # type: ignore[arg-type]
    (lambda: Fusion(position="middle"), "fusion.position is 'middle'"),  # type: ignore[arg-type]
    (lambda: Fusion(size_bias=1), "fusion.size_bias is 1"),  # type: ignore[arg-type]
    (lambda: Fusion(thresholds=-2.0), "fusion.thresholds is -2.0"),
    (lambda: Precision(signal="relative_drift"), "precision.signal is"),  # type: ignore[arg-type]
    (lambda: Precision(two_below=-1.0), "precision.two_below is -1.0"),
    (lambda: Precision(four_below=-1.0), "precision.four_below is -1.0"),
    (lambda: Precision(layer=-1), "precision.layer is -1"),
    (lambda: Precision(pinned=(1.5,)), "precision.pinned is (1.5,)"),  # type: ignore[arg-type]
    (lambda: Probe(-1), "probe.shortlist is -1"),
    (lambda: Policy(name=3), "name is 3"),  # type: ignore[arg-type]
    (lambda: Policy(kv_rule="keep"), "kv_rule is 'keep'"),  # type: ignore[arg-type]
    (lambda: Policy(shallow_bits=3), "shallow_bits is 3"),
    (lambda: Policy(protect_first=-1), "protect_first is -1"),
    (lambda: Policy(protect_last=0), "protect_last is 0"),
    (lambda: Policy(protect_rare=-1.0), "protect_rare is -1.0"),
    (lambda: Policy(protect_rare=10**400), "protect_rare is 1000"),
    (lambda: Policy(protect_special="yes"), "protect_special is 'yes'"),  # type: ignore[arg-type]
    (lambda: Policy(prompt_halting=Halting("previous_entropy")), "prompt_halting cannot use previous_entropy"),
    (lambda: Policy.from_json({"format": 1, "probe": None}), "probe is None, expected an object, or left out"),
    (lambda: Policy.of("fast"), "policy is 'fast', expected one of off, paper, balanced"),
    (lambda: Policy.of(3), "policy is 3"),  # type: ignore[arg-type]
    (lambda: Policy.of("nowhere.json"), "nowhere.json: no such policy file"),
    (lambda: Policy.from_json([]), "a policy is a JSON object"),
    (lambda: Policy.from_json({}), "format is None, this version reads 1"),
    (lambda: Policy.from_json({"format": 2}), "format is 2"),
    (lambda: Policy.from_json({"format": 1, "speed": 1}), "policy has no speed; known: name"),
    (lambda: Policy.from_json({"format": 1, "fusion": 3}), "fusion is 3, expected an object"),
    (lambda: Policy.from_json({"format": 1, "fusion": {"layer": 3}}), "fusion has no layer; known: distance"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message[:32] for _, message in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(PolicyError, match=f"^{re.escape(message)}") as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "kv_rule": 4}', "[" * 100_000])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match=re.escape(f"{path}: ")) as caught:
        Policy.load(path)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be written"):
        Policy.off().save(tmp_path / "nowhere" / "policy.json")
