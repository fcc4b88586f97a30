"""Several devices: the tests of tests/mesh on eight simulated ones, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = "test_generation.py"
FILES = sorted(path.name for path in (ROOT / "tests" / "mesh").glob("test_*.py") if path.name != LONG)


def run_there(file: str, chosen: str) -> None:
    """The chosen tests of a file; all of them must pass."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", f"tests/mesh/{file}", "-m", chosen]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}{ran.stderr[-2000:]}"
    assert " passed" in ran.stdout


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file: str) -> None:
    run_there(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["not slow", "slow"])
def test_what_takes_longer(chosen: str) -> None:
    run_there(LONG, chosen)
