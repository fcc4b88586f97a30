"""Resumable training state on disk: the only module that imports Orbax's manager."""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from reference_models.data import DataError


class Checkpoints:
    """The last `keep` states of one run. A save is atomic: a killed process leaves the one before it intact.

    A state is any pytree of arrays, stored flat under its leaves' paths, so that nothing depends on the classes of
    the optimiser's containers. `progress` is a JSON object beside it.
    """

    def __init__(self, folder: Path, *, keep: int, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # the user's terminal is for the user
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, enable_async_checkpointing=False, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        items = ocp.args.Composite(state=ocp.args.StandardSave(_flat(state)), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=items, force=True)

    def delete(self, step: int) -> None:
        """Remove one state, so that another can be saved as that step; the one before it stays."""
        self._manager.delete(step)

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]]:
        """The newest state, in the structure and shapes of `template`, and its progress.

        Raises:
            DataError: there is no checkpoint, or it belongs to another model.
        """
        step = self.latest
        if step is None:
            raise DataError(f"{self._manager.directory}: no checkpoint; train first")
        flat = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(template))
        items = ocp.args.Composite(state=ocp.args.StandardRestore(flat), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except ValueError as error:
            reason = " ".join(str(error).split())[:160]
            raise DataError(
                f"{self._manager.directory}: does not fit this model ({reason}); use another --work-dir"
            ) from None
        return jax.tree.unflatten(jax.tree.structure(template), list(restored["state"].values())), restored["progress"]

    def close(self) -> None:
        self._manager.close()


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        f"{index:04d}.{jax.tree_util.keystr(path, simple=True, separator='.')}": leaf
        for index, (path, leaf) in enumerate(leaves)
    }
