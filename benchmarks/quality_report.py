"""The tables of docs/results.md and README, from the result files of benchmarks.quality and .presets. Measures nothing.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is written around them is a person's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qs_jax.adaptive.policy import Policy

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
README = Path(__file__).parents[1] / "README.md"
METHOD = PAGE.with_name("method.md")
TEXTS = {
    "wikitext103-test.raw.txt": "WikiText-103 test",
    "c4-sample.jsonl": "C4",
    "novels.txt.xz": "novels",
    "tinystories_train_first1000.json": "stories",
}
PROTOCOLS = {"prefix": "With a prefix it", "every": "every token scored it"}
_SHOWN = (
    *("halting", "halting + kv_skipping", "fusion", "precision", "halting + kv_skipping + fusion"),
    *("halting + kv_skipping + fusion + precision", "paper", "balanced", "calibrated +0.2", "calibrated +1"),
)
"""Rows of README's table: the mechanisms alone and together, the presets, and what calibration finds."""

_HEAD = "| policy | perplexity | increase (95 %) | FLOPs saved | weight bytes saved | cache slots saved |"


def write_report(paths: Mapping[str, Path]) -> None:
    """Put the block of every result that is there between its markers; a page without them is left as it is."""
    results = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.is_file()}
    fill(PAGE, {name: block(result) for name, result in results.items()})
    fill(README, {f"{n} texts": across(r if "table" in r else r["every_token"], _SHOWN) for n, r in results.items()})


def write_presets(found: Mapping[str, Any]) -> None:
    """Put what the presets cost into the pages, and what was tried for `balanced` into the longer one."""
    judged = found.get("judged", {})
    tables = {f"{name} prefix": side_by_side(one["rows"]) for name, one in judged.items()}
    tables |= {"presets": presets(found)} if judged else {}
    fill(README, tables)
    tried = {f"search {name}": candidates(one) for name, one in found.get("search", {}).items()}
    fill(PAGE, {**tables, **tried})


def write_direct_lens(found: Mapping[str, Any]) -> None:
    """Put what the direct lens brings into the pages."""
    fill(PAGE, direct_lens(found))


def write_validity(found: Mapping[str, Any]) -> None:
    """Put how often calibrated budgets were kept into the page, without a direct lens and with one."""
    parts = {"validity": found, "validity direct": found.get("direct")}
    fill(PAGE, {name: validity(part) for name, part in parts.items() if part})


def fill(file: Path, blocks: Mapping[str, str]) -> None:
    """Put each block between its markers in a page, where it has them."""
    page = file.read_text("utf-8")
    for name, content in blocks.items():
        if f"<!-- {name} -->" in page:
            page = replaced(page, name, content)
    file.write_text(page, "utf-8")


def replaced(page: str, name: str, content: str) -> str:
    """The page with other content between the markers of `name`."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(opening) != 1 or page.count(closing) != 1:
        raise ValueError(f"the page needs {opening} and {closing}, once each")
    before, rest = page.split(opening)
    return f"{before}{opening}\n{content}\n{closing}{rest.split(closing)[1]}"


def block(result: Mapping[str, Any]) -> str:
    """One model: both protocols, the policy for +0.2 on other text, and how long it took."""
    parts = [_judged(result)] if "table" in result else []
    if result.get("texts"):
        parts.append(f"Four texts, increases in percent of the dense model's perplexity:\n\n{across(result)}")
    if result.get("bfloat16"):
        parts.append(f"What bfloat16 adds of its own:\n\n{_bfloat16(result['bfloat16'])}")
    if result.get("further"):
        parts.append(f"The policy for +0.2 on other text:\n\n{_further(result['further'])}")
    if "every_token" in result:
        every = result["every_token"]
        parts.append(f"**Every token scored, no prefix (the paper's protocol).** {_judged(every)}")
        if every.get("texts"):
            parts.append(f"The four texts in that protocol:\n\n{across(every)}")
    took = [
        f"{said} took {run['seconds'] / 60:.1f} minutes on {machine(run['environment'])}"
        for name, said in PROTOCOLS.items()
        if (run := result.get("runs", {}).get(name))
    ]
    if took:
        parts.append(f"{'; '.join(took)}.")
    return "\n\n".join(parts)


def _judged(result: Mapping[str, Any]) -> str:
    """One protocol: what was judged, the main rows, what calibration trusted, and the oracle."""
    protocol, oracle = result["protocol"], result["oracle"]
    calibrated = next(one for one in result["calibrated"] if one["max_ppl_increase"] == 0.2)
    return "\n\n".join(
        [
            f"{protocol['windows']} windows of {protocol['prefix']} unscored + {protocol['window']} scored tokens, "
            f"{protocol['batch']} together. Perplexity off: {result['perplexity_off']:.3f}.",
            table({"table": merged(result["table"])}),
            _stops(calibrated),
            f"An oracle that stops each scored token where its most likely next token is settled would run "
            f"{oracle['layers_share']:.1%} of the layers.",
        ]
    )


def merged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows worth showing: combinations that came to exactly the same are one row."""
    found: dict[Any, dict[str, Any]] = {}
    for row in rows:
        key = (row["kind"], row["perplexity"], row["flops_reduction"], row["bytes_reduction"], row["kv_reduction"])
        if key in found and row["kind"] in ("ablation", "calibrated"):
            found[key]["name"] += f"; {row['name']}"
        else:
            found.setdefault(key, dict(row))
    return list(found.values())


