"""The report: complete, self-contained, and safe against the text it shows."""

import json
import shutil
import subprocess
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qs_jax.errors import EvaluationError
from qs_jax.evaluation.plot import HEIGHT, WIDTH, histogram, pareto
from qs_jax.evaluation.report import read_result, render, tokens, write_report
from tests.study import command

DEPTH = 6
HOSTILE = '<script>alert("x")</script>'
LEDGER = {"flops_reduction": 0.31, "bytes_reduction": 0.1, "kv_slots": 70, "kv_slots_off": 100}


def scored(name: str, kind: str, saved: float, rise: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "mechanisms": [],
        "perplexity": 4.0 + rise,
        "perplexity_off": 4.0,
        "perplexity_increase": rise,
        "perplexity_increase_interval": [rise - 0.05, rise + 0.07],
        "flops_reduction": saved,
        "bytes_reduction": saved / 3,
        "kv_reduction": 0.0,
        "top1_agreement": 0.9,
        "kl_nats": 0.01,
        "prefill_s_per_batch": 0.1,
        "decode_s_per_batch": 0.2,
    }


def result() -> dict[str, Any]:
    sample = {
        "depth": DEPTH,
        "prompt": ["", "Once", " upon", HOSTILE, "\n\n"],
        "prompt_layers_run": [6, 4, 3, 3, 6],
        "prompt_fused_with": [-1, -1, 3, -1, -1],
        "text": [" a", " time"],
        "layers_run": [6, 5],
        "bits": [8.0, 4.0],
        "logprobs": [-0.5, -1.25],
    }
    rows = [
        scored("off", "off", 0.0, 0.0),
        scored("calibrated +0.2", "calibrated", 0.31, 0.12),
        scored("prompt stops after 4", "baseline", 0.27, 0.08),
        scored("halting", "ablation", 0.2, 0.3),
        scored("halting + kv_skipping", "ablation", 0.2, 40.0),
    ]
    return {
        **scored("judged", "calibrated", 0.31, 0.12),
        "model": f"model {HOSTILE}",
        "text": "stories.json",
        "policy": {"name": "calibrated +0.2"},
        "protocol": {"name": "prefix", "prefix": 5, "window": 2, "batch": 8, "windows": 40},
        "tokens_scored": 80,
        "bits_per_byte": 0.7,
        "bits_per_byte_off": 0.69,
        "ledger": LEDGER,
        "layers_histogram": [0, 0, 0, 30, 10, 0, 60],
        "samples": [sample],
        "table": rows,
        "oracle": {"layers_share": 0.877, "settled_early": 0.5},
    }


def calibration() -> dict[str, Any]:
    row = {"flops_reduction": 0.3, "perplexity_increase": 0.1, "upper": 0.15, "layers_run_mean": 4.2, "accepted": True}
    tested = [row, {**row, "accepted": False}]
    return {"max_ppl_increase": 0.2, "confidence": 0.9, "policy": {}, "tested": tested, "best_uniform_stop": row}


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


def test_marks_lie_within_the_figure_and_keep_their_order() -> None:
    figure = pareto(result()["table"])
    assert all(0 <= mark.x <= WIDTH and 0 <= mark.y <= HEIGHT for mark in figure.marks)
    off, calibrated, uniform, halting, lost = figure.marks
    assert off.x < halting.x < uniform.x < calibrated.x < figure.paper_x
    assert off.y > uniform.y > calibrated.y > figure.budget_y > halting.y
    assert [mark.outside for mark in figure.marks] == [False] * 4 + [True]
    assert lost.y == min(mark.y for mark in figure.marks)
    assert figure.front == [(calibrated.x, calibrated.y), (uniform.x, uniform.y), (off.x, off.y)]
    assert all(mark.high <= mark.y <= mark.low for mark in figure.marks)


def test_bars_are_proportional() -> None:
    bars = histogram([0, 0, 0, 30, 10, 0, 60])
    assert [bar.layers for bar in bars] == [1, 2, 3, 4, 5, 6]
    assert bars[2].height == pytest.approx(bars[5].height / 2, abs=0.1)
    assert bars[5].share == "60.0%"
    assert [bar.height for bar in histogram([0, 0])] == [0]


def test_tokens_say_what_was_spent_on_them() -> None:
    told = tokens(result()["samples"][0])
    assert [round(token["saved"], 2) for token in told] == [0, 0.33, 0.5, 0.5, 0, 0, 0.17]
    assert [token["scored"] for token in told] == [False] * 5 + [True] * 2
    assert [token["low"] for token in told][-2:] == [False, True]
    assert told[2]["fused"]


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
    write_report([result(), calibration()], tmp_path / "report.html")
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
