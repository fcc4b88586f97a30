"""A GGUF as the small files of the Hugging Face folder that it stands for; nothing is written anywhere."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from convert.gguf.entries import Entries
from convert.gguf.header import Header, Tensor, read_header, short
from convert.gguf.metadata import config_of, generation_config_of
from convert.gguf.names import TABLES, Table
from convert.gguf.tensors import same_values, tensor_values
from convert.gguf.vocabulary import has_vocabulary, tokenizer_config_of, tokenizer_of
from qs_jax.errors import CheckpointError, ConfigError, TokenizerError
from qs_jax.generation_defaults import FILE as GENERATION_CONFIG

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_MOST_SPLITS = 512


class GgufFile:
    """A GGUF, or all parts of one that was split: headers, and by `/` the small files that follow from its metadata.

    `notes` takes a line for each thing that was decided that the file leaves open.

    Raises:
        CheckpointError: a part is missing, damaged, or no GGUF.
        ConfigError: of an architecture that is not read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.notes: list[str] = []
        self.headers = [read_header(part) for part in _parts(path)]
        self.tensors: dict[str, tuple[Header, Tensor]] = {}
        for header in self.headers:
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{header.path}: tensor {name} is also in another part; get the parts again")
                self.tensors[name] = header, tensor
        metadata = self.headers[0].metadata
        architecture = metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in TABLES:
            known = ", ".join(TABLES)
            raise ConfigError(f"{path}: architecture is {short(architecture)}, which is not read; known: {known}")
        self.table: Table = TABLES[architecture]
        self.entries = Entries(path, architecture, metadata)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> "_SmallFile":
        return _SmallFile(self, name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """What `config.json` would hold. The head is tied where it is not there, or is the embedding."""
        shapes = {name: tensor.shape for name, (_, tensor) in self.tensors.items()}
        head, embedding = self.tensors.get("output.weight"), self.tensors.get("token_embd.weight")
        tied = head is None or (embedding is not None and same_values(*head, *embedding))

        def factors() -> Any:
            return tensor_values(*self.tensors["rope_freqs.weight"])

        return config_of(self.entries, shapes, factors, tied=tied, notes=self.notes)

    @cached_property
    def writers(self) -> Mapping[str, Callable[[], str]]:
        """The small files there are, by what makes them."""
        entries = replace(self.entries, error=TokenizerError)
        files: dict[str, Callable[[], str]] = {
            "config.json": lambda: _json(self.config),
            GENERATION_CONFIG: lambda: _json(generation_config_of(self.entries)),
        }
        if has_vocabulary(entries):
            files["tokenizer.json"] = lambda: tokenizer_of(entries, self.notes).to_str()
            files["tokenizer_config.json"] = lambda: _json(tokenizer_config_of(entries))
        if entries.has("tokenizer.chat_template"):
            files["chat_template.jinja"] = lambda: entries.text("tokenizer.chat_template")
        return files


@dataclass(frozen=True)
class _SmallFile:
    """As much of a path as readers of small files ask for."""

    file: GgufFile
    name: str

    def __str__(self) -> str:
        return f"{self.file} as {self.name}"

    def is_file(self) -> bool:
        return self.name in self.file.writers

    def read_text(self, encoding: str | None = None) -> str:
        """The file's text.

        Raises:
            FileNotFoundError: the GGUF stands for no such file.
            ConfigError: metadata that cannot be understood.
            TokenizerError: a vocabulary that cannot be.
        """
        if not self.is_file():
            raise FileNotFoundError(str(self))
        return self.file.writers[self.name]()

    def read_bytes(self) -> bytes:
        return self.read_text().encode("utf-8")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _parts(path: Path) -> list[Path]:
    """A file, or all the files that its name says it was split into.

    Raises:
        CheckpointError: one of them is missing.
    """
    matched = _SPLIT.fullmatch(path.name)
    if matched is None or not 1 < (count := int(matched["count"])) <= _MOST_SPLITS:
        return [path]
    suffix = path.name[-len(".gguf") :]
    parts = [path.with_name(f"{matched['stem']}-{part:05}-of-{count:05}{suffix}") for part in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{path}: {part.name} is missing beside it; get all {count} parts")
    return parts
