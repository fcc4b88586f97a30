"""The examples of benchmarks/lm_eval_tasks, made from novels that are in the public domain.

    python -m benchmarks.make_lm_eval_tasks     # writes benchmarks/lm_eval_tasks/*.jsonl

The same text gives the same files. Passages are spread evenly over the novels, each used once.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality import NOVELS
from qs_jax.console import reporting_errors
from qs_jax.corpus import read_documents
from reference_models.data import text_folder

FOLDER = Path(__file__).parent / "lm_eval_tasks"
EXAMPLES = {"last_word": 128, "next_sentence": 100, "recite": 100, "passages": 16}
CHOICES = 4

_TITLES = (
    "Jane Eyre",
    "SHIRLEY",
    "VILLETTE",
    "BLEAK HOUSE",
    "REAT EXPECTATIONS",
    "OLIVER TWIST",
    "ADAM BEDE",
    "DANIEL DERONDA",
    "SYLVIA'S LOVERS",
    "WIVES AND DAUGHTERS",
    "The Odd Women",
    "Will Warburton",
    "THE BLACK ARROW",
    "CATRIONA",
    "THE VIRGINIANS",
    "AYALA'S ANGEL",
)
"""How the novels begin in the file: by authors who died before 1910, and none that a lens or policy was made on."""

_SENTENCE = re.compile(r"[A-Z\"'“][^.!?]*[.!?][\"'”]?(?=\s|$)")
_TITLE = re.compile(r"\b(Mr|Mrs|Dr|St|Messrs|Esq)\.")
_PLAIN = re.compile(r"[A-Za-z ,;:.!?'\"-]+")
_WORD = re.compile(r"[a-z]{4,}")


def novels() -> list[str]:
    """The novels, every line break within a paragraph a space; titles lose their full stop, which ends no sentence."""
    found = read_documents(text_folder() / NOVELS)
    chosen = [next(text for text in found if text.strip("\ufeff\n ").startswith(title)) for title in _TITLES]
    return [_TITLE.sub(r"\1", re.sub(r"\s+", " ", text)) for text in chosen]


def passages(text: str, least: int, most: int) -> Iterator[list[str]]:
    """Sentences that follow each other, of so many words together, without overlap."""
    held: list[str] = []
    words = end = 0
    for match in _SENTENCE.finditer(text):
        follows, end = not text[end : match.start()].strip(), match.end()
        if not follows or words > most or not _PLAIN.fullmatch(match[0]):
            held, words = [], 0
        if _PLAIN.fullmatch(match[0]):
            held.append(match[0])
            words += len(match[0].split())
        if least <= words <= most:
            yield held
            held, words = [], 0


def last_word(sentences: list[str]) -> dict[str, Any] | None:
    """A passage without its last full stop, whose last word stood in it before."""
    text = " ".join(sentences)
    before, _, word = text[:-1].rpartition(" ")
    if text[-1] == "." and len(sentences) > 2 and _WORD.fullmatch(word) and f" {word}" in before:
        return {"text": f"{before} {word}"}
    return None


def next_sentence(sentences: list[str]) -> dict[str, Any] | None:
    """A passage and the sentence that follows; distractors come later."""
    if len(sentences) > 2 and 8 <= len(sentences[-1].split()) <= 20:
        return {"context": " ".join(sentences[:-1]), "choices": [f" {sentences[-1]}"]}
    return None


def recite(sentences: list[str]) -> dict[str, Any] | None:
    """A passage and its last sentence, short enough to be written in full."""
    if len(sentences) > 2 and 6 <= len(sentences[-1].split()) <= 18:
        return {"passage": " ".join(sentences[:-1]), "rest": sentences[-1]}
    return None


def whole(sentences: list[str]) -> dict[str, Any] | None:
    return {"text": " ".join(sentences)}


_TASKS: dict[str, tuple[Callable[[list[str]], dict[str, Any] | None], tuple[int, int], tuple[float, float]]] = {
    "last_word": (last_word, (60, 110), (0, 0.55)),
    "next_sentence": (next_sentence, (60, 110), (0.55, 0.7)),
    "recite": (recite, (60, 110), (0.7, 0.85)),
    "passages": (whole, (220, 280), (0.85, 1)),
}
"""By task what makes an example of sentences, how many words they have, and the part of every novel that it has to
itself."""


def examples(texts: list[str]) -> dict[str, list[dict[str, Any]]]:
    """By task; of every novel as many."""
    made: dict[str, list[dict[str, Any]]] = {}
    for name, (make, words, (start, stop)) in _TASKS.items():
        share = -(-EXAMPLES[name] // len(texts))
        rows = []
        for text in texts:
            part = text[int(len(text) * start) : int(len(text) * stop)]
            found = [row for sentences in passages(part, *words) if (row := make(sentences))]
            rows.append([found[len(found) * number // share] for number in range(share)])
        made[name] = [row for of_novel in zip(*rows, strict=True) for row in of_novel][: EXAMPLES[name]]
    _with_distractors(made["next_sentence"], len(texts))
    return made


def _with_distractors(rows: list[dict[str, Any]], novels: int) -> None:
    """To each true sentence, at a place drawn at random, those of other novels."""
    random_ = random.Random(0)
    true = [row["choices"][0] for row in rows]
    for number, row in enumerate(rows):
        others = [text for place, text in enumerate(true) if place % novels != number % novels]
        row["choices"] = random_.sample(others, CHOICES - 1)
        row["label"] = random_.randrange(CHOICES)
        row["choices"].insert(row["label"], true[number])


def main() -> None:
    with reporting_errors(debug=True):
        for name, rows in examples(novels()).items():
            lines = (json.dumps(row, ensure_ascii=False) for row in rows)
            (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
            print(f"{name}: {len(rows)}")


if __name__ == "__main__":
    main()
