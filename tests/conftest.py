"""Shared by all tests: strict numerics, checked shapes, a cache of compiled programs, and where the real data lies."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import Phase, settings
from jaxtyping import install_import_hook

from tests import counting, typechecking

install_import_hook(["convert", "qs_jax"], f"{typechecking.__name__}.check")

# Tests compile far more than they compute. Read when jax first compiles; XLA aborts on flags it does not know, so the
# second is set only where it was tried.
_FLAGS = "--xla_backend_optimization_level=0"
if version("jax").startswith("0.10."):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

jax.config.update("jax_numpy_dtype_promotion", "strict")

# tracing makes many objects that stay: looking through all of them as often as Python would takes a seventh of the time
gc.set_threshold(200_000, 20, 100)

# not shrunk: a smaller policy is another program to compile, and the case as found says enough
settings.register_profile("tests", deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs between runs and share them among workers; the size limit is what makes JAX lock files."""
    jax.config.update("jax_compilation_cache_dir", str(config.rootpath / ".pytest_cache" / "xla"))
    jax.config.update("jax_compilation_cache_max_size", 2 * 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # a shell that starts tests in the background has them ignore Ctrl-C, and their children with them
    signal.signal(signal.SIGINT, signal.default_int_handler)


_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 20_000


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drop compiled programs between files when there are many: each maps memory, in pieces of which Linux grants a
    process 65,530, and XLA crashes when it is refused one."""
    if nextitem is not None and item.path != nextitem.path and _MAPS.exists():
        with _MAPS.open() as maps:
            many = sum(1 for _ in maps) > _MOST_MAPS
        if many:
            jax.clear_caches()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Here and not beside the hostile suites: under xdist the process that prints loads no other conftest."""
    if line := counting.summary(terminalreporter):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real checkpoints and text; skips the test where it is absent."""
    folder = Path(os.environ.get("QS_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set QS_JAX_DATA to run this test")
    return folder


@pytest.fixture(params=["gpt2", "llama"], scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny random model of each architecture, without a tokenizer."""
    from tests.tiny import tiny_model

    return tiny_model(request.param)
