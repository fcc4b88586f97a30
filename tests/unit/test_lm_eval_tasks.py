"""The tasks for lm-evaluation-harness and what was measured with them; the harness itself is not needed."""

import json

import pytest

from benchmarks.harness import read_result
from benchmarks.lm_eval_agreement import NAME, PAGE, compared, interval, tables
from benchmarks.make_lm_eval_tasks import CHOICES, EXAMPLES, FOLDER, examples, passages
from qs_jax import cli_lm_eval


def rows(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_task_has_its_examples_and_its_file(name: str) -> None:
    found = rows(name)
    assert len(found) == EXAMPLES[name]
    assert len({json.dumps(row, sort_keys=True) for row in found}) == len(found)
    assert f"task: qs_{name}\n" in (FOLDER / f"{name}.yaml").read_text("utf-8")


def test_the_last_word_stood_in_the_passage() -> None:
    for row in rows("last_word"):
        before, _, word = str(row["text"]).rpartition(" ")
        assert f" {word}" in before


def test_choices_are_four_and_the_true_one_is_anywhere() -> None:
    found = rows("next_sentence")
    assert all(len(set(row["choices"])) == CHOICES for row in found if isinstance(row["choices"], list))
    assert {row["label"] for row in found} == set(range(CHOICES))


def test_passages_are_of_the_length_asked_for_and_none_overlap() -> None:
    text = " ".join(f"Sentence {word} is here now." for word in "abcdefgh" * 6)
    pairs = ["ab", "cd", "ef", "gh"] * 6
    assert list(passages(text, 10, 30)) == [[f"Sentence {word} is here now." for word in pair] for pair in pairs]
    assert not list(passages(text, 26, 29))
    broken = list(passages(text.replace("Sentence b", "Sentence 7").replace("d is", "d (so to say) is"), 10, 30))
    assert broken[0] == ["Sentence e is here now.", "Sentence f is here now."]


def test_the_same_text_gives_the_same_examples() -> None:
    sentences = [
        f"The {word} of the {word} went on until there was nothing to see but the {word}."
        for word in ("house", "river", "garden", "mountain", "village")
    ]
    texts = [" ".join(sentences * 400) for _ in range(4)]
    made = examples(texts)
    assert made == examples(texts)
    assert {name: len(found) for name, found in made.items()} == EXAMPLES


def test_answers_are_compared_one_by_one() -> None:
    theirs = {"answers": [(-1.0, True), (-2.0, False), -30.0, "one", "two"], "scores": {}}
    mine = {"answers": [[-1.5, True], [-2.0, True], -30.25, "one", "three"], "scores": {}}
    found = compared(theirs, mine)
    assert found["differences"] == [0.5, 0.0, 0.25]
    assert (found["largest"], found["other_flags"], found["other_texts"]) == (0.5, 1, 1)


def test_a_difference_has_the_interval_of_its_pairs() -> None:
    assert interval([1, 1, 0, 1], [1, 1, 0, 1]) == {"mean": 0.0, "half": 0.0}
    found = interval([0, 1] * 50, [1, 1] * 50)
    assert found["mean"] == -0.5
    assert found["half"] == pytest.approx(0.0985, abs=1e-3)


def test_the_page_shows_what_was_measured() -> None:
    page = PAGE.read_text("utf-8")
    shown = tables(read_result(NAME))
    assert "lm_eval agreement" in shown
    assert all(table in page for table in shown.values())


def test_without_the_harness_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_lm_eval.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli_lm_eval.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: lm-evaluation-harness is not installed; pip install")
