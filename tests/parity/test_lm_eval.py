"""lm-evaluation-harness hears the same from `qs_jax` as from its own `hf` model on torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qs_jax.adaptive.policy import Policy
from qs_jax.errors import EvaluationError, GenerationError, TokenizerError
from qs_jax.evaluation.perplexity import evaluate
from qs_jax.evaluation.windows import Plan, Window
from qs_jax.generation import generate
from qs_jax.loading import load
from qs_jax.model import Model
from tests.tiny import quantised, tiny_model

pytestmark = pytest.mark.parity

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'qs_jax[lm-eval]'")
pytest.importorskip("torch", reason="pip install 'qs_jax[parity]'")

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "reference_models" / "llama"
TASKS = ROOT / "benchmarks" / "lm_eval_tasks"

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the sunshine with her dog. "
LIKELIHOODS = [
    ("Once upon a time", " there was a little girl"),
    ("Once upon a time", " dog"),
    ("Once upon a time, ", "there was"),
    ("", "The old house stood at the end of the road."),
    (STORY * 40, "Lily said hello to the dog."),
    (STORY, "Q"),
]
ROLLING = [STORY, STORY * 30, "One.", ""]
GENERATED: list[tuple[str, dict[str, Any]]] = [
    ("Once upon a time", {"until": ["."], "max_gen_toks": 24}),
    (STORY, {"until": ["."], "max_gen_toks": 24}),
    (STORY * 40, {"until": ["."], "max_gen_toks": 24}),
    ("The dog", {"until": [" the", "\n\n"], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}),
    ("One day.", {"until": ". "}),
    ("She said", {"max_gen_toks": 5}),
]


def requests(kind: Any, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given if isinstance(given, tuple) else (given,), n) for n, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(LLAMA, dtype="float32")


def theirs(**how: Any) -> Any:
    from lm_eval.models import huggingface

    make: Any = huggingface.HFLM
    return make(pretrained=str(LLAMA), dtype="float32", device="cpu", batch_size=1, **how)


@pytest.fixture(scope="module")
def hf() -> Any:
    return theirs()


def ours(model: Model | str, **how: Any) -> Any:
    from qs_jax.lm_eval import QsJaxLM

    return QsJaxLM(model, **{"batch_size": 4, **how})


def told(method: str, lm: Any, given: list[Any]) -> list[Any]:
    return getattr(lm, method)(requests(method, given), disable_tqdm=True)


@pytest.mark.parametrize("batch", [1, 4])
def test_likelihoods_and_greedy_flags_are_hfs(hf: Any, model: Model, batch: int) -> None:
    expected, found = (told("loglikelihood", lm, LIKELIHOODS) for lm in (hf, ours(model, batch_size=batch)))
    for (logprob, greedy), (other, flag) in zip(expected, found, strict=True):
        assert other == pytest.approx(logprob, abs=2e-3)
        assert flag == greedy


def test_rolling_likelihoods_are_hfs(hf: Any, model: Model) -> None:
    expected, found = (told("loglikelihood_rolling", lm, ROLLING) for lm in (hf, ours(model)))
    assert found == pytest.approx(expected, abs=2e-2)
    assert found[-1] == 0.0


@pytest.mark.parametrize("how", [{}, {"batch_size": 1}, {"exact": True, "draft": "lookup"}], ids=str)
def test_texts_are_hfs(hf: Any, model: Model, how: dict[str, Any]) -> None:
    expected, found = (told("generate_until", lm, GENERATED) for lm in (hf, ours(model, **how)))
    assert found == expected


@pytest.mark.parametrize("arguments", [{"max_length": 64}, {"add_bos_token": True}, {"prefix_token_id": 5}], ids=str)
def test_lengths_and_first_tokens_are_hfs(model: Model, arguments: dict[str, Any]) -> None:
    other, mine = theirs(**arguments), ours(model, **arguments)
    expected, found = (told("loglikelihood", lm, LIKELIHOODS) for lm in (other, mine))
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=2e-3)
    expected, found = (told("generate_until", lm, GENERATED[:3]) for lm in (other, mine))
    assert found == expected


def test_a_stop_that_would_begin_in_the_prompt_is_none(model: Model) -> None:
    """The engine ends a row there, as transformers does; the harness looks at new text alone."""
    lm = ours(model)
    (plain,) = told("generate_until", lm, [("Once upon a", {"max_gen_toks": 8})])
    assert plain[:1] == " "
    stop = "a" + plain[:3]
    assert generate(model, "Once upon a", max_new_tokens=8, stop_strings=stop).finish_reasons == ["stop_string"]
    assert told("generate_until", lm, [("Once upon a", {"max_gen_toks": 8, "until": [stop]})]) == [plain]


def test_a_policy_and_bits_score_as_the_studies_do(model: Model) -> None:
    text, policy = STORY * 4, Policy.load(LLAMA / "policy.json")
    tokens = ours(model).tok_encode(text)
    window = Window(tuple(tokens[:80]), tuple(tokens[80:100]), ("",) * 80, ("",) * 20)
    studied = evaluate(model, [window], policy, Plan(batch=1))
    lm = ours(str(LLAMA), policy=str(LLAMA / "policy.json"), dtype="float32")
    ((found, _),) = lm._loglikelihood_tokens([(None, window.prompt, window.scored)], disable_tqdm=True)
    assert found == pytest.approx(sum(studied["logprobs"][0]), abs=1e-3)
    assert lm.spent["flops_reduction"] == pytest.approx(studied["ledger"]["flops_reduction"])
    ((exact, _),) = ours(model, policy=policy, exact=True)._loglikelihood_tokens(
        [(None, window.prompt, window.scored)], disable_tqdm=True
    )
    ((dense, _),) = ours(model)._loglikelihood_tokens([(None, window.prompt, window.scored)], disable_tqdm=True)
    assert exact == dense != found
    codes = quantised(tiny_model("llama", tokenizer=True))
    reads = [told("loglikelihood", ours(codes, bits=bits), LIKELIHOODS[:1])[0][0] for bits in (8, 4, 2)]
    assert len(set(reads)) == 3


def test_sampled_requests_differ_and_can_be_repeated(model: Model) -> None:
    asked = [("Once upon a time", {"do_sample": True, "temperature": 0.9, "max_gen_toks": 16})] * 3
    first, again, other = (told("generate_until", ours(model, seed=seed), asked) for seed in (1, 1, 5))
    assert first == again != other
    assert len(set(first)) == 3


def test_chats_are_rendered_by_the_models_template(model: Model) -> None:
    lm = ours(tiny_model("llama", tokenizer=True))
    chat = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(chat) == "<user>Hi</s><assistant>"
    assert lm.apply_chat_template([*chat, {"role": "assistant", "content": "So"}], False) == "<user>Hi</s><assistant>So"
    assert lm.chat_template(True).startswith("{% for m")
    assert lm.tokenizer_name == "tiny llama of 2 layers"
    assert lm.tok_encode("<s>Hi") == [95, *lm.tok_encode("Hi")]
    without = ours(model)
    assert without.chat_template(True) is None
    with pytest.raises(TokenizerError, match="no chat template"):
        without.apply_chat_template(chat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"polcy": "off"}, "unknown: polcy"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 10**6}, "max_length is 1000000"),
        ({"bits": 4}, "no Matryoshka weights"),
        ({"policy": "none.json"}, "none.json"),
    ],
)
def test_arguments_that_cannot_be_are_refused(model: Model, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        ours(model, **arguments)


def test_requests_that_cannot_be_are_refused(model: Model) -> None:
    with pytest.raises(GenerationError, match="pretrained is missing"):
        ours("")
    with pytest.raises(GenerationError, match="lower max_gen_toks"):
        told("generate_until", ours(model), [("One", {"max_gen_toks": 10**4})])
    with pytest.raises(GenerationError, match="num_beams"):
        told("generate_until", ours(model), [("One", {"num_beams": 4})])
    with pytest.raises(EvaluationError, match="expected at least one"):
        told("loglikelihood", ours(model), [("One", "")])


def test_the_harness_finds_it_runs_the_tasks_and_says_what_was_spent() -> None:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    import qs_jax.lm_eval

    assert qs_jax.lm_eval
    tasks = ["qs_last_word", "qs_next_sentence", "qs_recite", "qs_passages"]
    run: Any = evaluator.simple_evaluate
    found = run(
        "qs_jax",
        model_args=f"pretrained={LLAMA},dtype=float32",
        tasks=tasks,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=1,
        batch_size=4,
        bootstrap_iters=0,
    )
    assert set(found["results"]) == set(tasks)
    assert found["config"]["policy"]["name"] == "off"
    assert found["config"]["spent"]["flops"] == found["config"]["spent"]["flops_off"] > 0


def test_the_command_runs_a_task_and_says_errors_in_one_line(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "qs_jax.cli_lm_eval", "--model", "qs_jax", *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, check=False)

    place = ("--include_path", str(TASKS), "--tasks", "qs_last_word", "--limit", "1")
    done = command("--model_args", f"pretrained={LLAMA}", *place, "--output_path", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results_*.json")
    assert "acc,none" in json.loads(written.read_text("utf-8"))["results"]["qs_last_word"]
    done = command("--model_args", "pretrained=no/such/folder/at_all", *place)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: no/such/folder/at_all")
