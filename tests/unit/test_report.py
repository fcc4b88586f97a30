"""The report: complete, self-contained, and safe against the text it shows."""

import json
import shutil
import subprocess
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qs_jax.cli_study import _print_evaluation
from qs_jax.errors import EvaluationError
from qs_jax.evaluation.report import continuation, read_result, render, tokens, write_report
from tests.results import DEPTH, HOSTILE, LEDGER, result, scored
from tests.study import command


def calibration() -> dict[str, Any]:
    row = {"flops_reduction": 0.3, "perplexity_increase": 0.1, "upper": 0.15, "layers_run_mean": 4.2, "accepted": True}
    tested = [row, {**row, "accepted": False}]
    return {"max_ppl_increase": 0.2, "confidence": 0.9, "policy": {}, "tested": tested, "best_uniform_stop": row}


def generation(*draft: str) -> dict[str, Any]:
    """Two rows: a round with two right drafts, a plain step, a round with none; and what a prompt alone gives. `auto`
    looks up."""
    exact = {
        "from_draft": [[False, True, True, False, False, False], [False]],
        "in_round": [[-1, 0, 0, 0, -1, 1], [-1]],
        "draft_by_round": [[" → ".join(draft).replace("auto", "lookup")] * 2, []],
    }
    return {
        "model": f"model {HOSTILE}",
        "depth": DEPTH,
        "prompts": ["Once", HOSTILE],
        "pieces": [[" upon", " a", " time", HOSTILE, "", "."], [" a"]],
        "lengths": [6, 1],
        "layers_run": [[6] * 6, [3]],
        "bits": [[32.0] * 6, [4.0]],
        "logprobs": [[-0.25] * 6, [-0.5]],
        "settings": {"do_sample": False, "num_return_sequences": 1, "draft": list(draft)},
        "ledger": LEDGER,
        "timing": {"decode_steps": 3, "rounds": 2, "drafted": 6, "accepted": 2, "fallback": 1},
        **(exact if draft else {}),
    }


