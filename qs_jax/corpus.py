"""Text to study on: from a file, compressed or not, or a dataset of the hub."""

import gzip
import json
import lzma
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qs_jax.choices import DOCUMENTS
from qs_jax.errors import EvaluationError

HUB_DATASETS = {
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test"),
    "wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}
"""Names for `--text`: dataset, configuration and split on the hub."""

_LARGEST_BYTES = 2 * 2**30
_MOST_HUB_DOCUMENTS = 1000

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Corpus:
    """Documents in memory, and what is said of them: where they are from, and which of it they are, as a slice."""

    documents: tuple[str, ...]
    name: str
    chosen: str

    @classmethod
    def of(cls, text: "Text", documents: str = DOCUMENTS) -> "Corpus":
        """A corpus as it is, or what `read_documents` reads.

        Raises:
            EvaluationError: as `read_documents`.
        """
        if isinstance(text, Corpus):
            return text
        found = read_documents(text, documents)
        name = Path(text).name if isinstance(text, str | Path) else f"{len(text)} documents"
        return cls(tuple(found), name, documents)


Text = str | Path | Sequence[str] | Corpus
"""A file, a name in `HUB_DATASETS`, or the documents themselves."""


def read_documents(source: str | Path | Sequence[str], documents: str = DOCUMENTS) -> list[str]:
    """The documents of a text, in order.

    Args:
        source: a file, a name in `HUB_DATASETS`, or a list of documents. `.txt` and unknown endings are one document,
            or several where form feeds separate them; `.json` is a list of texts or of objects with a `text`; `.jsonl`
            has one of either per line. `.gz` and `.xz` may follow.
        documents: which of them, as a slice: `0:500`, `500:`, `-100:`.

    Raises:
        EvaluationError: no such file or dataset, damaged or not UTF-8, or no text in what was asked for.
    """
    if not isinstance(source, str | Path):
        return _chosen(_texts("the text", source), documents, "the text")
    path = Path(source)
    if path.is_file():
        found = _parse(path, _read(path))
    elif str(source) in HUB_DATASETS:
        found = _from_hub(*HUB_DATASETS[str(source)])
    else:
        raise EvaluationError(f"{source}: no such file; give a text file, or one of {', '.join(HUB_DATASETS)}")
    return _chosen(found, documents, source)


def _chosen(found: list[str], documents: str, source: str | Path) -> list[str]:
    """Of the documents that hold text, those asked for."""
    found = [text for text in found if text.strip()]
    chosen = found[_slice(documents)]
    if not chosen:
        raise EvaluationError(f"{source}: documents {documents} of {len(found)} hold no text; give others")
    return chosen


def _read(path: Path) -> str:
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise EvaluationError(f"{path}: cannot be read ({type(error).__name__}); restore the file") from None
    if len(content) > _LARGEST_BYTES:
        raise EvaluationError(f"{path}: more than {_LARGEST_BYTES >> 30} GiB of text; give a part of it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None


def _parse(path: Path, content: str) -> list[str]:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _OPENERS]
    kind = suffixes[-1] if suffixes else ""
    try:
        if kind == ".jsonl":
            return _texts(path, (json.loads(line) for line in content.splitlines() if line.strip()))
        if kind == ".json":
            return _texts(path, json.loads(content))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: not valid JSON ({type(error).__name__}); restore the file") from None
    return content.split("\f")


def _texts(path: str | Path, entries: Any) -> list[str]:
    """Texts of a list of strings or of objects with a `text`."""
    if isinstance(entries, dict | str) or not isinstance(entries, Iterable):
        raise EvaluationError(f"{path}: expected a list of texts, or of objects with a `text`")
    texts: list[str] = []
    for number, entry in enumerate(entries, start=1):
        text = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise EvaluationError(f"{path}: entry {number} is neither text nor an object with a `text`")
        texts.append(text)
    return texts


def _from_hub(name: str, configuration: str, split: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise EvaluationError(f"{name} needs the datasets package: pip install 'qs_jax[eval]'") from None
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True).take(_MOST_HUB_DOCUMENTS)
        lines = [row["text"] for row in rows]
    except Exception as error:  # the hub client raises almost anything
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(f"{name}: cannot be fetched ({reason}); give a text file instead") from None
    return ["".join(lines)] if "wikitext" in name else lines


def _slice(text: str) -> slice:
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) != 2:
        raise EvaluationError(f"documents is {text!r}, expected a slice such as 0:500, 500: or -100:")
    return slice(*numbers)
