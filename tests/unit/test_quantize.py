"""Conversion to nested codes: what comes back from a folder, and options that cannot work."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qs_jax
from qs_jax.checkpoint import MANIFEST
from qs_jax.fitting.rounding import round_to_nearest
from qs_jax.loading import load
from qs_jax.matryoshka.kernel import NestedKernel
from qs_jax.models import arrays_by_path, forward
from tests.tiny import PROMPTS, quantised, tiny_model
from tests.unit.test_conversion import assert_refused, run, write_folder


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.slow
def test_a_converted_folder_comes_back(tmp_path: Path, name: str) -> None:
    options = ("--quantize", "matryoshka", "--group-size", "16", "--pin", r"blocks\.1\.o")
    status, _, err = run(write_folder(tmp_path / "hf", name), tmp_path / "out", *options)
    assert (status, err) == (0, "")
    loaded, expected = load(tmp_path / "out", compilation_cache=False), arrays_by_path(tiny_model(name).network)
    for path, array in arrays_by_path(loaded.network).items():
        if not isinstance(array, NestedKernel):
            assert not path.endswith(("kernel", "embedding.table")) or path.startswith("position")
            np.testing.assert_array_equal(array[:97], expected[path][:97])
            continue
        within = path.startswith("blocks.") and path != "blocks.1.o.kernel"
        assert array.least == (2 if within else 8)
        wanted = round_to_nearest(expected[path], group_size=16)
        for found, leaf in zip(jax.tree.leaves(array), jax.tree.leaves(wanted), strict=True):
            rows = None if path.startswith("blocks.") else 97  # what pads the vocabulary is not stored
            np.testing.assert_array_equal(found[..., :rows], leaf[..., :rows])
    entry = json.loads((tmp_path / "out" / MANIFEST).read_text())["quantization"]
    assert (entry["method"], entry["bits_per_weight"]) == ("rtn", 8 + 3 * 24 / 16)
    assert entry["kernels"]["blocks.0.q.kernel"]["errors"]["weights"]["8"] < 1e-4
    assert qs_jax.generate(loaded, PROMPTS[:1], bits=4, max_new_tokens=4).lengths == [4]


@pytest.mark.slow
def test_embedding_and_head_may_stay_dense(tmp_path: Path) -> None:
    source, options = write_folder(tmp_path / "hf", "gpt2"), ("--quantize", "matryoshka", "--group-size", "16")
    assert run(source, tmp_path / "codes", *options)[0] == 0
    assert run(source, tmp_path / "blocks", *options, "--exclude", "^embedding|^lm_head")[0] == 0
    codes, blocks = (load(tmp_path / name, compilation_cache=False) for name in ("codes", "blocks"))
    assert isinstance(arrays_by_path(codes.network)["embedding.table"], NestedKernel)
    assert not isinstance(arrays_by_path(blocks.network)["embedding.table"], NestedKernel)
    tokens = jnp.asarray([PROMPTS[0]])
    dense_head = forward(quantised(tiny_model("gpt2")).network, tokens)
    np.testing.assert_array_equal(forward(blocks.network, tokens)[..., :97], dense_head[..., :97])
    np.testing.assert_allclose(forward(codes.network, tokens)[..., :97], dense_head[..., :97], atol=0.3)
    assert qs_jax.generate(codes, PROMPTS[:1], bits=2, max_new_tokens=4).lengths == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int3"), "invalid value for '--quantize': 'int3' is not"),
        (
            ("--quantize", "matryoshka", "--method", "magic"),
            "invalid value for '--method': 'magic' is not one of",
        ),
        (("--quantize", "matryoshka", "--group-size", "20"), "--group-size is 20"),
        (("--quantize", "matryoshka", "--exclude", "("), "no regular expression"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert_refused(write_folder(tmp_path / "hf", "gpt2"), tmp_path / "out", message, *options)
