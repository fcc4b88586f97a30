"""Many clients at once, whose answers are compared with those of `generate`: see `benchmarks.serve --load`."""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import qs_jax

_OPENINGS = (
    "Once upon a time",
    "There was a little girl named Lily who",
    "The dog and the cat",
    "One day, Tom went to the park with his mom and",
    "It was raining, so",
    "The big red ball rolled down the hill and",
    "Sam had a secret",
    "In the forest there lived an old bear. He",
)
_LENGTHS = (5, 24, 60)
_KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.2, "top_p": 0.9, "seed": 11},
    {"temperature": 0, "policy": "calibrated"},
    {"temperature": 0, "exact": True, "draft": "lookup"},
)
_WEIGHTS = (5, 5, 5, 2, 1)
_LEAVES = 0.08
"""The share of clients' requests that they leave in the middle."""


@dataclass(frozen=True)
class Case:
    """A request, and the text that the row alone has."""

    body: dict[str, Any]
    weight: int
    text: str


@dataclass
class Seen:
    """What became of requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)


def cases(folder: Path) -> list[Case]:
    """Every opening at every length in every kind, with what `generate` makes of it."""
    model, found = qs_jax.load(folder), []
    for kind, weight in zip(_KINDS, _WEIGHTS, strict=True):
        sampled = {name: kind[name] for name in ("temperature", "top_p", "seed") if name in kind}
        settings: dict[str, Any] = {"do_sample": True, **sampled} if kind["temperature"] else {"do_sample": False}
        policy = folder / "policy.json" if "policy" in kind else "off"
        for tokens in _LENGTHS:
            texts = [
                qs_jax.generate(model, opening, None, max_new_tokens=tokens, policy=policy, **settings).texts[0]
                for opening in _OPENINGS
            ]
            found += [
                Case({"prompt": opening, "max_tokens": tokens, **kind}, weight, text)
                for opening, text in zip(_OPENINGS, texts, strict=True)
            ]
    return found


def loaded(url: str, folder: Path, *, clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients saw in so many seconds."""
    known = cases(folder)
    return asyncio.run(_run(url, known, clients, seconds))


async def _run(url: str, known: list[Case], clients: int, seconds: float) -> dict[str, Any]:
    seen, memory = Seen(), []
    started = time.perf_counter()
    end = started + seconds
    compiled: list[int] = []
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=2 * clients)) as client:

        async def watch() -> None:
            while time.perf_counter() < end:
                told = (await client.get(f"{url}/health")).json()
                memory.append(told["memory_mb"])
                compiled.append(told["programs_compiled"])
                await asyncio.sleep(min(5.0, seconds / 10))

        await asyncio.gather(watch(), *(_client(client, url, known, number, end, seen) for number in range(clients)))
        left_over = (await client.get(f"{url}/health")).json()
    took, minute = time.perf_counter() - started, max(1, len(memory) // 5)
    answered = seen.outcomes["right"] + seen.outcomes["wrong"]
    return {
        "clients": clients,
        "seconds": took,
        "answered": answered,
        "wrong": seen.outcomes["wrong"],
        "lost": seen.outcomes["lost"],
        "refused": seen.outcomes["refused"],
        "left": seen.outcomes["left"],
        "tokens_per_second": seen.tokens / took,
        "answer_s": {"median": statistics.median(seen.seconds), "p95": float(np.quantile(seen.seconds, 0.95))},
        "memory_mb": [statistics.median(memory[:minute]), statistics.median(memory[-minute:])],
        "compiled_late": compiled[-1] - compiled[len(compiled) // 2],
        "left_over": {name: left_over[name] for name in ("running", "waiting")},
        "differing": seen.wrong[:5],
    }


async def _client(client: httpx.AsyncClient, url: str, known: list[Case], number: int, end: float, seen: Seen) -> None:
    choice = random.Random(number)
    while time.perf_counter() < end:
        (case,) = choice.choices(known, [case.weight for case in known])
        body = {**case.body, "stream": choice.random() < 0.5}
        leaves, started = body["stream"] and choice.random() < 2 * _LEAVES, time.perf_counter()
        try:
            status, text = await _asked(client, url, body, leaves=leaves)
        except httpx.HTTPError as error:
            seen.outcomes["lost"] += 1
            seen.wrong.append({"body": body, "error": repr(error)})
            continue
        if status != 200:
            seen.outcomes["refused" if status == 503 else "lost"] += 1
            await asyncio.sleep(1)
        elif leaves:
            seen.outcomes["left"] += 1
        else:
            seen.outcomes["right" if text == case.text else "wrong"] += 1
            seen.seconds.append(time.perf_counter() - started)
            seen.tokens += body["max_tokens"]
            if text != case.text:
                seen.wrong.append({"body": body, "text": text, "alone": case.text})


async def _asked(client: httpx.AsyncClient, url: str, body: dict[str, Any], *, leaves: bool) -> tuple[int, str]:
    """Status and text; a client that leaves goes after the first event."""
    if not body["stream"]:
        whole = await client.post(f"{url}/v1/completions", json=body)
        return whole.status_code, whole.json()["choices"][0]["text"] if whole.status_code == 200 else ""
    text, done = "", False
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            done = line == "data: [DONE]"
            if answer.status_code != 200 or leaves or done:
                break
            if line.startswith("data: "):
                text += json.loads(line[6:])["choices"][0]["text"]
    return answer.status_code if done or leaves or answer.status_code != 200 else 0, text
