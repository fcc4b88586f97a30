"""What the task files read: the JSON lines beside them, wherever the harness, which imports this, is started."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset


def _read(name: str, **_: Any) -> dict[str, Dataset]:
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text("utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


last_word, next_sentence, recite, passages = (
    partial(_read, name) for name in ("last_word", "next_sentence", "recite", "passages")
)
