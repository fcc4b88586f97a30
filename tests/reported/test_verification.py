"""`--verify` is a gate: logits that differ leave no folder, and what was not compared is said.

huggingface/optimum issue 1755: an export "succeeded" with logits off by 1,923.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import convert.cli
from qs_jax.config import RopeConfig
from qs_jax.config_reader import ConfigReader
from tests.folders import tensors_of, write_folder
from tests.tiny import reference_logits, tiny_model

TOKENS = np.random.RandomState(0).randint(0, 97, 50).astype(np.int32)
POSITIONS = np.asarray([10, 49], np.int32)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))


def verified(folder: Path, logits: np.ndarray, *options: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a conversion that is compared with these logits."""
    golden = {"tokens": TOKENS, "positions": POSITIONS, "logits": logits.astype(np.float32)}
    save_file(golden, folder / "golden.safetensors")
    against = ["--verify", "--golden", str(folder / "golden.safetensors")]
    result = CliRunner().invoke(
        convert.cli.app, [str(folder / "hf"), str(folder / "out"), *against, "--json", *options]
    )
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(params=["gpt2", "llama"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Where a folder lies as `hf`, and the logits it should have."""
    write_folder(tmp_path / "hf", request.param)
    return tmp_path, reference_logits(tiny_model(request.param), TOKENS.tolist())[POSITIONS]


def test_the_right_logits_pass(source: tuple[Path, np.ndarray]) -> None:
    folder, logits = source
    status, out, _ = verified(folder, logits)
    printed = json.loads(out)
    assert (status, printed["verified_tokens"], printed["verified_against"]) == (0, 50, "golden.safetensors")
    assert printed["max_abs_logit_error"] < 1e-4
    assert printed["logit_error"] < printed["logit_error_tolerance"] == 5e-3
    assert "not_verified" not in printed


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--dtype", "bfloat16"),
        pytest.param(("--quantize", "matryoshka", "--group-size", "16"), marks=pytest.mark.slow),
    ],
)
def test_what_rounding_does_passes_and_a_wrong_logit_does_not(
    source: tuple[Path, np.ndarray], options: tuple[str, ...]
) -> None:
    """linkedin/Liger-Kernel issue 742: one bound for all fails sound models, or hides wrong ones."""
    folder, logits = source
    status, _, err = verified(folder, logits, *options)
    assert status == 0, err
    (folder / "out").rename(folder / "before")
    wrong = logits.copy()
    wrong[:, 7] += 2 * logits.std()
    status, out, err = verified(folder, wrong, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "logits differ from golden.safetensors by" in err
    assert sorted(path.name for path in folder.iterdir()) == ["before", "golden.safetensors", "hf"]


def test_one_wrong_logit_is_enough_where_nothing_is_rounded(source: tuple[Path, np.ndarray]) -> None:
    folder, logits = source
    logits[1, 7] += 0.02 * logits.std()
    assert verified(folder, logits)[0] == 2


def test_a_number_that_is_none_passes_no_gate(source: tuple[Path, np.ndarray]) -> None:
    """ROCm/MIOpen pull 1400: a comparison with NaN is false, so that the worst of errors verified."""
    folder, logits = source
    logits[0, 0] = np.nan
    status, out, err = verified(folder, logits)
    assert (status, out) == (2, "")
    assert "logits hold NaN" in err
    assert not (folder / "out").exists()


GOLDENS_THAT_CANNOT_BE: dict[str, dict[str, np.ndarray]] = {
    "no tokens": {"tokens": np.zeros(0, np.int32)},
    "tokens in two rows": {"tokens": TOKENS[None]},
    "tokens that are none": {"tokens": TOKENS.astype(np.float32)},
    "tokens below zero": {"tokens": TOKENS - 50},
    "tokens beyond the context": {"tokens": np.tile(TOKENS, 11)},
    "no positions": {"positions": np.zeros(0, np.int32)},
    "one position": {"positions": np.asarray(3, np.int32)},
    "positions below zero": {"positions": POSITIONS - 20},
}


@pytest.mark.parametrize("name", GOLDENS_THAT_CANNOT_BE)
def test_a_golden_file_that_cannot_be_is_one_line(name: str, source: tuple[Path, np.ndarray]) -> None:
    folder, logits = source
    golden = {"tokens": TOKENS, "positions": POSITIONS, "logits": logits, **GOLDENS_THAT_CANNOT_BE[name]}
    save_file(golden, folder / "golden.safetensors")
    against = ["--verify", "--golden", str(folder / "golden.safetensors")]
    result = CliRunner().invoke(convert.cli.app, [str(folder / "hf"), str(folder / "out"), *against])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "golden.safetensors: " in result.stderr
    assert not (folder / "out").exists()


def test_logits_that_are_all_alike_can_be_verified(tmp_path: Path, without_torch: None) -> None:
    tensors = tensors_of("llama")
    tensors["lm_head.weight"] = np.zeros_like(tensors["lm_head.weight"])
    write_folder(tmp_path / "hf", "llama", tensors)
    result = CliRunner().invoke(convert.cli.app, [str(tmp_path / "hf"), str(tmp_path / "out"), "--verify"])
    assert result.exit_code == 0, result.stderr


def test_another_models_logits_are_refused_before_anything_is_overwritten(source: tuple[Path, np.ndarray]) -> None:
    folder, logits = source
    assert verified(folder, logits)[0] == 0
    before = (folder / "out" / "manifest.json").read_bytes()
    assert verified(folder, -logits, "--overwrite")[0] == 2
    assert (folder / "out" / "manifest.json").read_bytes() == before


def test_without_torch_it_says_what_was_not_compared(tmp_path: Path, without_torch: None) -> None:
    write_folder(tmp_path / "hf", "llama")
    result = CliRunner().invoke(convert.cli.app, [str(tmp_path / "hf"), str(tmp_path / "out"), "--verify"])
    assert result.exit_code == 0, result.stderr
    assert "verified_against: the original's weights, run by qs_jax" in result.stdout
    assert "not_verified: the mathematics against transformers" in result.stdout


@pytest.mark.parity
def test_with_torch_transformers_is_asked_and_a_wrong_reading_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a rotary embedding were read wrongly: the weights are right, the mathematics is not."""
    write_folder(tmp_path / "hf", "llama")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--verify", "--json"]
    result = CliRunner().invoke(convert.cli.app, arguments)
    assert json.loads(result.stdout)["verified_against"] == "transformers"
    monkeypatch.setattr(ConfigReader, "rope", lambda _: RopeConfig(theta=20.0))
    result = CliRunner().invoke(convert.cli.app, [*arguments, "--overwrite"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "logits differ from transformers by" in result.stderr
