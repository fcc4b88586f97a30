"""A converter is a table: a Hugging Face tensor name, where it goes in the module, and how it is laid out.

Kernels are stored (outputs, inputs), as in torch's `Linear`; only GPT-2's `Conv1D` kernels are transposed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qs_jax.config import ModelConfig
from qs_jax.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One tensor of a Hugging Face checkpoint and the module paths it fills.

    `{layer}` in names and paths stands for every layer. Several paths share the tensor's outputs in equal parts.
    `transposed` marks kernels stored (inputs, outputs); `padded` marks those whose rows are padded with zeros to
    the module's vocabulary size.
    """

    name: str
    paths: tuple[str, ...]
    transposed: bool = False
    padded: bool = False

    def at(self, layer: int) -> "Rule":
        fill = {"layer": layer}
        return replace(self, name=self.name.format(**fill), paths=tuple(path.format(**fill) for path in self.paths))

    def to_module(self, tensor: np.ndarray, rows: int) -> dict[str, np.ndarray]:
        """Arrays for the module, by path; `rows` is the module's total number of outputs."""
        array = tensor.T if self.transposed else tensor
        if self.padded:
            array = np.pad(array, ((0, rows - array.shape[0]), (0, 0)))
        return dict(zip(self.paths, np.split(array, len(self.paths)), strict=True))

    def from_module(self, arrays: Mapping[str, np.ndarray], vocab_size: int) -> np.ndarray:
        """The inverse of `to_module`."""
        array = np.concatenate([arrays[path] for path in self.paths])
        array = array[:vocab_size] if self.padded else array
        return np.ascontiguousarray(array.T if self.transposed else array)


@dataclass(frozen=True)
class Table:
    """An architecture's rules. `prefix` may stand before every name but `unprefixed`; `ignored` names are buffers;
    `embedding` is the table's name, which a tied head shares."""

    prefix: str
    rules: Callable[[ModelConfig], Iterable[Rule]]
    embedding: str
    unprefixed: tuple[str, ...] = (HEAD,)
    ignored: tuple[str, ...] = ()

    def find(self, names: Iterable[str], bare: str) -> str | None:
        """The tensor of that name, with or without the prefix."""
        return next((name for name in names if _bare(self, name) == bare), None)


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
    twice = [name for name in names if remaining.setdefault(_bare(table, name), name) != name]
    if config.tie_word_embeddings and (head := remaining.pop(HEAD, None)):
        # one of the two is enough, whichever the file keeps
        remaining.setdefault(table.embedding, head)
    tensors, missing, mismatched = [], [], []
    for rule in expand(table, config):
        name = remaining.pop(rule.name, None)
        if name is None:
            missing.append(_full(table, rule.name))
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
    return {_full(table, rule.name): rule.from_module(hosted, config.vocab_size) for rule in expand(table, config)}


def table_for(model_type: str) -> Table:
    """The converter of an architecture."""
    from convert import gpt2, llama

    tables = {"gpt2": gpt2.TABLE, "llama": llama.TABLE, "mistral": llama.TABLE, "qwen2": llama.TABLE}
    if model_type not in tables:
        raise ConfigError(f"model_type {model_type!r} has no converter; known: {', '.join(tables)}")
    return tables[model_type]


def _bare(table: Table, name: str) -> str:
    return name.removeprefix(table.prefix)


def _full(table: Table, name: str) -> str:
    return name if name in table.unprefixed else table.prefix + name
