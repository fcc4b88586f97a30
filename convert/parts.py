"""A model's weights part by part, from a Hugging Face source: what conversion and direct loading share."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from convert.mapping import Plan, plan, table_for
from convert.rules import HEAD, Rule
from convert.source import Source
from qs_jax.checkpoint import part_of
from qs_jax.config import ModelConfig, read_config_json
from qs_jax.errors import CheckpointError
from qs_jax.files import ModelFiles
from qs_jax.generation_defaults import read_generation_defaults
from qs_jax.models import abstract_arrays, parse_config


class Parts:
    """Everything about a source but its values: configuration, and which tensor fills which path.

    `notes` says, one line each, what was supplied, chosen or passed over. `corrections` are entries of `config.json`
    that the weights prove wrong; a converted folder has them right.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: a weight file cannot be read.
    """

    def __init__(self, source: Source):
        self.source = source
        self.notes = source.notes
        self.corrections: dict[str, Any] = {}
        self.config = self._with_own_head(hf_config(source.files, self.notes))
        read_generation_defaults(source.files, self.config.vocab_size, self.notes)
        self.shapes = {path: array.shape for path, array in abstract_arrays(self.config).items()}
        self.plan: Plan = plan(table_for(self.config.model_type), self.config, source.shapes, self.shapes)

    def _with_own_head(self, config: ModelConfig) -> ModelConfig:
        """The configuration, untied where the file holds a head that differs from the embedding, as in transformers."""
        table = table_for(config.model_type)
        head, embedding = (table.find(self.source.shapes, name) for name in (HEAD, table.embedding))
        if not config.tie_word_embeddings or head is None or embedding is None or self.source.equal(head, embedding):
            return config
        self.corrections["tie_word_embeddings"] = False
        self.notes.append(
            f"{self.source.files}: tie_word_embeddings is true, but {head} differs from {embedding}; both are used, "
            "as in transformers"
        )
        return replace(config, tie_word_embeddings=False)

    @property
    def parameters(self) -> int:
        """Number of weights in the source, tied ones once."""
        return sum(int(np.prod(self.source.shapes[name])) for name, _ in self.plan.tensors)

    @property
    def names(self) -> list[str]:
        return sorted({part_of(rule.paths[0]) for _, rule in self.plan.tensors}, key=_running_order)

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Each part's name and arrays by module path, as the model runs them; one part is in memory at a time.

        Raises:
            CheckpointError: a tensor holds NaN or infinity, or cannot be read.
        """
        self.plan.raise_if_incomplete(str(self.source.files))

        def part(entry: tuple[str, Rule]) -> str:
            return part_of(entry[1].paths[0])

        ordered = sorted(self.plan.tensors, key=lambda entry: _running_order(part(entry)))
        for name, entries in groupby(ordered, key=part):
            arrays: dict[str, np.ndarray] = {}
            for tensor, rule in entries:
                rows = sum(self.shapes[path][0] for path in rule.paths)
                arrays |= rule.to_module(self.source.read(tensor), rows)
            yield name, arrays


def _running_order(part: str) -> tuple[int, int, str]:
    """Embeddings first, then the blocks by number, then the rest."""
    kind, _, number = part.partition(".")
    stage = 0 if "embedding" in kind else 1 if kind == "blocks" else 2
    return stage, int(number or 0), part


def stored_as(array: np.ndarray, dtype: Any, path: str) -> np.ndarray:
    """The array in another dtype, contiguous.

    Raises:
        CheckpointError: a weight is too large for the dtype.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array, dtype)
    if stored.dtype != array.dtype and not np.isfinite(stored).all():
        raise CheckpointError(f"{path} does not fit {stored.dtype}: weights are too large; choose another dtype")
    return stored


def hf_config(folder: ModelFiles, notes: list[str] | None = None) -> ModelConfig:
    """A folder's configuration; `notes` takes one line for each value that was supplied, chosen or passed over."""
    return parse_config(read_config_json(folder), str(folder / "config.json"), notes)
