"""Where a study's result goes. Imports nothing heavy: the command line asks before it loads anything."""

from pathlib import Path

from qs_jax.errors import EvaluationError


def free_target(target: Path, *, overwrite: bool) -> Path:
    """A file that may be written.

    Raises:
        EvaluationError: it is there already and not to be replaced, or its folder is not there.
    """
    if target.exists() and not overwrite:
        raise EvaluationError(f"{target} is there already; give --overwrite or another --out")
    if not target.parent.is_dir():
        raise EvaluationError(f"{target.parent}: no such folder; make it first")
    return target
