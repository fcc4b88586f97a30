"""Which tensor of a checkpoint fills which paths of a module, by the architecture's table, and back."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert import gpt2, llama
from convert.rules import HEAD, Rule, Table
from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]

_TABLES = {"gpt2": gpt2.TABLE, "llama": llama.TABLE, "mistral": llama.TABLE, "qwen2": llama.TABLE}


@dataclass(frozen=True)
class Plan:
    """Which source tensor fills which paths: `tensors` pairs the source's own name with its rule."""

    tensors: list[tuple[str, Rule]]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def raise_if_incomplete(self, source: str) -> None:
        """Report everything that is wrong at once.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of the wrong shape.
        """
        problems = [
            f"{len(names)} {kind} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
            for kind, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of the wrong shape", self.mismatched),
            )
            if names
        ]
        if problems:
            head = "; tie_word_embeddings false asks for a head, true takes the embedding" * (self.missing == [HEAD])
            raise CheckpointError(f"{source}: tensors {'; '.join(problems)}; the weights do not fit config.json{head}")


def expand(table: Table, config: ModelConfig) -> Iterator[Rule]:
    """Every rule of the table for every layer; an untied head is added here."""
    for rule in table.rules(config):
        layered = "{layer}" in rule.name
        yield from (rule.at(layer) for layer in range(config.num_hidden_layers)) if layered else (rule,)
    if not config.tie_word_embeddings:
        yield Rule(HEAD, ("lm_head.kernel",), padded=True)


def plan(table: Table, config: ModelConfig, names: Shapes, module: Shapes) -> Plan:
    """Match the tensors of a checkpoint, by name and shape, with the module's.

    Args:
        table: the architecture's rules.
        config: the model's configuration.
        names: name and shape of every tensor in the checkpoint.
        module: path and shape of every array of the module.
    """
    remaining: dict[str, str] = {}
    twice = [name for name in names if remaining.setdefault(table.bare(name), name) != name]
    if config.tie_word_embeddings and (head := remaining.pop(HEAD, None)):
        # one of the two is enough, whichever the file keeps
        remaining.setdefault(table.embedding, head)
    tensors, missing, mismatched = [], [], []
    for rule in expand(table, config):
        name = remaining.pop(rule.name, None)
        if name is None:
            missing.append(table.full(rule.name))
            continue
        wanted = source_shape(rule, config, module)
        if tuple(names[name]) != wanted:
            mismatched.append(f"{name} {tuple(names[name])} for {wanted}")
        tensors.append((name, rule))
    unexpected = [name for name in (*remaining.values(), *twice) if not name.endswith(table.ignored)]
    return Plan(tensors, missing, sorted(unexpected), mismatched)


def source_shape(rule: Rule, config: ModelConfig, module: Shapes) -> tuple[int, ...]:
    """The shape that the rule's tensor has in a Hugging Face checkpoint."""
    shapes = [module[path] for path in rule.paths]
    rows = config.vocab_size if rule.padded else sum(shape[0] for shape in shapes)
    shape = (rows, *shapes[0][1:])
    return shape[::-1] if rule.transposed else shape


def to_hugging_face(arrays: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face checkpoint, by name, from a module's arrays by path."""
    table = table_for(config.model_type)
    hosted = {path: np.asarray(array) for path, array in arrays.items()}
    return {table.full(rule.name): rule.from_module(hosted, config.vocab_size) for rule in expand(table, config)}


def table_for(model_type: str) -> Table:
    """The converter of an architecture."""
    if model_type not in _TABLES:
        raise ConfigError(f"model_type {model_type!r} has no converter; known: {', '.join(_TABLES)}")
    return _TABLES[model_type]
