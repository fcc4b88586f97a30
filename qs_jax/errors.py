"""The errors a user can cause. Each message is one line: what is wrong, with what, and what to do.

But for the last, which only tests can meet.
"""


class QsJaxError(Exception):
    """Base of every error the package raises on purpose; the command line prints it without a traceback."""


class CheckpointError(QsJaxError):
    """A model folder or weight file is missing, truncated, mismatched or corrupt."""


class ConfigError(QsJaxError):
    """A `config.json` is missing a number, holds an absurd one, or asks for mathematics we do not implement."""


class TokenizerError(QsJaxError):
    """The tokenizer is missing or cannot encode or decode what it was given."""


class GenerationError(QsJaxError, ValueError):
    """A generation request that cannot be served: empty or over-long prompt, settings out of range."""


class PolicyError(GenerationError):
    """A policy that cannot be: an unknown field, a value out of range, or a mechanism the model has no means for."""


class EvaluationError(QsJaxError):
    """A study that cannot be made: no or too little text, windows beyond the model's context, an unreadable result."""


class StateError(AssertionError):
    """A state of the engine breaks what its docstring promises: a fault of ours, found by `validate()` in a test."""


def require(holds: bool, complaint: str) -> None:
    """For `validate()` methods, on concrete values.

    Raises:
        StateError: it does not hold.
    """
    if not holds:
        raise StateError(complaint)
