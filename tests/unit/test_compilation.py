"""What the meter of tracing and compiling counts."""

import time

import jax
import jax.numpy as jnp

from qs_jax.engine.compilation import METER, CompileMeter

TRACE = "/jax/core/compile/jaxpr_trace_duration"


def test_a_trace_within_a_trace_counts_once() -> None:
    meter, started = CompileMeter(), time.perf_counter()
    for _ in range(3):
        time.sleep(0.01)
        meter._listen(TRACE, 0.005)
    whole = time.perf_counter() - started
    meter._listen(TRACE, whole)
    assert abs(meter.trace_seconds - whole) < 1e-6
    meter._listen("/jax/core/compile/backend_compile_duration", 2.0)
    assert (meter.programs, meter.seconds) == (1, 2.0)


def test_what_jax_reports_is_counted() -> None:
    before = METER.reading()
    started = time.perf_counter()
    jax.jit(lambda x: jax.jit(lambda y: jnp.sin(y) + 41.5)(x) * 2)(jnp.ones(3))
    taken = METER.since(before)
    assert taken.programs >= 1
    assert 0 < taken.trace_seconds < time.perf_counter() - started
