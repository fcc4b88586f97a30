"""How many programs were compiled, and how long tracing and compiling took."""

import time
from collections import deque
from dataclasses import dataclass, field

import jax

from qs_jax.hosts import agreed

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"
_TRACED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")

_MOST = 1000
"""Functions traced within one other that are remembered."""


@dataclass
class CompileMeter:
    """Running totals for this process; subtract two readings for what happened between them.

    `seconds` is compiling (or loading what was compiled before), `trace_seconds` tracing and lowering.
    """

    programs: int = 0
    seconds: float = 0.0
    trace_seconds: float = 0.0
    _traced: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_MOST), repr=False, compare=False)

    def reading(self) -> "CompileMeter":
        return CompileMeter(self.programs, self.seconds, self.trace_seconds)

    def since(self, earlier: "CompileMeter") -> "CompileMeter":
        return CompileMeter(
            self.programs - earlier.programs,
            self.seconds - earlier.seconds,
            self.trace_seconds - earlier.trace_seconds,
        )

    def agreed(self) -> "CompileMeter":
        """What the first of several processes has."""
        return CompileMeter(agreed(self.programs), agreed(self.seconds), agreed(self.trace_seconds))

    def _listen(self, event: str, duration_secs: float, **_: object) -> None:
        if event == _BACKEND_COMPILE:
            self.programs += 1
            self.seconds += duration_secs
        elif event in _TRACED:
            self._trace(time.perf_counter() - duration_secs, duration_secs)

    def _trace(self, started: float, duration: float) -> None:
        """A function that is traced within another's trace ended before it, and counts once: with the other."""
        while self._traced and self._traced[-1][0] >= started:
            self.trace_seconds -= self._traced.pop()[1]
        self._traced.append((started, duration))
        self.trace_seconds += duration


METER = CompileMeter()
jax.monitoring.register_event_duration_secs_listener(METER._listen)
