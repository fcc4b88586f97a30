"""Nothing compiles twice, and every jitted program lowers for cpu, cuda and tpu."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import qs_jax
from qs_jax.adaptive.policy import Fusion, Halting, Policy, Precision
from qs_jax.engine.compilation import METER
from qs_jax.engine.places import Places
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from qs_jax.request import prepare
from qs_jax.settings import in_force
from tests.recording import Call, jitted_programs, recorded
from tests.tiny import PROMPTS, SAMPLING, quantised, tiny_model

PLATFORMS = ("cpu", "cuda", "tpu")
_WITHIN = ("models.alike.", "cache.append")


def test_nothing_compiles_twice(model: Model) -> None:
    """Another prompt of another length in the same bucket, other settings, another end: the same programs."""
    qs_jax.generate(model, PROMPTS[0], max_new_tokens=40, **SAMPLING)
    before = METER.reading()
    other = {**SAMPLING, "temperature": 0.7, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 9, "eos_token_id": [1, 2]}
    qs_jax.generate(model, PROMPTS[0], max_new_tokens=40, **SAMPLING)
    qs_jax.generate(model, PROMPTS[0][::-1][:35], max_new_tokens=30, **other)
    assert METER.since(before).programs == 0


def test_the_meter_sees_a_compilation() -> None:
    before = METER.reading()
    jax.jit(lambda x: jnp.sin(x) + len(PLATFORMS))(jnp.ones((7, 3))).block_until_ready()
    assert METER.since(before).programs > 0


def dense(model: Model) -> None:
    """A cache that grows."""
    qs_jax.generate(model, PROMPTS, max_new_tokens=300)


def sampled(model: Model) -> None:
    """Several rows per prompt."""
    qs_jax.generate(model, PROMPTS[0], max_new_tokens=40, num_return_sequences=3, **SAMPLING)


def adaptive(model: Model) -> None:
    """All four mechanisms."""
    qs_jax.generate(quantised(model), PROMPTS, max_new_tokens=40, policy="paper")
    stop = Halting("relative_drift", math.inf, layers=(1,))
    sure = Precision("previous_entropy", four_below=0.5, layer=0)
    policy = Policy("stop", prompt_halting=stop, fusion=Fusion("cosine", 0.05, layers=(1,)), precision=sure)
    qs_jax.generate(quantised(model), PROMPTS, max_new_tokens=40, policy=policy)


def exact(model: Model) -> None:
    """Rounds of what is looked up, and of a cascade."""
    qs_jax.generate(model, PROMPTS, max_new_tokens=10, exact=True, draft="lookup")
    qs_jax.generate(quantised(model), PROMPTS[1], max_new_tokens=10, exact=True, draft=["bits:2", "bits:4"], **SAMPLING)


def served(model: Model) -> None:
    """Rows that join a batch, one of which samples and one of which leaves it."""
    rows = [
        prepare(model, [[1, 2, 3]], in_force(config, model.defaults, model.config), chunk_size=4)
        for config in (GenerationConfig(max_new_tokens=20), GenerationConfig(max_new_tokens=20, do_sample=True, seed=1))
    ]
    batch = Places(model.network, rows[0], most=2)
    tickets = [batch.join(row).ticket for row in rows]
    batch.step()
    batch.leave(tickets[0])
    batch.halve()


SCENARIOS = {"dense": dense, "sampled": sampled, "adaptive": adaptive, "exact": exact, "served": served}


def each_scenario(slow: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(name, scenario, marks=[pytest.mark.slow] if f"{name} {scenario}" in slow else [])
        for name in ("gpt2", "llama")
        for scenario in SCENARIOS
    ]


@cache
def calls_of(name: str, scenario: str) -> list[Call]:
    with recorded() as calls:
        SCENARIOS[scenario](tiny_model(name))
    return list({_signature(call): call for call in calls}.values())


def _signature(call: Call) -> tuple[Any, ...]:
    """Calls that differ in shapes alone lower alike."""
    leaves, structure = jax.tree.flatten((call.args, call.kwargs))
    static = tuple(str(leaf) for leaf in leaves if not isinstance(leaf, jax.ShapeDtypeStruct))
    return call.name, str(structure), static


# gpt2's adaptive programs are lowered in test_programs.py too
@pytest.mark.parametrize(("name", "scenario"), each_scenario(slow=("gpt2 adaptive", "gpt2 exact", "gpt2 served")))
@pytest.mark.parametrize(
    "platform", [pytest.param(name, marks=[pytest.mark.slow] if name == "cuda" else []) for name in PLATFORMS]
)
def test_every_program_lowers(name: str, scenario: str, platform: str) -> None:
    calls = calls_of(name, scenario)
    assert calls
    for call in calls:
        assert "func.func public @main" in call.lower(platform).as_text(), call.name


def test_no_program_is_left_out() -> None:
    """Whatever is jitted in the package is run by one of the scenarios above, but for what studies and fits run, and
    what is only traced within other programs."""
    calls = [call for scenario in SCENARIOS for call in calls_of("llama", scenario)]
    decoding = {name for name in jitted_programs() if not name.startswith(("evaluation.", "fitting.", *_WITHIN))}
    assert {call.name for call in calls} == decoding
