"""The affine lens: the least-squares map it claims to be, found where it lies, and refused where it does not fit."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.pipeline import convert
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.errors import CheckpointError, EvaluationError, PolicyError
from qs_jax.evaluation import lens as fitting
from qs_jax.evaluation.lens import fit_lens
from qs_jax.files import LENS_FILE
from qs_jax.generation import generate
from qs_jax.lens import Lens, with_lens
from qs_jax.loading import load
from qs_jax.model import Model
from tests.study import LETTERS, command, model_folder
from tests.tiny import PROMPTS, tiny_model, with_random_lens

LAYERS, HIDDEN, SINKS = 4, 32, 4
WINDOWS = np.random.default_rng(5).integers(1, 97, (12, 64))
HALTING = Policy(
    "everything halts after two layers",
    prompt_halting=Halting(thresholds=np.inf, layers=(2,)),
    decode_halting=Halting(thresholds=np.inf, layers=(2,)),
    protect_first=1,
    protect_last=1,
)
SOUND = {"down": np.zeros((1, 4, HIDDEN)), "up": np.zeros((1, HIDDEN, 4)), "biases": np.zeros((1, HIDDEN))}
AFFINE = replace(HALTING, kv_rule="affine")


def states(model: Model, windows: np.ndarray) -> np.ndarray:
    """(layers + 1, windows, tokens, hidden): the residual stream before the first layer and after each."""
    tokens = jnp.asarray(windows, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    found = [model.network.embed(tokens, positions)]
    for block in model.network.blocks:
        found.append(block.run(found[-1], positions, ()).hidden_states)
    return np.asarray(jnp.stack(found), np.float64)


def test_it_is_the_least_squares_map_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a penalty, against numpy on the very tokens that count: not sinks, nor every fourth window."""
    monkeypatch.setattr(fitting, "PENALTIES", (0.0,))
    model = tiny_model("llama", LAYERS)
    fit = fit_lens(model, WINDOWS, rank=HIDDEN)
    used = [n for n in range(len(WINDOWS)) if n % 4 != 3]
    stream = states(model, WINDOWS)[:, :, SINKS:]
    for layer in range(1, LAYERS):
        before, after = (stream[n].reshape(len(WINDOWS), -1, HIDDEN) for n in (layer, layer + 1))
        x, y = (part[used].reshape(-1, HIDDEN) for part in (before, after - before))
        solution = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
        kernel = fit.lens.up[layer - 1] @ fit.lens.down[layer - 1]
        np.testing.assert_allclose(kernel, solution[:-1].T, rtol=0, atol=2e-3)
        np.testing.assert_allclose(fit.lens.biases[layer - 1], solution[-1], rtol=0, atol=2e-3)
        x, y = (np.delete(part, used, axis=0).reshape(-1, HIDDEN) for part in (before, after - before))
        error = np.square(y - np.c_[x, np.ones(len(x))] @ solution).sum()
        assert fit.explained[layer - 1] == pytest.approx(1 - error / np.square(y - y.mean(0)).sum(), abs=2e-3)


def test_the_penalty_is_the_one_that_predicts_other_text_best() -> None:
    """Few tokens for so many channels: a fit without a penalty is worse on new text than the chosen one."""
    model, few, new = tiny_model("llama", LAYERS), WINDOWS[:4, :18], WINDOWS[6:]
    stream = states(model, new)[:, :, SINKS:].reshape(LAYERS + 1, -1, HIDDEN)

    def error(lens: Lens) -> float:
        maps = zip(stream[1:], lens.down, lens.up, lens.biases, strict=False)
        carried = [x + x @ d.T @ u.T + b for x, d, u, b in maps]
        return float(sum(np.square(c - y).sum() for c, y in zip(carried, stream[2:], strict=True)))

    chosen = fit_lens(model, few).lens
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "PENALTIES", (1e-7,))
        assert error(chosen) < 0.9 * error(fit_lens(model, few).lens)


def test_special_tokens_do_not_count() -> None:
    model = tiny_model("llama", LAYERS)
    marked = replace(model, config=replace(model.config, bos_token_id=50))
    assert not np.allclose(fit_lens(model, WINDOWS).lens.biases, fit_lens(marked, WINDOWS).lens.biases, atol=1e-5)


@pytest.mark.slow
def test_a_lens_that_adds_nothing_is_the_frozen_state() -> None:
    model = tiny_model("gpt2", LAYERS)
    nothing = Lens(np.ones((LAYERS - 1, 2, HIDDEN)), np.zeros((LAYERS - 1, HIDDEN, 2)), np.zeros((LAYERS - 1, HIDDEN)))
    with_nothing = replace(model, network=with_lens(model.network, nothing), name="gpt2 with an empty lens")
    frozen = generate(model, PROMPTS, policy=HALTING, max_new_tokens=12)
    affine = generate(with_nothing, PROMPTS, policy=AFFINE, max_new_tokens=12)
    assert affine.tokens == frozen.tokens
    np.testing.assert_allclose(np.asarray(affine.logprobs), np.asarray(frozen.logprobs), atol=1e-5)
    assert affine.ledger["flops"] > frozen.ledger["flops"]
    assert affine.ledger["flops_off"] == frozen.ledger["flops_off"]
    seen = generate(with_random_lens(model), PROMPTS, policy=AFFINE, max_new_tokens=12)
    assert not np.allclose(np.asarray(seen.logprobs), np.asarray(frozen.logprobs), atol=1e-2)


