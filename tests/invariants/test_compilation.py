"""Nothing compiles twice, and every jitted program lowers for cpu, cuda and tpu."""

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.cache import allocate
from qs_jax.engine import decode, prefill, session
from qs_jax.engine.compilation import METER
from qs_jax.engine.sampling import SamplingPlan, SamplingSettings
from qs_jax.engine.stopping import eos_array
from qs_jax.loading import Model
from tests.tiny import PROMPTS, tiny_model
from tests.unit.test_decoding import SAMPLING

PLATFORMS = ("cpu", "cuda", "tpu")
BATCH, CAPACITY, WIDTH = 3, 256, 64


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


def programs(model: Model, plan: SamplingPlan) -> dict[str, Callable[[], Any]]:
    """Every jitted program of the package, by name, ready to be traced."""
    config, network = model.config, model.network
    cache = allocate(config, BATCH, CAPACITY, jnp.dtype("float32"))
    row = jnp.ones((BATCH,), jnp.int32)
    keys = jax.random.split(jax.random.key(0), BATCH)
    seen = jnp.zeros((BATCH, config.vocab_size if plan.penalise else 0), bool)
    number = jnp.float32(0.9)
    settings = SamplingSettings(number, jnp.int32(5), number, number, number)
    logits, eos = jnp.zeros((BATCH, config.vocab_size)), eos_array([1])
    state = decode.DecodeState(row, row, cache, row > 1, row, keys, seen)
    tokens = np.zeros((BATCH, WIDTH), np.int32)
    extend = partial(prefill.extend.trace, network, tokens, jnp.int32(0), row, logits, cache)
    return {
        "engine.prefill.extend (fresh)": partial(extend, fresh=True),
        "engine.prefill.extend": partial(extend, fresh=False),
        "engine.decode.begin": partial(
            decode.begin.trace, logits, cache, row, row, keys, seen, settings, eos, plan=plan
        ),
        "engine.decode.decode_chunk": partial(
            decode.decode_chunk.trace, network, state, settings, eos, plan=plan, steps=8
        ),
        "engine.session._grow": partial(session._grow.trace, cache, 2 * CAPACITY),
        "engine.session._take_rows": partial(session._take_rows.trace, (logits, cache), np.asarray([0, 0, 1])),
        "engine.session._keys_of": partial(session._keys_of.trace, jnp.ones((BATCH, 2), jnp.int32)),
    }


@pytest.mark.parametrize(
    "plan", [SamplingPlan(), SamplingPlan(do_sample=True, penalise=True)], ids=["greedy", "sample"]
)
def test_every_program_lowers_for_every_platform(model: Model, plan: SamplingPlan) -> None:
    for name, trace in programs(model, plan).items():
        traced = trace()
        for platform in PLATFORMS:
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "stablehlo" in text or "func.func" in text, (name, platform)


def test_no_program_is_left_out() -> None:
    """Whatever is jitted in the package, under any of its names, must be in the table above."""
    names: dict[int, set[str]] = {}
    for module in pkgutil.walk_packages(qs_jax.__path__, "qs_jax."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, jax.stages.Wrapped):
                names.setdefault(id(value), set()).add(f"{module.name.removeprefix('qs_jax.')}.{name}")
    listed = {name.split()[0] for name in programs(tiny_model("gpt2"), SamplingPlan())}
    assert [sorted(aliases) for aliases in names.values() if not aliases & listed] == []
    assert listed <= set().union(*names.values())
