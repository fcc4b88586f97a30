"""A source's weights, one part at a time."""

from pathlib import Path

from convert.parts import Parts
from convert.source import source_of
from tests.folders import write_folder


def test_conversion_reads_one_part_at_a_time(tmp_path: Path) -> None:
    parts = Parts(source_of(write_folder(tmp_path / "hf", "llama")))
    names = [name for name, _ in parts]
    assert names == parts.names
    assert names == ["embedding", "blocks.0", "blocks.1", "lm_head", "output_norm"]
