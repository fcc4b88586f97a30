"""Verification of a conversion against logits."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.folders import write_folder
from tests.tiny import reference_logits, tiny_model
from tests.unit.test_conversion import assert_refused, run


def test_verification_finds_the_same_logits_and_notices_other_ones(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", "llama")
    rng = np.random.default_rng(0)
    golden = {
        "tokens": rng.integers(0, 97, 50).astype(np.int32),
        "positions": np.asarray([10, 49], np.int32),
        "logits": rng.standard_normal((2, 97)).astype(np.float32),
    }
    save_file(golden, tmp_path / "golden.safetensors")
    run_verify = ("--verify", "--golden", tmp_path / "golden.safetensors", "--json")
    assert_refused(source, tmp_path / "out", "logits differ from golden.safetensors by", *map(str, run_verify))
    golden["logits"] = reference_logits(tiny_model("llama"), golden["tokens"].tolist())[golden["positions"]]
    save_file(golden, tmp_path / "golden.safetensors")
    status, out, _ = run(source, tmp_path / "out", *run_verify)
    assert status == 0
    assert json.loads(out)["max_abs_logit_error"] < 1e-4
    assert json.loads(out)["kl"] < 1e-6
