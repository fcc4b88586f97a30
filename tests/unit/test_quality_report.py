"""The pure parts of the quality studies' page."""

from typing import Any

import pytest

from benchmarks.quality_report import (
    across,
    block,
    direct_lens,
    merged,
    presets,
    replaced,
    side_by_side,
    table,
    validity,
)
from qs_jax.adaptive.policy import Halting, Policy


def row(name: str, kind: str, increase: float, flops: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "perplexity": 10 + increase,
        "perplexity_increase": increase,
        "perplexity_increase_interval": [increase - 0.1, increase + 0.1],
        "flops_reduction": flops,
        "bytes_reduction": -1e-9,
        "kv_reduction": 0.25,
    }


ROWS = [
    row("off", "off", 0.0, 0.0),
    row("calibrated +0.05", "calibrated", 0.02, 0.3),
    row("stop", "baseline", 0.02, 0.3),
]
ROWS += [row("calibrated +0.2", "calibrated", 0.02, 0.3), row("calibrated +1", "calibrated", 0.7, 0.6)]


def test_rows_that_came_to_the_same_are_one_but_not_across_kinds() -> None:
    names = [entry["name"] for entry in merged(ROWS)]
    assert names == ["off", "calibrated +0.05; calibrated +0.2", "stop", "calibrated +1"]


def test_nothing_saved_is_nothing_whatever_its_sign() -> None:
    assert table({"table": ROWS[1:2]}).splitlines()[-1] == (
        "| calibrated +0.05 | 10.020 | +0.020 (-0.080, +0.120) | 30.0% | 0.0% | 25.0% |"
    )


def test_a_block_replaces_what_stood_between_its_markers_only() -> None:
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n<!-- b -->\nkept\n<!-- /b -->\n"
    assert replaced(page, "a", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="once each"):
        replaced(page, "c", "new")


def test_a_block_says_what_was_trusted_and_what_was_not() -> None:
    chosen = {"flops_reduction": 0.3, "perplexity_increase": 0.1, "upper": 0.19}
    result = {
        "protocol": {"windows": 40, "prefix": 512, "window": 64, "batch": 8},
        "oracle": {"layers_share": 0.5},
        "perplexity_off": 10.0,
        "table": ROWS,
        "further": {},
        "calibrated": [
            {"max_ppl_increase": 0.05},
            {"max_ppl_increase": 0.2, "chosen": chosen, "best_uniform_stop": None},
        ],
    }
    text = block(result)
    assert "40 windows of 512 unscored + 64 scored tokens" in text
    assert "Trusted for +0.2 on calibration's own test windows: the policy 30.0% (at +0.100, at most +0.190)." in text
    assert "uniform" not in text


def test_a_block_has_both_protocols_and_the_time_they_took() -> None:
    protocol = {"windows": 20, "prefix": 0, "window": 128, "batch": 8}
    calibrated = [{"max_ppl_increase": 0.2, "chosen": None, "best_uniform_stop": None}]
    plain = {"protocol": protocol, "oracle": {"layers_share": 0.5}, "perplexity_off": 10.0, "table": ROWS[:1]}
    runs = {
        "prefix": {"seconds": 90.0, "environment": {"cpu": "a processor", "device": "cpu"}},
        "every": {"seconds": 30.0, "environment": {"cpu": "a processor", "device": "a card"}},
    }
    plain |= {"calibrated": calibrated, "runs": runs}
    text = block({**plain, "protocol": {**protocol, "prefix": 512}, "every_token": plain})
    assert text.index("20 windows of 512 unscored") < text.index("paper's protocol).** 20 windows of 0 unscored")
    assert text.count("Trusted for +0.2 on calibration's own test windows: nothing.") == 2
    assert text.endswith(
        "With a prefix it took 1.5 minutes on a processor; every token scored it took 0.5 minutes on a card (beside a "
        "processor)."
    )


def test_texts_stand_side_by_side_in_percent_of_each_ones_perplexity() -> None:
    one = {"text": "wikitext103-test.raw.txt", "perplexity_off": 10.0, "windows": 40, "table": ROWS}
    half = [{**entry, "perplexity_increase": entry["perplexity_increase"] / 2} for entry in ROWS]
    lines = across(
        {**one, "texts": {"c4-sample.jsonl": {**one, "windows": 20, "table": half}}}, ("stop", "calibrated +1")
    ).splitlines()
    assert "WikiText-103 test (10.00; 40 windows) | C4 (10.00; 20 windows)" in lines[0]
    assert lines[2].startswith("| stop | 30.0% | 25.0% | +0.2% (-0.8%, +1.2%) | +0.1%")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| stop", "| calibrated +1"]


