"""Shared by all tests: strict numerics, and where the real data lies."""

import os
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from hypothesis import settings

# Tests compile far more than they compute. Read when jax first compiles; XLA aborts on flags it does not know, so the
# second is set only where it was tried.
_FLAGS = "--xla_backend_optimization_level=0"
if version("jax").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

jax.config.update("jax_numpy_dtype_promotion", "strict")

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real checkpoints and text; skips the test where it is absent."""
    folder = Path(os.environ.get("QS_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set QS_JAX_DATA to run this test")
    return folder
