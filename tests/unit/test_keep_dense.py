"""A folder that holds dense weights and codes of them is both folders at once, to the last bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.adaptive.policy import Halting, Policy, Precision
from qs_jax.checkpoint import MANIFEST
from qs_jax.errors import CheckpointError
from qs_jax.fitting.rounding import round_to_nearest
from qs_jax.kernels import TwofoldKernel, at_bits, weights
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.models import arrays_by_path, forward
from tests.folders import write_folder
from tests.tiny import PROMPTS
from tests.unit.test_conversion import assert_refused, run

CODES = {"quantize": "matryoshka", "group_size": 16}
BLOCKS = {"exclude": "^embedding|^lm_head"}
SLOW = pytest.mark.slow
PAIRED = [
    pytest.param("gpt2", {}, id="tied, head in codes", marks=SLOW),
    pytest.param("gpt2", BLOCKS, id="tied, head dense", marks=SLOW),
    pytest.param("llama", {}, id="untied, head in codes", marks=SLOW),
    pytest.param("llama", BLOCKS, id="untied, head dense"),
]


def entry(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())["quantization"]


def said(model: Model, **options: Any) -> tuple[Any, ...]:
    """All of a request's outcome but its times."""
    output = qs_jax.generate(model, PROMPTS[:2], max_new_tokens=10, **options)
    return output.tokens, output.logprobs, output.trace, output.ledger


def assert_same_logits(found: Any, expected: Any) -> None:
    tokens = jnp.asarray([PROMPTS[0]])
    np.testing.assert_array_equal(jax.jit(forward)(found, tokens), jax.jit(forward)(expected, tokens))


@pytest.mark.parametrize(("name", "options"), PAIRED)
def test_it_is_the_dense_folder_and_at_fewer_bits_the_one_of_codes(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    source = write_folder(tmp_path / "hf", name)
    dense_report = qs_jax.convert(source, tmp_path / "dense")
    codes_report = qs_jax.convert(source, tmp_path / "codes", **CODES, **options)
    both_report = qs_jax.convert(source, tmp_path / "both", **CODES, **options, keep_dense=True)
    dense, codes, both = (load(tmp_path / n, compilation_cache=False) for n in ("dense", "codes", "both"))
    assert_same_logits(both.network, dense.network)
    assert said(both) == said(dense)
    for bits in (8, 4, 2):
        assert_same_logits(at_bits(both.network, bits), at_bits(codes.network, bits))
        assert said(both, bits=bits) == said(codes, bits=bits)
    held = [leaf for leaf in weights(both.network) if isinstance(leaf, TwofoldKernel)]
    kept, packed = entry(tmp_path / "both")["dense"], entry(tmp_path / "both")["bytes"]
    assert kept == {"dtype": "float32", "bytes": sum(leaf.weights.nbytes for leaf in held)}
    assert packed == sum(leaf.nbytes for kernel in held for leaf in jax.tree.leaves(kernel.codes))
    assert both_report.bytes_out == dense_report.bytes_out + packed == codes_report.bytes_out + kept["bytes"]
    assert "dense" not in entry(tmp_path / "codes")
    assert entry(tmp_path / "both")["kernels"] == entry(tmp_path / "codes")["kernels"]


def test_weights_are_kept_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "hf", "llama")
    qs_jax.convert(source, tmp_path / "dense", dtype="bfloat16")
    qs_jax.convert(source, tmp_path / "both", dtype="bfloat16", **CODES, keep_dense=True)
    for dtype in ("bfloat16", "float32"):
        dense, both = (load(tmp_path / n, dtype=dtype, compilation_cache=False) for n in ("dense", "both"))
        assert_same_logits(both.network, dense.network)
    (kernel,) = (x for path, x in arrays_by_path(both.network).items() if path == "blocks.0.q.kernel")
    assert entry(tmp_path / "both")["dense"]["dtype"] == "bfloat16"
    assert (kernel.dtype, kernel.nbytes) == (jnp.float32, 4 * kernel.size)  # loaded wider than stored


