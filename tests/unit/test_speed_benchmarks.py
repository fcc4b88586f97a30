"""The pure parts of the speed benchmarks."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGUFReader

from benchmarks import exact, harness
from benchmarks.gguf_peers import FILE_TYPES, in_format
from benchmarks.goals import Goal
from benchmarks.gpu import descend
from benchmarks.harness import read_result, write_result
from benchmarks.host_overhead import host_seconds_per_chunk
from benchmarks.quality_report import METHOD, README, replaced
from benchmarks.scaling import BASE, panels, points
from benchmarks.shapes import nested_model
from benchmarks.speed import OURS, agreement, compared, merged, seconds_per_step, table
from benchmarks.speed_report import by_machine, by_side, decode_panel, documents, page
from benchmarks.step_profile import by_kind
from qs_jax.matryoshka.kernel import NestedKernel
from tests.ggufs import write_gguf
from tests.tiny import tiny_model


def row(batch: int, ours: float, theirs: float) -> dict[str, Any]:
    sides = compared({OURS: [ours], "peer": [theirs]})
    return {"batch": batch, "sides": sides, "bandwidth_fraction": 0.5, "measured_bandwidth_gb_s": 25.0}


def test_a_ratio_is_the_median_of_ratios_round_by_round() -> None:
    sides = compared({OURS: [1.0, 2.0, 4.0], "peer": [3.0, 4.0, 4.0]})
    assert sides["peer"]["speedup"] == 2.0
    assert sides["peer"]["median_ms"] == 4000.0
    assert sides[OURS]["speedup"] == 1.0


def test_a_step_is_what_a_long_request_costs_beyond_a_short_one() -> None:
    asked = []
    sides: dict[str, Any] = {OURS: lambda prompts, new: asked.append(new)}
    seconds = seconds_per_step(sides, [[1]], 16, 2)
    assert asked == [17, 1] * 3
    assert len(seconds[OURS]) == 2


def test_sides_that_disagree_or_fall_short_are_seen() -> None:
    sides: dict[str, Any] = {OURS: lambda p, n: [[1] * n], "half": lambda p, n: [[1] * (n // 2) + [2] * (n - n // 2)]}
    assert agreement(sides, [[1]]) == {OURS: 1.0, "half": 0.5}
    assert agreement(sides, [[1]], room=1) == {OURS: 1.0, "half": 0.0}
    with pytest.raises(AssertionError, match="different numbers"):
        agreement({**sides, "short": lambda p, n: [[1]]}, [[1]])


def test_new_rows_replace_old_ones_in_order() -> None:
    rows = merged([{"batch": 8, "v": 1}, {"batch": 1, "v": 1}], [{"batch": 8, "v": 2}, {"batch": 2, "v": 2}], "batch")
    assert rows == [{"batch": 1, "v": 1}, {"batch": 2, "v": 2}, {"batch": 8, "v": 2}]


def test_rows_of_different_machines_stand_apart() -> None:
    here, there = {**row(1, 0.1, 0.2), "cpu": "here"}, {**row(1, 0.3, 0.3), "cpu": "there"}
    rows = merged([row(1, 0.5, 0.5), there], [here], "batch")
    parts = by_machine({"model": "m", "environment": {"cpu": "file", "cores": 2}, "decode": rows})
    assert [(part["environment"]["cpu"], len(part["decode"])) for part in parts] == [
        ("file", 1),
        ("here", 1),
        ("there", 1),
    ]
    assert [part["decode"][0]["sides"][OURS]["median_ms"] for part in parts] == [500.0, 100.0, 300.0]


def test_the_page_says_what_was_not_measured() -> None:
    result = {"model": "m", "environment": {"cpu": "c", "cores": 2}, "decode": [row(1, 0.02, 0.03), row(8, 0.1, 0.3)]}
    result["decode"][1]["sides"]["once"] = result["decode"][1]["sides"]["peer"]
    text = page([result], {"host_per_chunk": {"median_ms": 0.25}, "share": 0.01, "environment": {"cpu": "d"}}, None)
    assert "| 1 | 20.0 (1.00 ×) | 30.0 (1.50 ×) | – |" in text
    assert "| 8 | 100.0 (1.00 ×) | 300.0 (3.00 ×) | 300.0 (3.00 ×) |" in text
    assert "On d the host costs 0.25 ms per chunk" in text
    assert decode_panel(result).lines["once"] == ([8], [300.0])
    assert table(result["decode"][:1], "batch").startswith(f"| batch | {OURS}, ms | peer, ms |")


def test_the_real_models_table_has_a_row_for_each_side() -> None:
    step, request = row(8, 0.02, 0.03), {"tokens": 512, "new_tokens": 64, **row(1, 0.4, 0.3)}
    step["sides"]["once"] = step["sides"]["peer"]
    step["agreement"], request["agreement"] = {OURS: 1.0, "peer": 0.75, "once": 0.5}, {OURS: 1.0, "peer": 0.5}
    lines = by_side({"decode": [step], "request": [{**request, "batch": 4}]}).splitlines()
    assert lines[0] == "| ms | step, batch 8 | 512 + 64 tokens | same tokens |"
    assert lines[2:] == [
        f"| {OURS} | **20.0** | 400.0 | 100% |",
        "| peer | 30.0 | **300.0** | 67% |",
        "| once | 30.0 | – | 50% |",
    ]


def test_a_file_in_another_format_holds_the_same_model(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", general__file_type=int(FILE_TYPES["Q4_1"]))
    assert in_format(source, tmp_path, "Q4_1") == source
    made = in_format(source, tmp_path / "work", "F16")
    before, after = GGUFReader(source), GGUFReader(made)
    apart = {name for name, field in after.fields.items() if field.contents() != before.fields[name].contents()}
    assert apart == {"general.file_type"}
    for ours, theirs in zip(after.tensors, before.tensors, strict=True):
        assert (ours.name, ours.tensor_type.name) == (theirs.name, "F16" if theirs.data.ndim == 2 else "F32")
        np.testing.assert_allclose(ours.data, theirs.data, atol=1e-3)
    written = made.stat().st_mtime_ns
    assert in_format(source, tmp_path / "work", "F16").stat().st_mtime_ns == written


def test_a_run_keeps_the_sets_that_were_not_run_again() -> None:
    """And a draft that a set was not run with is not in its column."""
    ran = {"ratio": 2.0, "whole": 1.5, "gaps": []}
    before = {"batch": 1, "sets": {"chat": [{"plain": 9.0, "drafts": {"auto": ran, "lookup": ran}}]}}
    found = {"batch": 1, "sets": {"continuation": [{"plain": 7.0, "drafts": {"auto": ran}}]}}
    runs = {"m": exact.joined(before, found)}
    assert exact.table(runs).splitlines()[2:] == [
        "| m, `auto` | 2.00 (2.00) | – | – | 2.00 (2.00) | 0 of 2 |",
        "| m, `lookup` | 2.00 (2.00) | – | – | – | 0 of 1 |",
    ]
    assert "| m, `lookup` | 9.0 | 2.00, 1.50 | – | – | – |" in exact.details(runs)
    assert exact.joined(runs["m"], before)["sets"] == runs["m"]["sets"]


def test_prompts_are_said_where_there_is_a_chat_template_and_twice_where_there_are_too_few() -> None:
    plain, talks = tiny_model("llama"), tiny_model("llama", tokenizer=True)
    assert exact.ids_of(plain, "Hi", said=True) == [72, 105]
    said, text = (exact.ids_of(talks, "hi", said=said) for said in (True, False))
    assert len(said) > len(text)
    (eight,) = exact.batches(plain, "continuation", 8)
    assert eight[:4] == eight[4:] == exact.batches(plain, "continuation", 4)[0]
    assert exact.batches(plain, "continuation", 1) == [[ids] for ids in eight[:4]]


def test_rounds_are_told_apart_by_what_drafted() -> None:
    trace = {"draft_by_round": [["lookup", "bits:8"], ["bits:8"]], "accepted_by_round": [[3, 1], [2]]}
    assert exact.rounds_by(trace) == {"lookup": [1, 3], "bits:8": [2, 3]}


def test_readme_says_what_exact_mode_s_result_says() -> None:
    runs = read_result("exact")["runs"]
    told = {README: {"exact": exact.table, "exact short": exact.short}, METHOD: {"exact details": exact.details}}
    for path, blocks in told.items():
        page = path.read_text("utf-8")
        for name, made in blocks.items():
            assert replaced(page, name, made(runs)) == page
    page = METHOD.read_text("utf-8")
    assert replaced(page, "exact same", exact.alike(read_result("exact")["same"])) == page


def test_a_result_is_stored_with_the_environment_of_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert read_result("new") == {}
    write_result("new", {"environment": {"cpu": "another"}, "rows": [1]})
    write_result("new", {**read_result("new"), "more": 2})
    found = read_result("new")
    assert (found["environment"]["date"][:2], found["rows"], found["more"]) == ("20", [1], 2)


def test_documents_say_what_the_result_files_say() -> None:
    """`python -m benchmarks.speed_report` writes them."""
    for path, text in documents().items():
        assert path.read_text("utf-8") == text, path


def test_a_goal_says_where_it_is_missed_and_what_was_tried_then() -> None:
    goal = Goal("a step", 24, "ms", {"here": 23.96, "there": 24.04}, "*Lanes*")
    assert goal.cells(["here", "there", "nowhere"]) == ["a step", "≤ 24.0 ms", "24.0 ms", "**24.0 ms**", "–", "*Lanes*"]
    met = Goal("compiling", 0.25, "%", {"here": 0.25}, "*Lanes*")
    assert met.cells(["here"])[-3:] == ["≤ 25%", "25%", ""]


def test_an_axis_varies_one_setting() -> None:
    varied = points("batch")
    assert [point["batch"] for point in varied] == [1, 2, 4, 8, 16, 32]
    assert all({**point, "batch": 1} == BASE for point in varied)
    rows = [{**point, "decode_ms_per_step": 1.0, "compile_s": 2.0, "peak_rss_mb": 3000.0} for point in varied]
    step, other = panels({"batch": rows})
    assert step.lines["step"][1] == [1.0] * 6
    assert other.lines["peak memory, GB"][1] == [3.0] * 6


def test_the_hosts_share_follows_from_two_chunk_sizes() -> None:
    step, host = 0.02, 0.003
    assert host_seconds_per_chunk(step + host / 32, step + host / 8) == pytest.approx(host)


def test_nested_shapes_hold_the_same_weights() -> None:
    model = tiny_model("llama")
    nested = nested_model(model, group_size=16)
    kernel: Any = nested.network.blocks[0].q.kernel.get_value()
    embedding: Any = nested.network.embedding.table.get_value()
    assert isinstance(kernel, NestedKernel)
    plain = np.asarray(model.network.blocks[0].q.kernel.get_value())
    np.testing.assert_allclose(np.asarray(kernel.dequantise(8)), plain, atol=np.abs(plain).max() / 100)
    assert embedding.least == 8


def test_a_profile_takes_operations_together_that_differ_in_their_number() -> None:
    program = """
      %dot.1 = f32[2,8]{1,0} dot(%a, %b)
      ROOT %dot.2 = f32[2,8]{1,0} dot(%a, %b)
      %dot.3 = f32[4]{0} dot(%a, %b)
      %arg_max = (f32[3]{0}, s32[3]{0}) fusion(%dot.3)"""
    kinds = by_kind({"dot.1": 1.0, "dot.2": 2.0, "dot.3": 4.0, "arg_max": 0.5, "while": 0.1}, program)
    assert [(kind["kind"], kind["result"], kind["count"], kind["ms"]) for kind in kinds] == [
        ("dot", "f32[4]", 1, 4.0),
        ("dot", "f32[2,8]", 2, 3.0),
        ("arg_max", "f32[3]", 1, 0.5),
        ("while", "", 1, 0.1),
    ]


def test_segments_that_run_are_the_layers_without_conditionals() -> None:
    model = tiny_model("gpt2")
    hidden = jax.random.normal(jax.random.key(0), (1, 1, model.config.hidden_size))
    plain = descend(model.network, hidden, jnp.array([True]), size=0)
    behind = descend(model.network, hidden, jnp.array([True, True]), size=1)
    np.testing.assert_allclose(plain, behind, rtol=1e-5)
    skipped = descend(model.network, hidden, jnp.array([False, False]), size=1)
    np.testing.assert_allclose(skipped, hidden / jnp.sqrt(jnp.square(hidden).mean()), rtol=1e-4)
