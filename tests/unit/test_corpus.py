"""Text is read in every form, and refused in one line where it is none."""

import gzip
import lzma
from pathlib import Path

import pytest

from qs_jax.corpus import read_documents
from qs_jax.errors import EvaluationError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\ftwo\f \f", ["one", "two"]),
        ("a.json", b'["one", {"text": "two"}]', ["one", "two"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n\n"two"\n', mtime=0), ["one", "two"]),
        ("a.txt.xz", lzma.compress("é".encode()), ["é"]),
    ],
)
def test_text_is_read_in_every_form(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name) == expected
    assert read_documents(tmp_path / name, "-1:") in (expected[-1:], expected)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b" \n", "hold no text"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 at byte 0"),
        ("a.json", b'{"text": "x"}', "expected a list"),
        ("a.json", b"[1]", "entry 1 is neither"),
        ("a.json", b"[" * 10**5, "not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{', "not valid JSON"),
        ("a.txt.xz", lzma.compress(b"x" * 1000)[:-20], "cannot be read"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
    ],
)
def test_bad_text_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=complaint):
        read_documents(tmp_path / name)
