"""The training script on toy text: data, tokenizer, mixture, resuming, export."""

import json
import lzma
import os
import signal
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

import qs_jax
from qs_jax.errors import CheckpointError, ConfigError
from qs_jax.models import forward
from reference_models import export as exporting
from reference_models.data import DataError, load_sources, unwrap
from reference_models.export import export, loss_columns
from reference_models.loop import Trainer
from reference_models.recipe import load_recipe
from reference_models.step import TrainStep
from reference_models.tokens import Mixture, prepare
from reference_models.train import open_trainer
from tests.tiny import CONFIGS

VOCAB = 320
STEPS = 8
SHAPE = {"n_layer": 1, "num_hidden_layers": 1}
RECIPE = {
    "seed": 0,
    "peak_learning_rate": 0.01,
    "final_learning_rate": 0.1,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "beta2": 0.98,
    "clip_norm": 1.0,
    "mixture": {"tinystories": 0.3, "c4": 0.14, "wikitext": 0.06, "novels": 0.5},
    "phases": [{"until": 0.5, "batch": 2, "length": 16}, {"until": 1.0, "batch": 1, "length": 32}],
    "validate_every": 2,
    "validation_tokens": 64,
    "patience": None,
}


@pytest.fixture(scope="module", autouse=True)
def _standard_promotion() -> Iterator[None]:
    """optax mixes integers and floats, which the strict rules of the other tests refuse."""
    with jax.numpy_dtype_promotion("standard"):
        yield


_COMPILED: dict[str, TrainStep] = {}
"""The step depends on the model and the optimiser's constants only: compiled once, for every run of these tests."""


