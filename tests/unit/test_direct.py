"""The direct lens: the regression it claims to be, kept and refused as a file, and tuned on what the engine runs."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import qs_jax
from qs_jax.adaptive.policy import Halting, Policy
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session
from qs_jax.errors import CheckpointError, EvaluationError, PolicyError
from qs_jax.evaluation import direct as fitting
from qs_jax.evaluation import tuning
from qs_jax.evaluation.candidates import Space, direct_orders, rare_above
from qs_jax.evaluation.direct import fit_direct
from qs_jax.evaluation.resting import Divided, score_stops, through
from qs_jax.evaluation.scoring import score_alone
from qs_jax.evaluation.windows import Window
from qs_jax.files import DIRECT_LENS_FILE
from qs_jax.lens import DirectLens, DirectMap, rarity_of, stand_in, with_direct_lens
from qs_jax.loading import load
from qs_jax.model import Model
from qs_jax.request import bind_policy
from tests.study import LETTERS, command, model_folder
from tests.tiny import tiny_model

LAYERS, HIDDEN, STOP, LAST, SCORED = 4, 32, 2, 24, 8
WINDOWS = np.random.default_rng(5).integers(12, 97, (12, 64))
FEATURES = 2 * 2 * 8
SOUND = {
    "0.1/down": np.zeros((4, 2 * HIDDEN)),
    "0.1/up": np.zeros((1, FEATURES, 4)),
    "0.1/biases": np.zeros((1, FEATURES)),
}


def features(model: Model, windows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Normalised states before each layer, and keys and values of all of them side by side, in float64."""
    tokens = jnp.asarray(windows, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states, normal, made = model.network.embed(tokens, positions), [], []
    for block in model.network.blocks:
        wide = np.asarray(states, np.float64)
        normal.append(wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6))
        made.append(np.concatenate([np.asarray(part, np.float64) for part in block.kv_features(states)], axis=-1))
        states = block.run(states, positions, ()).hidden_states
    return normal, np.concatenate(made, axis=-1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_at_full_rank_it_is_the_least_squares_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a penalty and of one state, against numpy on all tokens that count: not sinks."""
    monkeypatch.setattr(fitting, "PENALTIES", (0.0,))
    model = tiny_model(name, LAYERS)
    (fit,), _ = fit_direct(model, WINDOWS, [1], rank=HIDDEN)
    normal, made = features(model, WINDOWS)
    x = normal[1][:, 4:].reshape(-1, HIDDEN)
    y = made[:, 4:, made.shape[-1] // LAYERS :].reshape(len(x), -1)
    ones = np.c_[x, np.ones(len(x))]
    least = ones @ np.linalg.lstsq(ones, y, rcond=None)[0]
    assert fit.alone.inputs == (1,)
    mine = x @ (fit.alone.up.reshape(-1, HIDDEN) @ fit.alone.down).T + fit.alone.biases.reshape(-1)
    np.testing.assert_allclose(mine, least, rtol=0, atol=2e-3)


def test_a_higher_rank_and_more_inputs_explain_more() -> None:
    model = tiny_model("llama", LAYERS)
    shares = [np.mean(fit_direct(model, WINDOWS, [STOP], rank=rank)[0][0].explained) for rank in (2, 8, 32)]
    assert shares == sorted(shares)
    (fit,), seen = fit_direct(model, WINDOWS, [STOP], last=LAST)
    assert fit.map.inputs == max(fit.by_inputs, key=lambda inputs: fit.by_inputs[inputs])
    assert set(fit.by_inputs) == {(2,), (0, 2), (0, 1, 2)}
    assert (len(fit.explained), seen.final.shape) == (LAYERS - STOP, (12, LAST, HIDDEN))


def test_a_fit_for_several_stops_is_the_fits_for_each() -> None:
    model = tiny_model("gpt2", LAYERS)
    both, _ = fit_direct(model, WINDOWS, [1, 3], rank=8)
    for fit in both:
        (alone,), _ = fit_direct(model, WINDOWS, [fit.map.stop], rank=8)
        np.testing.assert_allclose(alone.map.up @ alone.map.down, fit.map.up @ fit.map.down, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"stops": [0]}, "a stop after 0 layers is none of"),
        ({"stops": [LAYERS]}, "1 to 3"),
        ({"stops": [1], "rank": 33}, "rank is 33, expected a whole number from 1 to 32"),
        ({"stops": [1], "windows": WINDOWS[:1]}, "too short to fit a lens on"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EvaluationError, match=complaint):
        fit_direct(tiny_model("llama", LAYERS), **{"windows": WINDOWS, **options})


def stopping(last: int, rare: float | None = None) -> Policy:
    halting = Halting(thresholds=np.inf, layers=(STOP,))
    return Policy("stop", prompt_halting=halting, kv_rule="direct", protect_last=last, protect_rare=rare)


def with_rare_tokens(each: int) -> np.ndarray:
    """Windows of twenty common tokens, and of so many that occur once in each of those places that might rest."""
    windows, rng = WINDOWS % 20 + 12, np.random.default_rng(6)
    for row in windows:
        row[rng.permutation(np.arange(tuning.SINKS, len(row) - LAST))[:each]] = np.arange(60, 60 + each)
    return windows


@pytest.mark.parametrize("rare", [0, 9])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_tuned_is_what_the_engine_runs(name: str, rare: int) -> None:
    """Final states of the tokens that run, against the logits that the engine scores them with."""
    model, windows = tiny_model(name, LAYERS), with_rare_tokens(rare)
    (fit,), seen = fit_direct(model, windows, [STOP], rank=8, last=LAST)
    parts = tuning.divided(seen, rare / (windows.shape[1] - tuning.SINKS - LAST), model.config.vocab_size)
    example = tuning._example(seen, fit.map, Divided(*(part[:2] for part in parts)), [0, 1])
    lens = stand_in(fit.map, jnp.dtype(jnp.float32))
    states = through(lens, model.network, example.divided, example.running, example.resting)
    mine = np.asarray(model.network.head(states[:, -LAST:]))
    rarity = rarity_of(windows, model.config.vocab_size)
    lensed = replace(model, network=with_direct_lens(model.network, DirectLens((fit.map,), rarity)))
    policy = stopping(LAST - SCORED, float(rarity[60]) if rare else None)
    request = Request(
        prompts=windows[:2, :-SCORED].tolist(), copies=1, max_new_tokens=SCORED, eos_token_ids=[], seeds=[(0, 0)] * 2,
        sampling=Sampling.of(), chunk_size=SCORED, policy=bind_policy(lensed, policy),
        forced=windows[:2, -SCORED:].tolist(), keep_logits=True,
    )  # fmt: skip
    chunks = list(Session(lensed.network, request).chunks())
    theirs = np.concatenate([chunk.logits for chunk in chunks])[:SCORED]
    np.testing.assert_allclose(theirs, mine[:, -SCORED - 1 : -1].transpose(1, 0, 2), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stops_that_are_scored_together_are_the_engines(name: str) -> None:
    """Of rows with different numbers of rare tokens, and of two stops."""
    model, windows, rng = tiny_model(name, LAYERS), WINDOWS % 20 + 12, np.random.default_rng(7)
    for row, window in enumerate(windows):
        window[rng.permutation(len(window))[: 3 * row]] = rng.integers(60, 97, 3 * row)
    fits, _ = fit_direct(model, windows, [1, STOP], rank=8)
    rarity = rarity_of(windows, model.config.vocab_size)
    model = replace(model, network=with_direct_lens(model.network, DirectLens(tuple(f.map for f in fits), rarity)))
    common = float(np.sort(rarity)[30])
    policies = {
        f"{stop} {last} {rare}": Policy(
            prompt_halting=Halting(thresholds=(np.inf,), layers=(stop,)), kv_rule="direct", protect_last=last,
            protect_rare=rare,
        )
        for stop, last, rare in [(1, 16, None), (STOP, 8, common), (1, 3, common)]
    }  # fmt: skip
    cut = [Window(tuple(one[:48].tolist()), tuple(one[48:].tolist()), (), ()) for one in windows]
    dense, found = score_stops(model, cut, policies, batch=4)
    policies["off"], found["off"] = Policy.off(), dense
    for each, policy in policies.items():
        theirs = score_alone(model, cut, bind_policy(model, policy), batch=4).nll
        np.testing.assert_allclose(found[each], theirs, rtol=0, atol=2e-5, err_msg=each)
        assert each == "off" or np.abs(found[each] - dense).min() > 1e-4


def test_tuning_brings_it_nearer_and_is_never_worse_on_what_was_held_out() -> None:
    model, kept = tiny_model("llama", LAYERS), list[tuning.Tuned]()
    (fit,), seen = fit_direct(model, WINDOWS, [STOP], rank=2, last=LAST)
    worse = replace(fit.map, biases=fit.map.biases + 0.5)
    found = tuning.tune(model.network, worse, seen, 0.05, peak=1e-2, keep=kept.append)
    first, *others = [point["held_out"] for point in found.curve]
    assert min(others) < 0.9 * first
    assert kept[-1].map is found.map
    assert [point["minutes"] for point in found.curve] == sorted(point["minutes"] for point in found.curve)
    ruined = tuning.tune(model.network, fit.map, seen, 0.02, peak=1e3)
    assert ruined.map is fit.map
    assert len(ruined.curve) > 1


def test_it_is_kept_as_it_was_and_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    model = tiny_model("llama", LAYERS)
    fits, _ = fit_direct(model, WINDOWS, [1, 3], rank=8)
    lens = DirectLens(tuple(fit.map for fit in fits))
    lens.save(tmp_path / "lens")
    again = DirectLens.load(tmp_path / "lens", model.config)
    for one, other in zip(lens.maps, again.maps, strict=True):
        assert one.inputs == other.inputs
        assert all((one.arrays[name] == other.arrays[name]).all() for name in one.arrays)
    with pytest.raises(PolicyError, match=r"for a stop after 2 layers; it has one for 1, 3; fit one with.*--direct 2"):
        qs_jax.generate(replace(model, network=with_direct_lens(model.network, again)), [[20]], policy=stopping(1))


@pytest.mark.parametrize(
    "arrays",
    [
        {**SOUND, "0.1/up": np.zeros((2, FEATURES, 4))},
        {**SOUND, "0.1/down": np.zeros((4, HIDDEN))},
        {name: array for name, array in SOUND.items() if not name.endswith("up")},
        {name.replace("0.1", "1.0"): array for name, array in SOUND.items()},
        {name.replace("0.1", "0.2"): array for name, array in SOUND.items()},
        {**SOUND, **{name.replace("0.1", "1"): array for name, array in SOUND.items()}},
        {**SOUND, "else": np.zeros(3)},
        {name.replace("0.1", "../1"): array for name, array in SOUND.items()},
    ],
)
def test_a_file_that_is_no_direct_lens_of_the_model_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    folder = model_folder(tmp_path / "model")
    save_file(arrays, folder / DIRECT_LENS_FILE)
    with pytest.raises(CheckpointError, match="is no direct lens"):
        load(folder, compilation_cache=False)
    save_file(SOUND, folder / DIRECT_LENS_FILE)
    assert load(folder, compilation_cache=False).network.direct_stops == (1,)


def test_a_lens_of_other_states_is_not_tuned_on(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", layers=7)
    model, out = load(folder, compilation_cache=False), folder / DIRECT_LENS_FILE
    arrays = np.zeros((4, 2 * HIDDEN)), np.zeros((1, FEATURES, 4)), np.zeros((1, FEATURES))
    DirectLens((DirectMap((1, 6), *arrays),)).save(out)
    with pytest.raises(EvaluationError, match="a stop after 6 layers reads other states"):
        qs_jax.fit_direct_lens(model, ["once upon a time " * 400], [6], out=out, tune=0.01, resume=True)


def test_text_that_says_one_thing_only_gives_a_map_of_finite_numbers() -> None:
    """Fewer independent states than there are numbers to keep."""
    windows = np.tile(np.arange(20, 28), (12, 8))
    (fit,), _ = fit_direct(tiny_model("llama", LAYERS), windows, [STOP])
    assert all(np.isfinite(array).all() for array in fit.map.arrays.values())


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_calibration_tries_stops_that_save_a_layer_and_no_others(depth: int) -> None:
    space = Space.of(depth, planes=False, kv_rule="direct", direct_stops=tuple(range(1, depth)))
    orders = direct_orders(space, 300)
    stops = [{policy.prompt_halting.layers for policy in order if policy.prompt_halting} for order in orders]
    assert stops == [{(stop,)} for stop in range(depth - 2, 0, -1)]
    for order in orders:
        assert [policy.protect_last for policy in order] == [128, 64, 32, 16]
        assert all(policy.protect_rare is None and policy.fusion is None for policy in order)
    assert direct_orders(space, 16) == []


def test_calibration_spares_the_rarest_tokens_of_its_own_text() -> None:
    tokens = np.random.default_rng(0).zipf(1.3, 20_000) % 97
    rarity = rarity_of(tokens, 97)
    least = rare_above(rarity[tokens], 0.15)
    assert 0.1 < (rarity[tokens] >= least).mean() <= 0.15
    assert rare_above(np.ones(5), 0.2) == 1
    space = Space.of(4, planes=False, kv_rule="direct", direct_stops=(2,), rare=least)
    (order,) = direct_orders(space, 300)
    spared = [(policy.protect_last, policy.protect_rare) for policy in order]
    assert spared == [(128, least), (64, least), (32, least), (32, None), (16, None)]


def test_rare_tokens_run_on_and_others_rest() -> None:
    """By how often tokens occur in what the lens was fitted on; a policy that asks for it needs to know."""
    model, windows = tiny_model("llama", LAYERS), WINDOWS.copy()
    windows[windows % 3 == 0] = 12
    rarity = rarity_of(windows, model.config.vocab_size)
    assert np.exp(-rarity).sum() == pytest.approx(1)
    assert rarity.argmin() == 12
    (fit,), _ = fit_direct(model, windows, [STOP])
    halting, prompt = Halting(thresholds=math.inf, layers=(STOP,)), [12, 13, 12, 12, 14, 12, 12, 12]
    policy = Policy(prompt_halting=halting, kv_rule="direct", protect_first=1, protect_last=1, protect_rare=3.0)
    known, unknown = (
        replace(model, network=with_direct_lens(model.network, DirectLens((fit.map,), part))) for part in (rarity, None)
    )
    trace = qs_jax.generate(known, [prompt], policy=policy, max_new_tokens=2, eos_token_id=[]).trace
    assert trace["prompt_layers_run"][0] == [LAYERS, LAYERS, STOP, STOP, LAYERS, STOP, STOP, LAYERS]
    with pytest.raises(PolicyError, match="a direct lens, which knows how rare tokens are"):
        bind_policy(unknown, policy)


def test_how_rare_tokens_are_is_kept_in_the_file(tmp_path: Path) -> None:
    config, rarity = tiny_model("llama", LAYERS).config, np.linspace(1, 9, 97)
    one = DirectMap(
        (0, 1), np.zeros((4, 2 * HIDDEN)), np.zeros((LAYERS - 1, FEATURES, 4)), np.zeros((LAYERS - 1, FEATURES))
    )
    DirectLens((one,), rarity).save(tmp_path / "lens.st")
    found = DirectLens.load(tmp_path / "lens.st", config).rarity
    assert found is not None
    np.testing.assert_allclose(found, rarity, rtol=1e-6)
    DirectLens((one,), rarity[1:]).save(tmp_path / "other.st")
    with pytest.raises(CheckpointError, match="is no direct lens for"):
        DirectLens.load(tmp_path / "other.st", config)


def test_policies_that_the_rule_cannot_serve_are_refused() -> None:
    with pytest.raises(PolicyError, match="leaves no state to choose a token from"):
        Policy(kv_rule="direct", decode_halting=Halting())
    with pytest.raises(PolicyError, match="the one layer that its lens is for"):
        Policy(kv_rule="direct", prompt_halting=Halting())


def test_the_command_fits_tunes_and_resumes_it_and_calibrate_tries_it(tmp_path: Path) -> None:
    folder, text = model_folder(tmp_path / "model", layers=LAYERS), tmp_path / "text.txt"
    text.write_text("".join(np.random.default_rng(0).choice(list(LETTERS), 4000)))
    fitting_ = ("lens", folder, "--text", text, "--direct", 2, "--json")
    status, result, errors = command(*fitting_, "--tune", 0.01)
    assert status == 0, errors
    assert set(result["stops"]) == {"2"}
    assert result["stops"]["2"]["curve"][0]["steps"] == 0
    assert load(folder, compilation_cache=False).network.direct_stops == (2,)
    status, _, errors = command(*fitting_)
    assert (status, "is there already" in errors) == (2, True)
    status, again, errors = command(*fitting_, "--tune", 0.01, "--resume", "--direct", 1)
    assert status == 0, errors
    assert set(again["stops"]) == {"1", "2"}
    first = again["stops"]["2"]["curve"][0]["held_out"]
    assert first == pytest.approx(min(point["held_out"] for point in result["stops"]["2"]["curve"]), rel=1e-4)
    status, _, errors = command("lens", folder, "--text", text, "--tune", 1)
    assert (status, "name a stop with --direct" in errors) == (2, True)
    status, found, errors = command(
        "calibrate", folder, "--text", text, "--prefix", 64, "--window", 16, "--max-tokens", 512, "--json", "--debug",
        "--max-ppl-increase", 50, "--out", tmp_path / "policy.json",
    )  # fmt: skip
    assert status == 0, errors
    assert found["best_uniform_stop_with_lens"]["policy"]["kv_rule"] == "direct"
