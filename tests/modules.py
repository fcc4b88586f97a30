"""The package's modules, as far as what is installed lets them be imported."""

import importlib
import pkgutil
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

NEEDS = {"qs_jax.lm_eval": "lm_eval"}
"""Modules of an extra that only tests of parity install, and what it brings."""


def modules_of(package: ModuleType) -> Iterator[ModuleType]:
    """Every module of a package, but those of an extra that is not installed."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if info.name not in NEEDS or find_spec(NEEDS[info.name]):
            yield importlib.import_module(info.name)