def table(result: Mapping[str, Any]) -> str:
    """All rows of a result as Markdown."""
    lines = [_HEAD, "|" + "---|" * _HEAD.count(" |")]
    for row in result["table"]:
        low, high = row["perplexity_increase_interval"]
        rise = f"{row['perplexity_increase']:+.3f} ({low:+.3f}, {high:+.3f})"
        saved = (_share(row[key]) for key in ("flops_reduction", "bytes_reduction", "kv_reduction"))
        lines.append(f"| {row['name']} | {row['perplexity']:.3f} | {rise} | " + " | ".join(saved) + " |")
    return "\n".join(lines)


def machine(environment: Mapping[str, Any]) -> str:
    """What a result was taken on."""
    device = environment.get("device", "cpu")
    return environment["cpu"] if device == "cpu" else f"{device} (beside {environment['cpu']})"


def across(result: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """One row per policy and one column per text, with its dense perplexity and windows: by how many percent perplexity
    rises; work saved on the first."""
    texts = {result["text"]: result, **result.get("texts", {})}
    off = [
        f"{TEXTS[file]} ({judged['perplexity_off']:.2f}; {judged['windows']} windows)" for file, judged in texts.items()
    ]
    lines = [f"| policy | FLOPs saved | cache slots saved | {' | '.join(off)} |", "|" + "---|" * (3 + len(off))]
    by_name = [{row["name"]: row for row in judged["table"]} for judged in texts.values()]
    for row in merged(result["table"]):
        own = row["name"].split("; ")
        shown = [name for name in names if name in own] if names else own
        if row["kind"] == "off" or not shown:
            continue
        cells = [_percent(rows[own[0]]) if own[0] in rows else "–" for rows in by_name]
        saved = f"{_share(row['flops_reduction'])} | {_share(row['kv_reduction'])}"
        lines.append(f"| {'; '.join(shown)} | {saved} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(row: Mapping[str, Any], digits: int = 1) -> str:
    """An increase in percent of the dense model's perplexity, and its interval."""
    dense, ends = row["perplexity"] - row["perplexity_increase"], row["perplexity_increase_interval"]
    rise, low, high = (f"{value / dense:+.{digits}%}" for value in (row["perplexity_increase"], *ends))
    return f"{rise} ({low}, {high})"


def _bfloat16(texts: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| text | dense, float32 | dense in bfloat16 | the policy for +0.2 in bfloat16 |", "|---|---|---|---|"]
    for file, found in texts.items():
        dense, policy = (_percent(found[name]) for name in ("dense", "policy"))
        lines.append(f"| {TEXTS.get(file, file)} | {found['dense']['perplexity_off']:.3f} | {dense} | {policy} |")
    return "\n".join(lines)


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> str:
    """One model's presets and calibrated policies: what they save on the first text, and what they cost on each."""
    policies = [row["presets"] | row["calibrated"] for row in rows]
    dense = [next(iter(found.values()))["perplexity_off"] for found in policies]
    texts = [f"{TEXTS[row['text']]} ({off:.2f})" for row, off in zip(rows, dense, strict=True)]
    lines = [f"| policy | FLOPs saved | cache slots saved | {' | '.join(texts)} |", "|" + "---|" * (3 + len(rows))]
    for name, first in policies[0].items():
        saved = f"{_share(first['flops_reduction'])} | {_share(first['kv_reduction'])}"
        cells = [f"{_points(found[name])}, {_percent(found[name])}" for found in policies]
        lines.append(f"| {name} | {saved} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _points(row: Mapping[str, Any]) -> str:
    """An increase in points of perplexity."""
    return f"{row['perplexity_increase']:+.2f}"


def _interval(row: Mapping[str, Any]) -> str:
    """The same with its 95 % interval."""
    low, high = row["perplexity_increase_interval"]
    return f"{row['perplexity_increase']:+.2f} ({low:+.2f} to {high:+.2f})"


def presets(judged: Mapping[str, Any]) -> str:
    """What every preset costs on every model and text."""
    rows = [row for one in judged["judged"].values() for row in one["rows"]]
    names = list(rows[0]["presets"])
    titles = [f"`{name}` {what}" for name in names for what in ("costs", "saves of FLOPs")]
    lines = [f"| model | text | {' | '.join(titles)} |", "|" + "---|" * (2 + len(titles))]
    for row in rows:
        found = [row["presets"][name] for name in names]
        cells = [cell for one in found for cell in (_percent(one, 2), _share(one["flops_reduction"]))]
        lines.append(f"| {row['model']} | {TEXTS.get(row['text'], row['text'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def direct_lens(found: Mapping[str, Any]) -> dict[str, str]:
    """By name the tables of what there is: parts at equal saving, the way of tuning, calibrated policies, real time."""
    tables: dict[str, str] = {}
    parts: dict[str, list[Mapping[str, Any]]] = {}
    texts: dict[str, Mapping[str, Any]] = {}
    timed: list[str] = []
    for (kind, _, after), part in sorted(((key.partition(", "), part) for key, part in found.items()), key=_stop_of):
        if kind == "fit":
            points = (f"| {one['minutes']:.1f} | {one['steps']} | {one['held_out']:.4f} |" for one in part["curve"])
            name = f"direct tuning, {after}" if after else "direct tuning"
            tables[name] = "\n".join(["| minutes | steps | nats per token |", "|---|---|---|", *points])
        if kind == "time":
            stop = after or found["settings"]["stop"]
            prompts = {tokens: one for tokens, one in part.items() if tokens.isdigit()}
            timed += [f"| {stop} | {_prompt_time(tokens, one)} |" for tokens, one in prompts.items()]
        if kind == "judge":
            texts = {file: rows for file, rows in part.items() if file in TEXTS}
            for rule, ways in next(iter(texts.values())).items():
                stop = after or found["settings"]["stop"]
                parts |= {f"{stop} | {rule} | {way}": [rows[rule][way] for rows in texts.values()] for way in ways}
    if parts:
        tables["direct parts"] = _by_text("stop after | keys and values | last tokens that run", texts, parts)
    if "calibrate" in found:
        texts = found["calibrate"]["texts"]
        policies = {
            f"{name} | {one['prompt_halting']['layers'][0]} | {_running(one)}": [t[name] for t in texts.values()]
            for name, one in found["calibrate"]["policies"].items()
            if one["prompt_halting"]
        }
        tables["direct calibrated"] = _by_text("policy | stop after | tokens that run on", texts, policies)
    if timed:
        heads = "stop after", "tokens that run on", "prompt", "dense, ms", "direct lens, ms", "faster", "by the ledger"
        tables["direct time"] = "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *timed])
    return tables


def _stop_of(keyed: tuple[tuple[str, str, str], Any]) -> str:
    """Of a part of the results, for which stop it is; the usual one has no name."""
    return keyed[0][2]


def _prompt_time(tokens: str, one: Mapping[str, Any]) -> str:
    ms = (f"{one[side]['median_ms']:.0f}" for side in ("dense", "direct"))
    running = _running({"protect_last": one["last"], "protect_rare": one.get("rare")})
    return f"{running} | {tokens} | {' | '.join(ms)} | {one['speedup']:.2f} × | {one['ledger']:.2f} ×"


def _running(policy: Mapping[str, Any]) -> str:
    rare = policy.get("protect_rare")
    return f"last {policy['protect_last']}" + (f", rarer than {rare:.1f} nats" if rare is not None else "")


def validity(found: Mapping[str, Any]) -> str:
    """By budget: of how many calibrations a policy acts, how many of these keep it on fresh text, and what they do."""
    lines = ["| budget | policies that act | of these, kept it | increase, mean (most) | FLOPs saved, mean |"]
    lines.append("|---|---|---|---|---|")
    rows = found["calibrations"]
    for budget in dict.fromkeys(row["budget"] for row in rows):
        of = [row for row in rows if row["budget"] == budget]
        acting = [row for row in of if Policy.from_json(row["policy"]).mechanisms]
        kept = sum(row["increase"] <= row["points"] for row in acting)
        shares = [row["increase"] / found["perplexity_off"] for row in acting] or [0.0]
        saved = sum(row["flops_reduction"] for row in acting) / max(1, len(acting))
        mean = f"{sum(shares) / len(shares):+.2%} ({max(shares):+.2%})"
        lines.append(f"| +{budget} | {len(acting)} of {len(of)} | {kept} | {mean} | {_share(saved)} |")
    return "\n".join(lines)


def _by_text(head: str, texts: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What rows save on one text after the other, where that differs, and cost on each, in points of perplexity."""
    heads = " | ".join(TEXTS[file] for file in texts)
    lines = [f"| {head} | FLOPs saved | {heads} |", "|" + "---|" * (2 + head.count("|") + len(texts))]
    for name, found in rows.items():
        saved = " / ".join(dict.fromkeys(_share(row["flops_reduction"]) for row in found))
        lines.append(f"| {name} | {saved} | {' | '.join(map(_interval, found))} |")
    return "\n".join(lines)


def candidates(search: Mapping[str, Any]) -> str:
    """What was tried for a preset, on each text."""
    texts = search["texts"]
    first = next(iter(texts.values()))["candidates"]
    heads = " | ".join(TEXTS.get(file, "WikiText training text") for file in texts)
    lines = [f"| candidate | FLOPs saved | weight bytes saved | cache slots saved | {heads} |"]
    lines.append("|" + "---|" * (4 + len(texts)))
    for name, row in first.items():
        saved = (_share(row[key]) for key in ("flops_reduction", "bytes_reduction", "kv_reduction"))
        cells = (_percent(one["candidates"][name], 2) for one in texts.values())
        lines.append(f"| {name} | {' | '.join(saved)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(value: float) -> str:
    """A percentage; nothing is nothing, whatever its sign."""
    return f"{value:z.1%}"


def _further(texts: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| text | windows | perplexity off | increase (95 %) | FLOPs saved |", "|---|---|---|---|---|"]
    for name, found in texts.items():
        low, high = found["perplexity_increase_interval"]
        lines.append(
            f"| {name} | {found['protocol']['windows']} | {found['perplexity_off']:.1f} | "
            f"{found['perplexity_increase']:+.2f} ({low:+.2f}, {high:+.2f}) | "
            f"{_share(found['ledger']['flops_reduction'])} |"
        )
    return "\n".join(lines)


def _stops(calibrated: Mapping[str, Any]) -> str:
    """What calibration for +0.2 trusted on its own test windows: its choice, and the best uniform stops."""
    names = {
        "chosen": "the policy",
        "best_uniform_stop": "the best uniform stop of the prompt, frozen keys and values,",
        "best_uniform_stop_with_lens": "the best uniform stop with the lens",
    }
    said = [f"{what} {_share(row['flops_reduction'])} (at {row['perplexity_increase']:+.3f}, at most "
            f"{row['upper']:+.3f})" for key, what in names.items() if (row := calibrated.get(key))]  # fmt: skip
    return f"Trusted for +0.2 on calibration's own test windows: {'; '.join(said) or 'nothing'}."
