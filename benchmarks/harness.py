"""What every benchmark shares: the machine's description, interleaved timing, measured ceilings, result files."""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

_OURS = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
_PEERS = ("torch", "transformers", "ctranslate2", "xllamacpp", "openvino-genai")


def environment() -> dict[str, Any]:
    """Hardware, versions and date, to be stored beside every figure."""
    import jax

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version for name in (*_OURS, *_PEERS) if (version := _version(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def stamp() -> dict[str, str]:
    """When and on what machine a part of a result was measured, where parts are measured apart."""
    now = environment()
    return {"date": now["date"], "cpu": now["cpu"]}


def read_result(name: str) -> dict[str, Any]:
    """What `write_result` wrote under this name; empty where there is nothing yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def write_result(name: str, payload: Mapping[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` with the environment of now, also where the payload has an earlier one."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"environment": {}, **payload} | {"environment": environment()}
    path.write_text(json.dumps(whole, indent=2) + "\n")
    return path


def interleaved(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each candidate, taken in turn so that a drifting machine slows all alike.

    The first round warms up and is not counted. Candidates must block until their result is ready.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            candidate()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, minimum and maximum in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "max_ms": 1e3 * max(seconds),
    }


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median of the ratios round by round: steadier than the ratio of medians on a machine that drifts."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _cpu_model() -> str:
    """The processor's name; where it has no number, as virtual machines' often, with what tells generations apart."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = facts.get("model name", platform.processor())
    if any(letter.isdigit() for letter in name) or "cpu family" not in facts:
        return name
    return f"{name} (family {facts['cpu family']} model {facts['model']})"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
