"""The package's functions are the commands, by the same names and with the same defaults."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert.cli
import qs_jax
import qs_jax.cli
from convert.pipeline import IncompleteError
from qs_jax import cli_study
from qs_jax.adaptive.policy import Policy
from qs_jax.cli_options import common_options
from qs_jax.corpus import Corpus
from qs_jax.errors import CheckpointError, ConfigError, EvaluationError
from qs_jax.evaluation import api
from qs_jax.evaluation.calibration import Calibrated
from qs_jax.evaluation.defaults import DIRECT_LENS_TOKENS, LENS_TOKENS
from qs_jax.evaluation.goal import Goal
from qs_jax.files import LENS_FILE
from qs_jax.generation_config import GenerationConfig
from qs_jax.model import Model
from tests.folders import tensors_of, write_folder
from tests.study import LETTERS, command, model_folder
from tests.unit.test_conversion import run as convert_command

PRINTING = {"json", "debug", "version"}
JOINING = {"distributed", "coordinator", "processes", "process"}
LOADING = {"dtype", "revision", "verify", "mesh", *JOINING}
TEXT = "".join(np.random.default_rng(0).choice(list(LETTERS), 2000))
CUT: dict[str, Any] = {"prefix": 40, "window": 10, "max_tokens": 40, "batch": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    model_folder(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return qs_jax.load(folder / "model", compilation_cache=False)


class Watched:
    """Remembers how far work was said to be."""

    def __init__(self) -> None:
        self.done, self.total = 0, None

    def __call__(self, done: int = 1, *, total: int | None = None) -> None:
        self.done, self.total = self.done + done, total or self.total


def defaults(function: Callable[..., Any], without: set[str]) -> dict[str, Any]:
    return {
        name: None if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in without
    }


@pytest.mark.parametrize(
    ("of_command", "function", "without"),
    [
        (cli_study.evaluate, qs_jax.evaluate, PRINTING | LOADING),
        (cli_study.calibrate, qs_jax.calibrate, PRINTING | LOADING),
        (convert.cli.convert, qs_jax.convert, PRINTING),
    ],
)
def test_names_and_defaults_are_the_commands(
    of_command: Callable[..., Any], function: Callable[..., Any], without: set[str]
) -> None:
    assert defaults(of_command, without) == defaults(function, {"advance"})


def test_the_command_of_both_lenses_has_the_names_of_both() -> None:
    ours = defaults(cli_study.lens, PRINTING | LOADING)
    affine, direct = (defaults(function, {"advance"}) for function in (qs_jax.fit_lens, qs_jax.fit_direct_lens))
    direct["direct"] = direct.pop("stops")
    assert (affine.pop("max_tokens"), direct.pop("max_tokens")) == (LENS_TOKENS, DIRECT_LENS_TOKENS)
    assert ours == {**affine, **direct, "max_tokens": None}  # whichever lens it is has its own


def test_names_and_defaults_of_generate_are_the_configs() -> None:
    ours = defaults(qs_jax.cli.generate, PRINTING | LOADING)
    shared = {name: value for name, value in ours.items() if name in GenerationConfig.__dataclass_fields__}
    assert len(shared) == 12
    off = Policy.off()
    config = GenerationConfig()
    assert shared.pop("draft") is None  # it may be repeated: no drafts named, and the config's is taken
    assert Policy.of(shared.pop("policy")) == config.policy == off
    assert shared == {name: getattr(config, name) for name in shared}
    assert ours["generation_config"] == config.use_model_defaults


def test_every_command_loads_as_load_does() -> None:
    @common_options()
    def nothing(*, common: Any) -> None:
        pass

    assert defaults(nothing, PRINTING | JOINING) == defaults(qs_jax.load, {"path_or_id", "compilation_cache"})


@pytest.mark.parametrize(
    "name", ["calibrate", "convert", "evaluate", "fit_direct_lens", "fit_lens", "generate", "load"]
)
def test_every_function_is_typed_and_documented(name: str) -> None:
    function = getattr(qs_jax, name)
    parameters = inspect.signature(function).parameters
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    words = inspect.getdoc(function) or ""
    assert "Raises:" in words
    assert all(parameter in words for parameter in parameters)
    assert name == "load" or f"qs_jax.{name}(" in words


def test_all_names_are_there() -> None:
    assert {"Policy", "calibrate", "convert", "evaluate", "fit_direct_lens", "fit_lens"} < set(qs_jax.__all__)
    assert all(getattr(qs_jax, name) is not None for name in qs_jax.__all__)
    assert qs_jax.Policy is Policy
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qs_jax.nothing


def test_an_evaluation_is_what_the_command_prints(folder: Path, model: Model) -> None:
    watched = Watched()
    found = qs_jax.evaluate(model, folder / "text.txt", policy="off", **CUT, advance=watched)
    options = [word for name, value in CUT.items() for word in (f"--{name.replace('_', '-')}", value)]
    status, printed, errors = command(
        "eval", folder / "model", "--text", folder / "text.txt", *options, "--json", "--debug"
    )
    assert status == 0, errors
    ours = json.loads(json.dumps(found.to_json()))
    assert ours.keys() == printed.keys()
    timed = {"prefill_s_per_batch", "decode_s_per_batch", "compile_s", "model"}
    assert {name: ours[name] for name in ours.keys() - timed} == {name: printed[name] for name in ours.keys() - timed}
    assert (found.text, found.documents, found.table) == ("text.txt", ":", None)
    assert watched.total == 4
    assert watched.done > 0


def test_documents_in_memory_are_those_of_a_file(folder: Path, model: Model) -> None:
    listed = qs_jax.evaluate(model, [TEXT[:5], TEXT], documents="1:", **CUT)
    assert listed.logprobs == qs_jax.evaluate(model, str(folder / "text.txt"), **CUT).logprobs
    assert (listed.text, listed.documents) == ("2 documents", "1:")
    read = Corpus.of(folder / "text.txt")
    assert Corpus.of(read) is read


@pytest.mark.parametrize(
    ("text", "complaint"),
    [([], "hold no text"), ([" "], "hold no text"), ([1], "entry 1 is neither"), ("nowhere.txt", "no such file")],
)
def test_text_that_is_none_is_refused(model: Model, text: Any, complaint: str) -> None:
    for study in (qs_jax.evaluate, qs_jax.calibrate, qs_jax.fit_lens):
        with pytest.raises(EvaluationError, match=complaint):
            study(model, text)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 3}, "bits is 3, expected one of 8, 4, 2"),
        ({"calibration_text": [TEXT]}, "is for ablate"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(model: Model, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EvaluationError, match=complaint):
        qs_jax.evaluate(model, [TEXT], **options)


def test_a_calibration_is_asked_for_and_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the search does is tested where it is; here, what reaches it and what becomes of its answer."""
    asked: dict[str, Any] = {}
    chosen = Calibrated(Policy(name="calibrated"), Policy(name="searched"), Goal(0.3), [], None, None)

    def search(model: Model, windows: Any, plan: Any, goals: list[Goal], **more: Any) -> list[Calibrated]:
        asked.update(goal=goals[0], plan=plan, windows=len(windows), **more)
        return [chosen]

    monkeypatch.setattr(api, "calibrate_model", search)
    out = tmp_path / "policy.json"
    found = qs_jax.calibrate(model, [TEXT], max_ppl_increase=0.3, kv_rule="drop", out=out, **CUT)
    assert asked["goal"] == Goal(0.3, 0.9)
    assert (asked["signal"], asked["kv_rule"], asked["target"], asked["windows"]) == ("relative_drift", "drop", out, 4)
    assert Policy.load(out) == found.policy == chosen.policy
    assert found.timing["total_s"] > 0
    told = {"text": "1 documents", "documents": ":", "out": str(out), "timing": found.timing}
    assert found.to_json() == {**chosen.to_json(), **told}
    with pytest.raises(EvaluationError, match="is there already"):
        qs_jax.calibrate(model, [TEXT], out=out, **CUT)
    assert qs_jax.calibrate(model, [TEXT], **CUT).out is None
    assert asked["target"] is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"signal": "entropy"}, "signal is 'entropy', expected one of relative_drift"),
        ({"confidence": 1.0}, "confidence is 1"),
        ({"max_ppl_increase": 0.0}, "max-ppl-increase is 0"),
        ({"max_ppl_increase": "-1%"}, "max-ppl-increase is -1%, expected a number above 0, or percent"),
        ({"max_ppl_increase": "nan%"}, "max-ppl-increase is nan%"),
        ({"max_ppl_increase": "little"}, "max-ppl-increase is 'little', expected points such as 0.2 or percent"),
        ({"out": "/nowhere/policy.json"}, "no such folder"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(model: Model, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EvaluationError, match=complaint):
        qs_jax.calibrate(model, [TEXT], **options)


def test_a_lens_is_fitted_and_found_where_it_was_written(tmp_path: Path) -> None:
    folder, watched = model_folder(tmp_path / "model"), Watched()
    model = qs_jax.load(folder, compilation_cache=False)
    found = qs_jax.fit_lens(model, [TEXT], rank=4, max_tokens=1000, out=folder / LENS_FILE, advance=watched)
    assert found.lens.down.shape == (1, 4, model.config.hidden_size)
    assert found.to_json() == {
        "out": str(folder / LENS_FILE),
        "tokens": found.tokens,
        "explained": found.explained,
        "timing": found.timing,
    }
    assert (watched.done, watched.total) == (2, 2)
    assert qs_jax.load(folder, compilation_cache=False).network.shortcuts is not None
    with pytest.raises(EvaluationError, match="is there already"):
        qs_jax.fit_lens(model, [TEXT], out=folder / LENS_FILE)


def test_a_conversion_is_what_the_command_does(tmp_path: Path) -> None:
    source, watched = write_folder(tmp_path / "hf", "llama"), Watched()
    report = qs_jax.convert(source, str(tmp_path / "ours"), advance=watched)
    assert (watched.done, watched.total) == (5, 5)
    status, printed, errors = convert_command(source, tmp_path / "theirs", "--json")
    assert status == 0, errors
    theirs = json.loads(printed)
    assert {**report.to_json(), "seconds": 0.0} == {**theirs, "seconds": 0.0}
    assert qs_jax.load(tmp_path / "ours", compilation_cache=False).name == str(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="--overwrite"):
        qs_jax.convert(source, tmp_path / "ours")
    assert qs_jax.convert(source, tmp_path / "dry", dry_run=True).parameters == report.parameters
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "options", [{"dtype": "int3"}, {"quantize": "int3"}, {"quantize": "matryoshka", "method": "x"}]
)
def test_a_conversion_that_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        qs_jax.convert(tmp_path, tmp_path / "out", **options)


def test_a_source_with_holes_says_all_it_lacks(tmp_path: Path) -> None:
    tensors = {name: array for name, array in tensors_of("llama").items() if name != "model.norm.weight"}
    with pytest.raises(IncompleteError, match=r"1 missing \(model\.norm\.weight\)") as refused:
        qs_jax.convert(write_folder(tmp_path / "hf", "llama", tensors), tmp_path / "out")
    assert refused.value.report.missing == ["model.norm.weight"]


def test_types_of_the_package_are_for_its_users_too() -> None:
    for package in (qs_jax, convert):
        assert (Path(str(package.__file__)).parent / "py.typed").is_file()
