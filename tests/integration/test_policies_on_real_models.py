"""`qs-jax generate --policy` on every real model at hand, plain and Matryoshka; its trace and its ledger agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import convert.cli
import qs_jax.cli

REFERENCE = Path(__file__).parents[2] / "reference_models"
MODELS = ("gpt2", "llama", "stories260K", "stories3M", "babyllama105")
PROMPT = "Once upon a time there was a little girl who liked to play with her dog in the park. One day, she saw a"
NEW_TOKENS = 12

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS)
def source(request: pytest.FixtureRequest) -> Path:
    if (REFERENCE / request.param).is_dir():
        return REFERENCE / request.param
    return request.getfixturevalue("data_dir") / "models" / request.param


@pytest.fixture(scope="module", params=["plain", "matryoshka"])
def folder(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / source.name
    quantize = ["--quantize", "matryoshka"] if request.param == "matryoshka" else []
    result = CliRunner().invoke(convert.cli.app, [str(source), str(target), "--dtype", "float32", *quantize, "--json"])
    assert result.exit_code == 0, result.stderr
    return target


@pytest.mark.parametrize("policy", ["paper", "balanced"])
def test_ledger_and_trace_agree(folder: Path, policy: str) -> None:
    arguments = ["generate", str(folder), "--policy", policy, "--prompt", PROMPT]
    result = CliRunner().invoke(qs_jax.cli.app, [*arguments, "--max-new-tokens", str(NEW_TOKENS), "--json"])
    assert result.exit_code == 0, result.stderr
    check(json.loads(result.stdout), json.loads((folder / "config.json").read_text()))


def check(printed: dict[str, Any], config: dict[str, Any]) -> None:
    """What the trace says token by token adds up to what the ledger says in all."""
    ledger, depth = printed["ledger"], config.get("num_hidden_layers") or config["n_layer"]
    prompt, decoded = (np.asarray(printed[name][0]) for name in ("prompt_layers_run", "layers_run"))
    decoded = decoded[1:]  # the prefill chose the first token
    assert len(decoded) == printed["lengths"][0] - 1
    assert ledger["prompt_layers_run_mean"] == pytest.approx(prompt.mean())
    assert ledger["decode_layers_run_mean"] == pytest.approx(decoded.mean() if len(decoded) else depth)
    assert ledger["layers_run_mean"] == pytest.approx(np.concatenate([prompt, decoded]).mean())
    assert 1 <= prompt.min() <= prompt.max() <= depth
    assert ledger["flops"] - ledger["probe_flops"] <= ledger["flops_off"]
    assert ledger["kv_slots"] <= ledger["kv_slots_off"] == depth * (len(prompt) + len(decoded))
    halted, fused = (prompt < depth).sum(), (np.asarray(printed["prompt_fused_with"][0]) >= 0).sum()
    assert fused <= halted
    if decoded.size:
        bits = np.average(np.asarray(printed["bits"][0])[1:], weights=decoded)
        assert ledger["bits_mean"] == pytest.approx(bits)
