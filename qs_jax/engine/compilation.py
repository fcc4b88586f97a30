"""How many programs were compiled, and how long that took."""

from dataclasses import dataclass

import jax

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


@dataclass
class CompileMeter:
    """Running totals for this process; subtract two readings for what happened between them."""

    programs: int = 0
    seconds: float = 0.0

    def reading(self) -> "CompileMeter":
        return CompileMeter(self.programs, self.seconds)

    def since(self, earlier: "CompileMeter") -> "CompileMeter":
        return CompileMeter(self.programs - earlier.programs, self.seconds - earlier.seconds)

    def _listen(self, event: str, duration_secs: float, **_: object) -> None:
        if event == _BACKEND_COMPILE:
            self.programs += 1
            self.seconds += duration_secs


METER = CompileMeter()
jax.monitoring.register_event_duration_secs_listener(METER._listen)
