"""The training text: four sources, each cut once and for all into training and held-out documents."""

import json
import lzma
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qs_jax.errors import QsJaxError

_WRAPPED_WIDTH = 100
_FULL_LINE = 0.75
_ARTICLE_TITLE = re.compile(r"(?<![^\s]) ?(?== [^=\n]+ = \n)")


class DataError(QsJaxError):
    """A training text is missing or is not what its name says."""


@dataclass(frozen=True)
class Source:
    """One body of text. `held_out` documents are for validation only; `held_out_note` names them in the model card."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_note: str


def text_folder() -> Path:
    """Where the raw text lies: `$QS_JAX_DATA/text`, or `../shared/data/text` beside the repository.

    Raises:
        DataError: there is no such folder.
    """
    root = Path(os.environ.get("QS_JAX_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (root / "text").is_dir():
        raise DataError(f"{root / 'text'}: no such folder; set QS_JAX_DATA to the folder that holds text/")
    return root / "text"


def load_sources(folder: Path) -> dict[str, Source]:
    """Read every source from `folder`, by name.

    Raises:
        DataError: a file is missing or malformed.
    """
    return {name: _read(folder / file, name, reader) for name, (file, reader) in _READERS.items()}


def _read(path: Path, name: str, reader: Callable[[str, str], Source]) -> Source:
    try:
        content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        raw = content.decode("utf-8")
        source = reader(name, raw)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; restore the file or set QS_JAX_DATA") from None
    except (ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise DataError(f"{path}: not the expected format ({type(error).__name__}); restore the file") from None
    if set(source.train) & set(source.held_out):
        raise DataError(f"{path}: a document is in both training and held-out text; remove the duplicate")
    return source


def _novels(name: str, raw: str) -> Source:
    books = [unwrap(book) for book in re.split("\f\n(?=\ufeff)", raw)]
    titles = "Wilkie Collins, The Legacy of Cain; Wilkie Collins, The Woman in White; Virginia Woolf, To the Lighthouse"
    return Source(name, tuple(books[:-3]), tuple(books[-3:]), f"the last 3 of {len(books)} books: {titles}")


def _wikitext(name: str, raw: str) -> Source:
    passages: list[str] = json.loads(raw)
    note = f"the last 50 of {len(passages)} passages"
    return Source(name, _articles(passages[:-50]), _articles(passages[-50:]), note)


def _articles(passages: list[str]) -> tuple[str, ...]:
    """Consecutive passages continue each other: join them, then cut at article titles."""
    return tuple(article.strip() for article in _ARTICLE_TITLE.split(" ".join(passages)) if article.strip())


def _c4(name: str, raw: str) -> Source:
    documents = [json.loads(line)["text"].strip() for line in raw.splitlines()]
    return Source(name, *_without_duplicates(documents, 100), f"the last 100 of {len(documents)} documents")


def _tinystories(name: str, raw: str) -> Source:
    stories = [_with_plain_quotes(story).strip() for story in json.loads(raw)]
    return Source(name, *_without_duplicates(stories, 100), f"the last 100 of {len(stories)} stories")


def _with_plain_quotes(story: str) -> str:
    """Undo UTF-8 quotes that were once read as Windows-1252, and write every quote as most stories do, in ASCII."""
    for wrong, right in (("â€œ", '"'), ("â€™", "'"), ("â€", '"'), ("“", '"'), ("”", '"')):
        story = story.replace(wrong, right)
    return story


def _without_duplicates(documents: list[str], held_out: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hold out the last documents, and drop their copies from the rest."""
    kept = documents[-held_out:]
    return tuple(d for d in documents[:-held_out] if d not in set(kept)), tuple(kept)


def unwrap(book: str) -> str:
    """Undo hard line wrapping, so that a model learns sentences and not a line length; blank line per paragraph.

    A book is taken as wrapped when nearly all its lines are short; a line continues on the next one when it is
    nearly full.
    """
    lines = [line.strip() for line in re.sub("[\f\ufeff]", "", book).split("\n")]
    lengths = [len(line) for line in lines if line]
    width = float(np.percentile(lengths, 95)) if lengths else 0.0
    if width >= _WRAPPED_WIDTH:
        return "\n\n".join(line for line in lines if line)
    paragraphs: list[str] = []
    continues = False
    for line in lines:
        if line and continues:
            paragraphs[-1] += " " + line
        elif line:
            paragraphs.append(line)
        continues = len(line) >= _FULL_LINE * width
    return "\n\n".join(paragraphs)


_READERS: dict[str, tuple[str, Callable[[str, str], Source]]] = {
    "tinystories": ("tinystories_train_first1000.json", _tinystories),
    "c4": ("c4-sample.jsonl", _c4),
    "wikitext": ("wikitext_train_1000_passages.json", _wikitext),
    "novels": ("novels.txt.xz", _novels),
}
