"""The errors a user can cause. Each message is one line: what is wrong, with what, and what to do."""


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
