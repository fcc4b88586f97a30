"""Conversions for `tests.hostile.forking`: orders also have {"source", "overwrite"}."""

from pathlib import Path
from typing import Any

import orbax.checkpoint.experimental.v1  # noqa: F401  (imported once, before the forks)

import convert.pipeline  # noqa: F401
from convert.cli import convert as run
from tests.hostile.forking import serve


def work(order: dict[str, Any]) -> None:
    run(order["source"], Path(order["target"]), overwrite=order.get("overwrite", False))


if __name__ == "__main__":
    serve(work)
