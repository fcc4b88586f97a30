"""What a training run does, apart from the model: a frozen recipe read from JSON."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from qs_jax.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, up to the fraction `until` of its steps, at one batch shape."""

    until: float
    batch: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """Optimiser, data mixture and batch shapes. `final_learning_rate` is a fraction of the peak.

    `patience` validations without a new minimum end the run early; None never does.
    """

    seed: int
    peak_learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta2: float
    clip_norm: float
    mixture: dict[str, float]
    phases: tuple[Phase, ...]
    validate_every: int
    validation_tokens: int
    patience: int | None

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then half a cosine down to the final fraction at `steps`."""
        if step < self.warmup_steps:
            return self.peak_learning_rate * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak_learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)

    def phase(self, step: int, steps: int) -> Phase:
        """The phase that `step` of `steps` belongs to."""
        return next((phase for phase in self.phases if step < round(phase.until * steps)), self.phases[-1])


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: the file is missing, not JSON, or lacks or misnames a field.
    """
    try:
        raw = json.loads(path.read_text("utf-8"))
        return Recipe(**{**raw, "phases": tuple(Phase(**phase) for phase in raw["phases"])})
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; see reference_models/configs") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a recipe ({error}); compare with reference_models/configs/gpt2-cpu.json"
        ) from None