def story(number: int) -> str:
    names = ("Lily", "Tom", "Mia", "Ben")
    return f"Once upon a time {names[number % 4]} had {number} red balls. They were happy, naïve and “free”."


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four files that training reads, small."""
    folder = tmp_path_factory.mktemp("text")
    stories = [story(n) for n in range(200)]
    stories[3] = stories[-1]
    (folder / "tinystories_train_first1000.json").write_text(json.dumps(stories))
    documents = [json.dumps({"text": f"Document {n} of the web. " * 3}) for n in range(200)]
    (folder / "c4-sample.jsonl").write_text("\n".join(documents))
    passages = [f" = Article {n} = \n Text {n} of the article . \n" for n in range(120)]
    (folder / "wikitext_train_1000_passages.json").write_text(json.dumps(passages))
    books = ["\ufeff" + f"It was a dark and stormy night in book {n}; the rain fell.\n" * 40 for n in range(8)]
    (folder / "novels.txt.xz").write_bytes(lzma.compress("\f\n".join(books).encode()))
    return folder


@pytest.fixture(scope="module")
def tokens(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    prepare(load_sources(text), folder, vocab_size=VOCAB)
    return folder


def start(
    tokens: Path, work_dir: Path, name: str = "llama", *, start_from: Path | None = None, **changes: Any
) -> Trainer:
    settings = work_dir.parent / f"{work_dir.name}-settings"
    settings.mkdir(exist_ok=True)
    (settings / "config.json").write_text(
        json.dumps({**CONFIGS[name], **SHAPE, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0})
    )
    (settings / "recipe.json").write_text(json.dumps({**RECIPE, **changes}))
    trainer = open_trainer(tokens, work_dir, settings / "config.json", settings / "recipe.json", start_from)
    trainer.train_step = _COMPILED.setdefault(name, trainer.train_step)
    return trainer


def interrupt_after(trainer: Trainer, steps: int) -> None:
    """Have the process ask itself to stop after some more steps, as an operator would."""
    plain, left = trainer._step, [steps]

    def step(total: int) -> None:
        plain(total)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._step = step


def log_of(work_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (work_dir / "loss.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = start(tokens, tmp_path_factory.mktemp("runs") / "run")
    assert trainer.run(steps=STEPS)
    return trainer


def test_held_out_text_is_not_in_training(text: Path, tokens: Path) -> None:
    sources = load_sources(text)
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    for name, source in sources.items():
        assert source.held_out
        assert not set(source.train) & set(source.held_out)
        trained = tokenizer.decode(np.load(tokens / f"{name}-train.npy").tolist())
        kept = tokenizer.decode(np.load(tokens / f"{name}-held-out.npy").tolist())
        for document in source.held_out:
            assert document not in trained
            assert document in kept
    assert story(199) not in sources["tinystories"].train
    assert len(sources["wikitext"].train) == 70


def test_damaged_text_is_named(text: Path, tmp_path: Path) -> None:
    for file in text.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "c4-sample.jsonl").write_text('{"no": "text"}')
    with pytest.raises(DataError, match=r"c4-sample\.jsonl"):
        load_sources(tmp_path)
    (tmp_path / "c4-sample.jsonl").unlink()
    with pytest.raises(DataError, match="not found"):
        load_sources(tmp_path)


def test_wrapped_lines_become_paragraphs() -> None:
    book = "The first line is long and\nflows on into a short end.\n" * 20 + "\nSaid.\n\nNew paragraph here it is\n"
    paragraphs = unwrap(book).split("\n\n")
    assert paragraphs[0].startswith("The first line is long and flows on")
    assert paragraphs[-2:] == ["Said.", "New paragraph here it is"]


@pytest.mark.parametrize("sample", ["Once upon a time", " naïve 日本語 🙂\n\n\ttabs", ""])
def test_the_tokenizer_round_trips(tokens: Path, sample: str) -> None:
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_mixture_shares_hold_exactly() -> None:
    shares = {"a": 0.6, "b": 0.3, "c": 0.1}
    streams = {name: np.full(500, index, np.uint16) for index, name in enumerate(shares)}
    mixture = Mixture(streams, shares, seed=1)
    for first in (0, 100, 900):
        drawn = Counter(int(window[0]) for window in mixture.batch(first, 100, 8))
        assert drawn == {0: 60, 1: 30, 2: 10}


def test_a_source_is_passed_whole_before_it_repeats() -> None:
    stream = np.arange(401, dtype=np.uint16)
    mixture = Mixture({"a": stream}, {"a": 1.0}, seed=1)
    windows = mixture.batch(0, 39, 10)
    starts = sorted(window[0] for window in windows)
    assert all(later - earlier == 10 for earlier, later in pairwise(starts))
    assert all((window == np.arange(window[0], window[0] + 11)).all() for window in windows)
    assert (mixture.window(39, 10) != windows[0]).any()


def test_a_mixture_that_does_not_add_up_is_refused() -> None:
    with pytest.raises(DataError, match="add up to 1"):
        Mixture({"a": np.zeros(100, np.uint16)}, {"a": 0.5}, seed=0)


def test_training_learns(finished: Trainer) -> None:
    columns = loss_columns(log_of(finished.folder))
    assert columns["validation"]["mean"][-1] < columns["training"]["loss"][0] - 0.2
    assert columns["validation"]["step"] == [2, 4, 6, 8]
    assert set(RECIPE["mixture"]) <= set(columns["validation"])
    assert columns["validation"]["tokens"][-1] == 4 * 2 * 16 + 4 * 32


def test_an_interrupted_run_resumes_to_the_same_weights(finished: Trainer, tokens: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = start(tokens, folder)
    interrupt_after(first, 4)
    assert not first.run(steps=STEPS)
    assert first.progress["step"] == 4
    with (folder / "loss.jsonl").open("a") as log:
        log.write('{"step": 5, "torn')
    second = start(tokens, folder)
    assert second.run(steps=STEPS)
    assert log_of(folder) == log_of(finished.folder)
    for resumed, straight in zip(jax.tree.leaves(second.weights), jax.tree.leaves(finished.weights), strict=True):
        np.testing.assert_array_equal(resumed, straight)


def test_a_stopped_run_is_validated_where_it_stands(tokens: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = start(tokens, folder)
    interrupt_after(trainer, 3)
    trainer.run(steps=STEPS)
    assert trainer.best.latest == 2
    trainer.validate()
    resumed = start(tokens, folder)
    assert resumed.progress["step"] == resumed.best.latest == 3
    assert resumed.progress["best"] == pytest.approx(log_of(folder)[-1]["validation_mean"])


def test_patience_ends_a_run(tokens: Path, tmp_path: Path) -> None:
    trainer = start(tokens, tmp_path / "run", peak_learning_rate=1e-12, patience=1)
    assert trainer.run(steps=STEPS)
    assert trainer.progress["step"] < STEPS


def test_another_models_checkpoint_is_refused_and_left_alone(finished: Trainer, tokens: Path) -> None:
    before = (finished.folder / "config.json").read_bytes()
    with pytest.raises(DataError, match="does not fit"):
        start(tokens, finished.folder, "gpt2")
    assert (finished.folder / "config.json").read_bytes() == before


def test_a_bad_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({**RECIPE, "warm_up": 3}))
    with pytest.raises(ConfigError, match="warm_up"):
        load_recipe(tmp_path / "recipe.json")


def test_an_export_holds_the_best_weights(finished: Trainer, tokens: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    export(finished.folder, tokens, target, hardware="a test", overwrite=False)
    model = qs_jax.load(target, compilation_cache=False)
    (best, _), prompt = (finished.best.restore(finished.weights), "Once upon a time")
    rounded = jax.tree.map(lambda w: jnp.asarray(np.asarray(w, ml_dtypes.bfloat16), jnp.float32), best)
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(prompt)
    assert model.tokenizer.decode(ids) == prompt
    network = nnx.merge(finished.graph, rounded)
    run = jax.jit(forward)
    ours, theirs = (run(jax.tree.map(np.asarray, weights), np.asarray([ids])) for weights in (model.network, network))
    np.testing.assert_array_equal(ours, theirs)
    record = json.loads((target / "training.json").read_text())
    assert record["best"]["step"] in record["validation"]["step"]
    assert min(record["validation"]["mean"]) == pytest.approx(record["best"]["best"], abs=1e-4)
    assert model.config.eos_token_ids == (0,)


def test_an_export_never_overwrites_unasked_and_never_by_halves(
    finished: Trainer, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    export(finished.folder, tokens, target, hardware="first", overwrite=False)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(CheckpointError, match="--overwrite"):
        export(finished.folder, tokens, target, hardware="second", overwrite=False)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "save_tokenizer", full_disk)
        with pytest.raises(CheckpointError, match="nothing was changed"):
            export(finished.folder, tokens, target, hardware="second", overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    export(finished.folder, tokens, target, hardware="second", overwrite=True)
    assert json.loads((target / "training.json").read_text())["hardware"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_without_a_validation_is_refused(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({**CONFIGS["llama"], "vocab_size": VOCAB}))
    with pytest.raises(DataError, match="no best weights"):
        export(tmp_path / "run", tokens, tmp_path / "model", hardware="", overwrite=False)
    assert not (tmp_path / "model").exists()


def test_training_goes_on_from_an_export(finished: Trainer, tokens: Path, tmp_path: Path) -> None:
    export(finished.folder, tokens, tmp_path / "model", hardware="a test", overwrite=False)
    trainer = start(tokens, tmp_path / "more", start_from=tmp_path / "model")
    reached = json.loads((tmp_path / "model" / "training.json").read_text())["best"]["step"]
    assert trainer.progress["step"] == trainer.progress["first"] == reached
    before = loss_columns(log_of(finished.folder))["validation"]["mean"]
    assert loss_columns(log_of(trainer.folder))["validation"]["mean"] == before[: reached // 2]
    assert trainer.run(steps=4)
    assert trainer.progress["step"] == reached + 4
    assert loss_columns(log_of(trainer.folder))["validation"]["mean"][-1] < before[0]
    export(trainer.folder, tokens, tmp_path / "model", hardware="another", overwrite=True)


def test_another_tokenizer_is_refused(finished: Trainer, tokens: Path, text: Path, tmp_path: Path) -> None:
    export(finished.folder, tokens, tmp_path / "model", hardware="a test", overwrite=False)
    prepare(load_sources(text), tmp_path / "tokens", vocab_size=VOCAB - 1)
    with pytest.raises(DataError, match="another tokenizer"):
        start(tmp_path / "tokens", tmp_path / "more", start_from=tmp_path / "model")