def test_without_a_lens_the_rule_is_refused() -> None:
    with pytest.raises(PolicyError, match="needs a lens; fit one with qs-jax lens"):
        generate(tiny_model("gpt2", LAYERS), PROMPTS, policy=AFFINE, max_new_tokens=2)


def test_it_is_read_as_it_was_written_whatever_its_layout(tmp_path: Path) -> None:
    rng, config = np.random.default_rng(0), tiny_model("llama", LAYERS).config
    up = rng.normal(size=(LAYERS - 1, 5, HIDDEN)).astype(np.float32)
    Lens(up[:, ::-1], up.transpose(0, 2, 1), np.ones((LAYERS - 1, HIDDEN))).save(tmp_path / LENS_FILE)
    again = Lens.load(tmp_path / LENS_FILE, config)
    np.testing.assert_array_equal(again.down, up[:, ::-1])
    np.testing.assert_array_equal(again.up, up.transpose(0, 2, 1))
    np.testing.assert_array_equal(again.biases, 1.0)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"down": np.zeros((1, 4, 8)), "up": np.zeros((1, 8, 4)), "biases": np.zeros((1, 8))}, "is no lens for"),
        ({"down": np.zeros((1, 4, HIDDEN))}, "is no lens for"),
        ({"down": np.zeros(3), "biases": np.zeros((1, HIDDEN))}, "is no lens for"),
        ({**SOUND, "up": np.full((1, HIDDEN, 4), np.nan)}, "no finite number"),
        ({**SOUND, "biases": np.zeros((1, HIDDEN), np.int64)}, "no finite number"),
        (None, "cannot be read as a lens"),
    ],
)
def test_a_file_that_is_no_lens_of_the_model_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray] | None, complaint: str
) -> None:
    folder = model_folder(tmp_path / "model")
    if arrays is None:
        (folder / LENS_FILE).write_bytes(b"half a header")
    else:
        save_file(arrays, folder / LENS_FILE)
    with pytest.raises(CheckpointError, match=complaint):
        load(folder, compilation_cache=False)


@pytest.mark.slow
def test_the_command_puts_it_where_load_and_convert_find_it(tmp_path: Path) -> None:
    jax.clear_caches()  # or another test's programs are these, and nothing is left to trace
    folder, text = model_folder(tmp_path / "model", layers=LAYERS), tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 4000)))
    status, result, errors = command("lens", folder, "--text", text, "--json", "--debug")
    assert status == 0, errors
    assert len(result["explained"]) == LAYERS - 1
    assert result["tokens"] == 12 * 320
    assert 0 < result["timing"]["trace_s"] + result["timing"]["compile_s"] < result["timing"]["total_s"]
    model = load(folder, compilation_cache=False)
    assert model.network.shortcuts is not None
    status, _, errors = command("lens", folder, "--text", text)
    assert (status, "is there already" in errors) == (2, True)
    Policy.off().save(folder / "policy.json")
    convert(folder, tmp_path / "converted")
    assert load(tmp_path / "converted", compilation_cache=False).network.shortcuts is not None
    assert (tmp_path / "converted" / "policy.json").is_file()
    status, found, errors = command(
        "calibrate", folder, "--text", text, "--prefix", 64, "--window", 16, "--max-tokens", 512, "--json", "--debug",
        "--out", tmp_path / "policy.json",
    )  # fmt: skip
    assert status == 0, errors
    assert found["tested"][0]["policy"]["kv_rule"] in ("affine", "frozen")
    assert "best_uniform_stop_with_lens" in found


def test_too_little_text_and_a_model_of_one_layer_are_refused(tmp_path: Path) -> None:
    folder, text = model_folder(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("once upon a time " * 20)
    status, _, errors = command("lens", folder, "--text", text)
    assert (status, "too short to fit a lens on" in errors) == (2, True)
    with pytest.raises(Exception, match="one layer has nothing to skip"):
        fit_lens(tiny_model("llama", 1), WINDOWS)
    with pytest.raises(EvaluationError, match="rank is 33, expected a whole number from 1 to 32"):
        fit_lens(tiny_model("llama"), WINDOWS, rank=33)


def test_of_all_maps_of_a_rank_it_is_the_best() -> None:
    """On the very tokens it was fitted on no step away from it does better, and more rank explains more."""
    model = tiny_model("llama", LAYERS)
    explained = [fit_lens(model, WINDOWS, rank=rank).explained for rank in (1, 4, 16, HIDDEN)]
    assert (np.diff(explained, axis=0) > -0.01).all()
    assert np.mean(explained[0]) < np.mean(explained[2])
    stream = states(model, WINDOWS)[:, [n for n in range(len(WINDOWS)) if n % 4 != 3], SINKS:]
    x, y = stream[1].reshape(-1, HIDDEN), (stream[2] - stream[1]).reshape(-1, HIDDEN)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fitting, "PENALTIES", (0.0,))
        lens = fit_lens(model, WINDOWS, rank=4).lens
    solution = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    leading = np.linalg.svd((x - x.mean(0)) @ solution, full_matrices=False)[2][:4]
    np.testing.assert_allclose((lens.up[0] @ lens.down[0]).T, solution @ leading.T @ leading, rtol=0, atol=2e-3)
