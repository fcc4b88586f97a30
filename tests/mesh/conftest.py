"""Tests on eight devices: they are collected where there are so many, in a process of their own (tests/integration)."""

import jax

collect_ignore_glob = [] if jax.device_count() >= 8 else ["test_*.py"]
