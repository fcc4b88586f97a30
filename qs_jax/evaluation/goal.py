"""What a calibration is asked for: by how much perplexity may rise, and how surely by no more."""

from dataclasses import dataclass

from qs_jax.errors import EvaluationError
from qs_jax.evaluation.defaults import CONFIDENCE

_NAMED = "calibrated +"


@dataclass(frozen=True)
class Goal:
    """Perplexity may rise by `budget`; the chance that a chosen policy truly exceeds it is at most 1 - `confidence`.

    The budget is in points of perplexity; `relative` ones are a share of the dense model's.
    """

    budget: float
    confidence: float = CONFIDENCE
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.budget < float("inf"):
            raise EvaluationError(f"max-ppl-increase is {self.said}, expected a number above 0, or percent")
        if not 0.5 <= self.confidence < 1:
            raise EvaluationError(f"confidence is {self.confidence}, expected from 0.5 to below 1")

    @classmethod
    def of(cls, budget: float | str, confidence: float = CONFIDENCE) -> "Goal":
        """A number of points, or percent such as `1%`.

        Raises:
            EvaluationError: neither, or not above 0; a confidence out of range.
        """
        said = str(budget).strip()
        try:
            number = float(said.removesuffix("%"))
        except ValueError:
            raise EvaluationError(
                f"max-ppl-increase is {said!r}, expected points such as 0.2 or percent such as 1%"
            ) from None
        return cls(number / 100 if said.endswith("%") else number, confidence, said.endswith("%"))

    @property
    def said(self) -> str:
        """The budget as it is asked for."""
        return f"{100 * self.budget:g}%" if self.relative else f"{self.budget:g}"

    @property
    def name(self) -> str:
        """Of the policy that is found for it."""
        return _NAMED + self.said

    def points(self, perplexity_off: float) -> float:
        """The budget in points, where the dense model's perplexity is this."""
        return self.budget * perplexity_off if self.relative else self.budget


def broken(name: str, increase: float, perplexity_off: float) -> str | None:
    """What to say of a policy by this name whose perplexity rose by so much: nothing, unless it was calibrated for
    less."""
    if not name.startswith(_NAMED):
        return None
    try:
        goal = Goal.of(name.removeprefix(_NAMED))
    except EvaluationError:  # somebody's own name
        return None
    if increase <= goal.points(perplexity_off):
        return None
    share = f" ({increase / perplexity_off:+.1%})" if goal.relative else ""
    return f"above its budget on this text: calibrated for at most +{goal.said}, it costs {increase:+.3f}{share}"
