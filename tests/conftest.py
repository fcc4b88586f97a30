"""Shared by all tests: strict numerics, and where the real data lies."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real checkpoints and text; skips the test where it is absent."""
    folder = Path(os.environ.get("QS_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set QS_JAX_DATA to run this test")
    return folder
