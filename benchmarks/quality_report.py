"""The tables of docs/results.md, from the result files of benchmarks.quality. Measures nothing.

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is written around them is a person's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "results.md"

_HEAD = "| policy | perplexity | increase (95 %) | FLOPs saved | weight bytes saved | cache slots saved |"


def write_report(paths: Mapping[str, Path]) -> None:
    """Put the block of every result that is there between its markers; a page without them is left as it is."""
    page = PAGE.read_text("utf-8")
    for name, path in paths.items():
        if path.is_file() and f"<!-- {name} -->" in page:
            page = replaced(page, name, block(json.loads(path.read_text("utf-8"))))
    PAGE.write_text(page, "utf-8")


def replaced(page: str, name: str, content: str) -> str:
    """The page with other content between the markers of `name`."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(opening) != 1 or page.count(closing) != 1:
        raise ValueError(f"the page needs {opening} and {closing}, once each")
    before, rest = page.split(opening)
    return f"{before}{opening}\n{content}\n{closing}{rest.split(closing)[1]}"


def block(result: Mapping[str, Any]) -> str:
    """One model: both protocols, the shipped policy on other text, and how long it took."""
    parts = [_judged(result)]
    if result["further"]:
        parts.append(f"The policy for +0.2 on other text:\n\n{_further(result['further'])}")
    if "every_token" in result:
        parts.append(f"**Every token scored, no prefix (the paper's protocol).** {_judged(result['every_token'])}")
    if "seconds" in result:
        parts.append(f"All of it took {result['seconds'] / 60:.1f} minutes on {result['environment']['cpu']}.")
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