class Reader(HTMLParser):
    """Collects tags and checks that they nest."""

    VOID = {"meta", "br", "line", "rect", "path", "circle", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_a_broken_budget_is_said_beside_the_policy_and_in_the_table() -> None:
    kept = result()
    kept["table"] = [{**row, "perplexity_increase": min(row["perplexity_increase"], 0.2)} for row in kept["table"]]
    risen = [{**row, "perplexity_increase": 0.31} for row in kept["table"]]
    page = render([{**result(), "table": risen, "perplexity_increase": 0.31, "perplexity_off": 20.0}])
    assert page.count("above its budget on this text: calibrated for at most +0.2, it costs ") == 2
    assert "above its budget" not in render([{**kept, "perplexity_increase": 0.2}])


@pytest.mark.parametrize(("increase", "said"), [(0.2, False), (0.31, True)])
def test_a_broken_budget_is_printed(increase: float, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = {**LEDGER, "layers_run_mean": 5.0}
    _print_evaluation({**result(), "ledger": ledger, "perplexity_increase": increase})
    assert ("above its budget on this text" in capsys.readouterr().out) == said


def test_the_page_shows_everything_and_asks_for_nothing() -> None:
    page = render([result(), calibration()])
    reader = read(page)
    tags = [tag for tag, _ in reader.tags]
    assert "script" not in tags
    assert "link" not in tags
    assert not [a for _, attributes in reader.tags for a in attributes if a in ("src", "href") or a.startswith("on")]
    assert "&lt;script&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "url(" not in page
    shown = [attributes.get("title") for tag, attributes in reader.tags if tag == "span" and "title" in attributes]
    assert shown[2] == "prompt, 3 of 6 layers, fused into a later token"
    assert shown[-1] == "scored, 5 of 6 layers, 4 bits, log-probability -1.25"
    assert tags.count("svg") == 2
    assert tags.count("circle") + tags.count("path") + tags.count("rect") == 5 + DEPTH
    for text in ("calibrated +0.2", "prompt stops after 4", "31.0 %", "−", "87.7 %", "not trusted", "30.0 % of FLOPs"):
        assert text in page


def test_a_plain_evaluation_needs_no_table() -> None:
    plain = {key: value for key, value in result().items() if key not in ("table", "oracle")}
    plain |= {"perplexity_increase_interval": None, "bits_per_byte": None}
    page = render([plain])
    read(page)
    assert "no interval" in page
    assert "All policies" not in page


def test_tokens_say_what_was_spent_on_them() -> None:
    told = tokens(result()["samples"][0])
    assert [round(token["saved"], 2) for token in told] == [0, 0.33, 0.5, 0.5, 0, 0, 0.17]
    assert [token["scored"] for token in told] == [False] * 5 + [True] * 2
    assert [token["low"] for token in told][-2:] == [False, True]
    assert told[2]["fused"]


def test_a_text_of_exact_mode_says_of_every_token_who_made_it() -> None:
    told = continuation(generation("bits:4"), 0)
    assert [token["marks"] for token in told] == [
        [],
        ["begins", "drafted"],
        ["drafted"],
        ["own"],
        [],
        ["begins", "own"],
    ]
    notes = [token["note"].split(";")[0] for token in told]
    assert notes[0] == notes[4] == "decoded plainly"
    assert notes[1] == notes[2] == "round 1, drafted by bits:4"
    assert (notes[3], notes[5]) == ("round 1, the dense model's own", "round 2, the dense model's own")
    assert told[1]["note"].endswith("6 of 6 layers, 32 bits, log-probability -0.25")


def test_drafts_of_several_kinds_have_each_their_colour() -> None:
    mixed = {**generation("auto"), "draft_by_round": [["lookup", "bits:8"], ["bits:8"]]}
    mixed |= {"from_draft": [[False, True, False, True, True, False], [True]], "in_round": [[-1, 0, 0, 1, 1, 1], [0]]}
    told = continuation(mixed, 0)
    assert [token["marks"] for token in told[1:5]] == [
        ["begins", "drafted"],
        ["own"],
        ["begins", "drafted", "by-bits"],
        ["drafted", "by-bits"],
    ]
    assert told[3]["note"].startswith("round 2, drafted by bits:8;")
    assert "exact mode, drafted by lookup and bits:8 (auto)." in render([mixed])
    assert "exact mode, drafted by nothing (auto)." in render(
        [{**mixed, "draft_by_round": [[], []], "in_round": [[-1] * 6, [-1]]}]
    )


@pytest.mark.parametrize(
    ("draft", "kind", "name"),
    [
        (["auto"], "lookup", "lookup (auto)"),
        (["lookup"], "lookup", "lookup"),
        (["bits:4"], "bits", "bits:4"),
        (["policy"], "policy", "policy"),
        (["lens:4"], "lens", "lens:4"),
        (["lookup", "bits:4"], "cascade", "the cascade lookup → bits:4"),
    ],
)
def test_the_page_names_the_draft_and_has_a_colour_for_it(draft: list[str], kind: str, name: str) -> None:
    page = render([generation(*draft)])
    classes = [attributes.get("class") or "" for _, attributes in read(page).tags]
    assert f"exact mode, drafted by {name}." in page
    assert f".by-{kind} {{ --draft: var(--{kind}); }}" in page
    assert page.count(f"--{kind}: ") == 2  # in light and in dark
    assert classes.count(f"tokens by-{kind}") == 2
    assert classes.count("begins drafted") == classes.count("begins own") == 1
    assert "2 of 6" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def test_a_text_without_exact_mode_is_coloured_by_layers_and_bits() -> None:
    plain = generation()
    page = render([plain])
    read(page)
    assert "drafts right" not in page
    assert [token["marks"] for token in continuation(plain, 1)] == [["low"]]
    assert continuation(plain, 1)[0]["saved"] == 0.5


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '"x"', "[" * 10**5])
def test_what_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    status, _, errors = command("report", tmp_path / "a.json", "--out", tmp_path / "report.html")
    assert (status, len(errors.strip().splitlines())) == (2, 1)
    assert not (tmp_path / "report.html").exists()


def test_a_result_with_holes_is_refused_and_nothing_overwritten(tmp_path: Path) -> None:
    broken = deepcopy(result())
    del broken["samples"][0]["bits"]
    (tmp_path / "a.json").write_text(json.dumps(broken))
    out = tmp_path / "report.html"
    with pytest.raises(EvaluationError, match="lacks what the report shows"):
        write_report([read_result(tmp_path / "a.json")], out)
    assert not out.exists()
    (tmp_path / "a.json").write_text(json.dumps(result()))
    assert command("report", tmp_path / "a.json", "--out", out)[0] == 0
    status, _, errors = command("report", tmp_path / "a.json", "--out", out)
    assert status == 2
    assert "already" in errors
    status, _, errors = command("report", tmp_path / "b.json", "--out", out, "--overwrite")
    assert status == 2


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to render with")
@pytest.mark.parametrize("size", ["1280,1600", "390,1600"])
def test_a_browser_renders_it(tmp_path: Path, size: str) -> None:
    write_report([result(), calibration(), generation("auto")], tmp_path / "report.html")
    shot = tmp_path / "report.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    subprocess.run(
        [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}",
         f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert shot.stat().st_size > 20_000


def test_nothing_has_no_sign() -> None:
    study = result()
    study["table"].append(scored("shaved", "baseline", -1e-6, -1e-6))
    assert "-0.0 %" not in render([study])
    assert "−0.000" not in render([study])


def test_no_kind_of_row_is_left_out_and_each_has_a_colour() -> None:
    rows = [scored(f"one {kind}", kind, 0.1, 0.1) for kind in ("off", "ablation", "preset", "calibrated", "baseline")]
    page = render([{**result(), "table": rows}])
    for row in rows:
        assert f'<span class="{row["kind"]}">●</span> {row["name"]}</td>' in page
        assert f'<g class="{row["kind"]}">' in page
        assert f".{row['kind']} {{ fill: var(--{row['kind']})" in page
