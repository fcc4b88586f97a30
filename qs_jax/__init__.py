"""QuickSilver in pure JAX: frozen GPT-2 and Llama models that decode faster, honestly measured."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.pipeline import convert as convert
    from qs_jax.adaptive.policy import Policy as Policy
    from qs_jax.errors import QsJaxError as QsJaxError
    from qs_jax.evaluation.api import calibrate as calibrate
    from qs_jax.evaluation.api import evaluate as evaluate
    from qs_jax.evaluation.api import fit_lens as fit_lens
    from qs_jax.evaluation.api_direct import fit_direct_lens as fit_direct_lens
    from qs_jax.generation import GenerateOutput as GenerateOutput
    from qs_jax.generation import StreamPiece as StreamPiece
    from qs_jax.generation import generate as generate
    from qs_jax.generation import stream as stream
    from qs_jax.generation_config import GenerationConfig as GenerationConfig
    from qs_jax.loading import load as load
    from qs_jax.model import Model as Model

__version__ = "0.1.0"

_HOMES = {
    "GenerateOutput": "qs_jax.generation",
    "GenerationConfig": "qs_jax.generation_config",
    "Model": "qs_jax.model",
    "Policy": "qs_jax.adaptive.policy",
    "QsJaxError": "qs_jax.errors",
    "StreamPiece": "qs_jax.generation",
    "calibrate": "qs_jax.evaluation.api",
    "convert": "convert.pipeline",
    "evaluate": "qs_jax.evaluation.api",
    "fit_direct_lens": "qs_jax.evaluation.api_direct",
    "fit_lens": "qs_jax.evaluation.api",
    "generate": "qs_jax.generation",
    "load": "qs_jax.loading",
    "stream": "qs_jax.generation",
}

__all__ = [
    "GenerateOutput",
    "GenerationConfig",
    "Model",
    "Policy",
    "QsJaxError",
    "StreamPiece",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "fit_direct_lens",
    "fit_lens",
    "generate",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `qs-jax --help` does not wait for jax."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qs_jax' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