PRECISION = Policy("p", precision=Precision("random", two_below=0.3, four_below=0.6, pinned=(0,)))
SHALLOW = Policy("s", decode_halting=Halting("random", 0.5), kv_rule="shallow", protect_first=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same small Llama dense, in codes, and as both, with a policy beside its weights."""
    place = tmp_path_factory.mktemp("keep_dense")
    source = write_folder(place / "hf", "llama", tokenizer=True, bos_token_id=95)
    Policy.paper().save(source / "policy.json")
    qs_jax.convert(source, place / "dense")
    qs_jax.convert(source, place / "codes", **CODES)
    qs_jax.convert(source, place / "both", **CODES, keep_dense=True)
    return {name: place / name for name in ("hf", "dense", "codes", "both")}


@pytest.mark.parametrize("policy", [PRECISION, pytest.param(SHALLOW, marks=SLOW)], ids=lambda policy: policy.name)
def test_a_policy_s_bits_are_those_of_the_codes(folders: dict[str, Path], policy: Policy) -> None:
    """At 8 bits all of it is as in codes alone; else what the policy leaves alone is read dense, and counted so."""
    codes, both = (load(folders[name], compilation_cache=False) for name in ("codes", "both"))
    assert said(both, bits=8, policy=policy) == said(codes, bits=8, policy=policy)
    tokens, _, trace, ledger = said(both, policy=policy)
    assert tokens != said(both)[0]
    assert ledger["bits_mean"] <= 32
    assert ledger["weight_bytes_off"] == said(both)[3]["weight_bytes_off"]
    if policy is PRECISION:  # of two layers the pinned one has 32 bits, the other 8, 4 or 2
        found = {bits for row in trace["bits"] for bits in row[1:]}
        assert found == {20.0, 18.0, 17.0}
        assert ledger["bits_mean"] == pytest.approx(np.mean([b for row in trace["bits"] for b in row[1:]]))


def test_policies_of_the_dense_weights_go_with_them(folders: dict[str, Path]) -> None:
    held = {name: (folder / "policy.json").is_file() for name, folder in folders.items()}
    assert held == {"hf": True, "dense": True, "codes": False, "both": True}


@pytest.mark.slow
def test_dense_weights_are_verified_strictly_and_codes_roughly(tmp_path: Path, folders: dict[str, Path]) -> None:
    status, out, _ = run(
        folders["hf"], tmp_path / "out", "--quantize", "matryoshka", "--keep-dense", "--verify", "--json"
    )
    report = json.loads(out)
    assert (status, report["logit_error_tolerance"]) == (0, 5e-3)
    assert report["logit_error"] < 5e-3 < report["codes_logit_error"] < 1


@pytest.mark.slow
def test_codes_that_are_another_model_s_are_not_verified(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.quantize._ROUND", _turned_over)
    options = ("--quantize", "matryoshka", "--keep-dense", "--verify")
    assert_refused(folders["hf"], tmp_path / "out", "the codes' logits differ from", *options)


def _turned_over(weights: jax.Array, **how: Any) -> Any:
    return round_to_nearest(weights[::-1], **how)


@pytest.mark.slow
def test_codes_fitted_on_text_are_the_same_beside_dense_weights(tmp_path: Path, folders: dict[str, Path]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a model, and it was small. " * 200)
    options = ("--quantize", "matryoshka", "--group-size", "16", "--calibration-text", str(text))
    options += ("--method", "refit", "--calibration-tokens", "512")
    assert run(folders["hf"], tmp_path / "codes", *options)[0] == 0
    assert run(folders["hf"], tmp_path / "both", *options, "--keep-dense")[0] == 0
    dense = load(folders["dense"], compilation_cache=False)
    codes, both = (load(tmp_path / name, compilation_cache=False) for name in ("codes", "both"))
    assert_same_logits(both.network, dense.network)
    assert_same_logits(at_bits(both.network, 4), at_bits(codes.network, 4))
    assert {"dense", "calibration"} <= entry(tmp_path / "both").keys()


def test_a_dry_run_writes_nothing(tmp_path: Path, folders: dict[str, Path]) -> None:
    options = ("--quantize", "matryoshka", "--keep-dense", "--dry-run")
    assert run(folders["hf"], tmp_path / "out", *options)[0] == 0
    assert not (tmp_path / "out").exists()


def test_it_needs_codes_to_keep_them_beside(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert_refused(folders["hf"], tmp_path / "out", "it needs --quantize matryoshka", "--keep-dense")


@pytest.mark.parametrize(
    ("folder", "dense"),
    [
        ("codes", {"dtype": "float32", "bytes": 1}),  # claimed and not there
        ("both", None),  # there and not claimed
        ("both", {}),
        ("both", []),
        ("both", {"bytes": "many"}),
        ("both", {"bytes": -1}),
        ("both", {"bytes": float("inf")}),
    ],
    ids=str,
)
def test_a_manifest_that_says_otherwise_is_one_line(
    tmp_path: Path, folders: dict[str, Path], folder: str, dense: Any
) -> None:
    """Nothing of the manifest decides what is read but names and shapes: no more and no less is loaded."""
    out = tmp_path / "out"
    shutil.copytree(folders[folder], out)
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["quantization"].pop("dense", None)
    if dense is not None:
        manifest["quantization"]["dense"] = dense
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"cannot be loaded|is damaged") as raised:
        load(out, compilation_cache=False)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_an_evaluation_at_fewer_bits_compares_codes_with_the_dense_weights(folders: dict[str, Path]) -> None:
    text = ["once upon a time there was a model, and it was small. " * 4]
    windows: dict[str, Any] = {"prefix": 16, "window": 16, "max_tokens": 64}
    codes, both, dense = (load(folders[name], compilation_cache=False) for name in ("codes", "both", "dense"))
    found = qs_jax.evaluate(both, text, bits=4, **windows).to_json()
    assert found["perplexity"] == qs_jax.evaluate(codes, text, bits=4, **windows).to_json()["perplexity"]
    assert found["perplexity_off"] == qs_jax.evaluate(dense, text, **windows).to_json()["perplexity_off"]
    assert found["ledger"]["bits_mean"] == 4
