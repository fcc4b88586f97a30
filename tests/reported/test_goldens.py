"""Folders that load: as they are, and converted, they generate what transformers generates."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import convert.cli
import qs_jax
from tests.reported.folders import FOLDERS, NEW_TOKENS, PROMPT
from tests.reported.make_goldens import GOLDENS, reference_tokens

EXPECTED: dict[str, list[int]] = json.loads(GOLDENS.read_text())

REPORTS = {
    "tied_but_differs_llama": "huggingface/transformers pull 42612: a head of its own was overwritten by the embedding",
    "tied_and_equal": "vllm-project/vllm pull 3344: a released Qwen1.5 was tied and held its head a second time",
    "only_the_head": "huggingface/transformers issue 38870: GPT-2 saved with only its head came back with no embedding",
    "only_the_head_with_metadata": "huggingface/transformers issue 41038: the file's own note of shared names unused",
    "stale_index": "ml-explore/mlx-swift-lm pull 562: one complete file beside an index of shards that are not there",
    "stale_index_and_shards": "Blaizzy/mlx-vlm pull 1464: two sets of weights in a folder were mixed",
    "rope_theta_twice": "vllm-project/vllm pull 42624: the base outside won over the right one inside",
    "rope_scaling_beside_parameters": "marin-community/marin pull 7156: an exporter writes both on purpose",
    "gpt2_by_other_names": "nntile/nntile pull 370: GPT-2 sizes under the general names fell back to defaults",
    "ends_in_three_files": "InfiniTensor/InfiniLM pull 387: two files that end at different ids",
    "no_rope_theta": "ml-explore/mlx-lm issue 1563: no rope_theta at the top level, a missing argument",
    "no_norm_epsilon": "meta-llama/llama issue 771: another epsilon than the trained one, and worse text, silently",
    "pretraining_tp": "huggingface/transformers pull 24906: Llama 2 folders with pretraining_tp above 1",
    "padding_nobody_has": "NVIDIA/Megatron-LM issue 623: padding -1 in the first Llama tokenizers",
    "padding_beyond_the_vocabulary": "meta-llama/llama-cookbook issue 189: padding 32000 with 32000 tokens",
    "null_sizes": "llm-d/llm-d-benchmark issue 426: head_dim null in folders that transformers saved",
    "buffers": "huggingface/transformers pull 35255: leftover buffers in GPT-2 and Llama files",
}
"""The public report behind a folder, in our own words."""


def _generated(folder: Path) -> list[int]:
    model = qs_jax.load(folder, dtype="float32", compilation_cache=False)
    return qs_jax.generate(model, [PROMPT], max_new_tokens=NEW_TOKENS).tokens[0]


def test_every_folder_has_a_golden_and_every_report_a_folder() -> None:
    assert EXPECTED.keys() == FOLDERS.keys()
    assert REPORTS.keys() <= FOLDERS.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_generates_what_transformers_generates(name: str, tmp_path: Path) -> None:
    FOLDERS[name](tmp_path / "hf")
    assert _generated(tmp_path / "hf") == EXPECTED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_so_does_the_converted_folder(name: str, tmp_path: Path) -> None:
    FOLDERS[name](tmp_path / "hf")
    result = CliRunner().invoke(convert.cli.app, [str(tmp_path / "hf"), str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.stderr
    assert _generated(tmp_path / "out") == EXPECTED[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", FOLDERS)
def test_the_goldens_are_transformers_own(name: str) -> None:
    assert reference_tokens(FOLDERS[name]) == EXPECTED[name]


SILENT = {"plain_llama", "plain_gpt2", "tied_and_equal", "only_the_head", "pretraining_tp", "swish", "buffers"}
SILENT |= {"null_sizes", "gpt2_by_other_names", "ends_in_three_files"}


@pytest.mark.parametrize("name", FOLDERS)
def test_whatever_was_supplied_or_chosen_is_said(name: str, tmp_path: Path) -> None:
    """In a dry run, in the manifest, and on the model; nothing is said where there was nothing to choose."""
    FOLDERS[name](tmp_path / "hf")
    status, printed = _converting(tmp_path, "--dry-run")
    assert (status, bool(printed["notes"])) == (0, name not in SILENT), printed
    assert not (tmp_path / "out").exists()
    _converting(tmp_path)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"] == printed["notes"]
    notes = qs_jax.load(tmp_path / "hf", compilation_cache=False).notes
    assert set(printed["notes"]) <= set(notes)
    assert all(note.count("\n") == 0 for note in notes)


def _converting(folder: Path, *options: str) -> tuple[int, dict]:
    arguments = [str(folder / "hf"), str(folder / "out"), "--json", *options]
    result = CliRunner().invoke(convert.cli.app, arguments)
    return result.exit_code, json.loads(result.stdout)