def test_policies_stand_side_by_side_on_every_text() -> None:
    cost = {"perplexity": 20.1, "perplexity_off": 20.0, "perplexity_increase": 0.1, "flops_reduction": 0.026}
    cost |= {"perplexity_increase_interval": [-0.02, 0.22], "kv_reduction": 0.0}
    texts = ("wikitext103-test.raw.txt", "c4-sample.jsonl")
    rows = [{"text": text, "presets": {"balanced": cost}, "calibrated": {"calibrated +0.2": cost}} for text in texts]
    head, _, *lines = side_by_side(rows).splitlines()
    assert head.endswith("| WikiText-103 test (20.00) | C4 (20.00) |")
    cells = "+0.10, +0.5% (-0.1%, +1.1%)"
    assert lines == [f"| {name} | 2.6% | 0.0% | {cells} | {cells} |" for name in ("balanced", "calibrated +0.2")]


def test_what_presets_cost_is_a_row_per_model_and_text() -> None:
    cost = {"perplexity": 20.1, "perplexity_increase": 0.1, "perplexity_increase_interval": [-0.02, 0.22]}
    cost |= {"flops_reduction": 0.026}
    row = {"model": "smollm2", "text": "c4-sample.jsonl", "presets": {"balanced": cost}}
    assert presets({"judged": {"smollm2": {"rows": [row]}}}).splitlines()[-1] == (
        "| smollm2 | C4 | +0.50% (-0.10%, +1.10%) | 2.6% |"
    )


def test_what_the_direct_lens_brings_is_told_by_text_and_only_as_far_as_it_was_measured() -> None:
    cost = {"flops_reduction": 0.25, "perplexity_increase": 0.1234, "perplexity_increase_interval": [-0.05, 0.3]}
    less = {**cost, "flops_reduction": 0.2}
    texts = {"c4-sample.jsonl": {"tuned": {"64": cost}}, "wikitext103-test.raw.txt": {"tuned": {"64": less}}}
    halting = {"prompt_halting": {"layers": [18]}, "protect_last": 64}
    found = {
        "settings": {"stop": 18},
        "judge": {"date": "today", "cpu": "mine", **texts},
        "judge, 21": {"date": "today", "cpu": "mine", **texts},
        "calibrate": {
            "policies": {"calibrated +0.2": halting, "calibrated +0.1": {"prompt_halting": None, "protect_last": 16}},
            "texts": {"c4-sample.jsonl": {"calibrated +0.2": cost}},
        },
        "time": {
            "cpu": "mine",
            "512": {
                "last": 64, "rare": 11.0, "dense": {"median_ms": 10.0}, "direct": {"median_ms": 8.0}, "speedup": 1.25,
                "ledger": 1.3,
            },
        },
        "fit": {"curve": [{"minutes": 0.0, "steps": 0, "held_out": 0.05}]},
    }  # fmt: skip
    tables, costs = direct_lens(found), "25.0% / 20.0% | +0.12 (-0.05 to +0.30)"
    assert tables["direct parts"].splitlines()[2:] == [
        f"| {stop} | tuned | 64 | {costs} | +0.12 (-0.05 to +0.30) |" for stop in (18, 21)
    ]
    assert tables["direct calibrated"].splitlines()[2:] == [
        "| calibrated +0.2 | 18 | last 64 | 25.0% | +0.12 (-0.05 to +0.30) |"
    ]
    assert (
        tables["direct time"].splitlines()[-1]
        == "| 18 | last 64, rarer than 11.0 nats | 512 | 10 | 8 | 1.25 × | 1.30 × |"
    )
    assert tables["direct tuning"].splitlines()[-1] == "| 0.0 | 0 | 0.0500 |"
    assert direct_lens({}) == {}


def test_budgets_that_were_kept_are_counted_of_policies_that_act() -> None:
    """One that trusts nothing keeps any budget: it is none of these, whatever it is called."""
    acting, nothing = Policy("calibrated +1%", prompt_halting=Halting()), Policy("calibrated +1%")
    rows = [
        {"budget": "1%", "policy": policy.to_json(), "increase": increase, "points": 0.1, "flops_reduction": saved}
        for policy, increase, saved in ((acting, 0.05, 0.1), (acting, 0.2, 0.3), (nothing, 0.0, 0.0))
    ]
    last = validity({"perplexity_off": 10.0, "calibrations": rows}).splitlines()[-1]
    assert last == "| +1% | 2 of 3 | 1 | +1.25% (+2.00%) | 20.0% |"
