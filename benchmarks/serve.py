"""The server under 1, 8 and 32 clients, beside llama.cpp's on the same machine in the same run; and under load.

    python -m benchmarks.serve                       # SmolLM2; llama.cpp where xllamacpp is installed
    python -m benchmarks.serve --load                # 64 clients for 5 minutes on the reference Llama
    python -m benchmarks.serve --report              # the tables of docs/serving.md from stored results, run nothing

Clients ask again as soon as they are answered. Every server runs in a process of its own and idles while another is
asked. Results go to benchmarks/results/serve.json.
"""

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.gguf_peers import in_format
from benchmarks.harness import environment, read_result, write_result
from benchmarks.quality_report import fill
from benchmarks.real_model import folder, gguf_file
from benchmarks.serve_load import loaded

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "serving.md"
CLIENTS = (1, 8, 32)
PEERS = ("Q8_0", "F16")
DTYPES = ("float32", "bfloat16")
PROMPT, TOKENS = 64, 64
_REQUESTS = {1: 4, 8: 2, 32: 2}
_CONTEXT = 256


@contextmanager
def served(command: Sequence[str]) -> Iterator[str]:
    """A server in a process of its own, which prints where it listens as JSON; its address."""
    process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{command[0]} did not start; its errors are above")
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(60)


def ours(dtype: str) -> list[str]:
    options = ["--places", str(max(CLIENTS)), "--context", str(_CONTEXT), "--port", "0", "--json", "--dtype", dtype]
    return ["qs_jax", "serve", str(folder()), *options]


def be_llama_cpp(file: Path) -> None:
    """Run llama.cpp's server, as its wheel has it, until this process is ended."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    settings, rows = xllamacpp.CommonParams(), max(CLIENTS)
    settings.model.path = str(file)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    settings.n_ctx, settings.n_parallel = _CONTEXT * rows, rows
    settings.cache_prompt, settings.port, settings.verbosity = False, 0, -1
    server = xllamacpp.Server(settings)
    print(json.dumps({"url": server.listening_address}), flush=True)
    while True:
        time.sleep(1)


async def one_request(client: httpx.AsyncClient, url: str, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and from there to the end by token."""
    body = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    started, first = time.perf_counter(), 0.0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and not first:
                first = time.perf_counter()
    return first - started, (time.perf_counter() - first) / (TOKENS - 1)


async def asked(url: str, clients: int, requests: int) -> dict[str, Any]:
    """What so many clients see, who ask again as soon as they are answered."""
    random = np.random.default_rng(0)
    prompts = random.integers(1000, 40_000, (clients * requests, PROMPT)).tolist()
    seen: list[tuple[float, float]] = []
    # llama.cpp closes a connection behind a stream without saying so: each request has its own
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:

        async def ask(number: int) -> None:
            for turn in range(requests):
                seen.append(await one_request(client, url, prompts[number * requests + turn]))

        started = time.perf_counter()
        await asyncio.gather(*map(ask, range(clients)))
        seconds = time.perf_counter() - started
    firsts, gaps = zip(*seen, strict=True)
    return {
        "tokens_per_second": len(seen) * TOKENS / seconds,
        "first_ms": _two(firsts),
        "token_ms": _two(gaps),
        "requests": len(seen),
    }


def _two(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": 1e3 * statistics.median(seconds), "p95": 1e3 * float(np.quantile(seconds, 0.95))}


def measured(dtypes: Sequence[str]) -> dict[str, Any]:
    """Every server at every number of clients; each is asked once before, uncounted."""
    commands = {f"qs_jax {dtype}": ours(dtype) for dtype in dtypes}
    if importlib.util.find_spec("xllamacpp"):
        source = gguf_file()
        for kind in PEERS:
            file = in_format(source, source.parent, kind)
            commands[f"llama.cpp {kind}"] = ["benchmarks.serve", "--be-llama-cpp", str(file)]
    found: dict[str, Any] = {name: {} for name in commands}
    with ExitStack() as stack:
        urls = {name: stack.enter_context(served(command)) for name, command in commands.items()}
        for clients in CLIENTS:
            for name, url in urls.items():
                asyncio.run(asked(url, clients, 1))
                found[name][str(clients)] = asyncio.run(asked(url, clients, _REQUESTS[clients]))
                print(f"{name}, {clients} clients: {found[name][str(clients)]}", file=sys.stderr, flush=True)
    return found


def table(found: Mapping[str, Any]) -> str:
    """A row per server and number of clients, the best of each number of clients in bold."""
    heads = ("clients", "server", "tokens/s", "first token, ms (p95)", "each further one, ms (p95)")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for clients in map(str, CLIENTS):
        best = max(one[clients]["tokens_per_second"] for one in found.values())
        for name, one in found.items():
            row = one[clients]
            speed = f"{row['tokens_per_second']:.0f}"
            speed = f"**{speed}**" if row["tokens_per_second"] == best else speed
            first, token = row["first_ms"], row["token_ms"]
            cells = [f"{first['median']:.0f} ({first['p95']:.0f})", f"{token['median']:.1f} ({token['p95']:.1f})"]
            lines.append(f"| {clients} | {name} | {speed} | {' | '.join(cells)} |")
    return "\n".join(lines)


def load_table(load: Mapping[str, Any]) -> str:
    """What became of the requests under load."""
    rows = {
        "clients, seconds": f"{load['clients']}, {load['seconds']:.0f}",
        "answered": f"{load['answered']:,}",
        "of these other than the row alone": str(load["wrong"]),
        "lost or failed": str(load["lost"]),
        "refused for a full queue": str(load["refused"]),
        "left by their client in the middle": f"{load['left']:,}",
        "tokens a second": f"{load['tokens_per_second']:.0f}",
        "answer, median and p95": f"{load['answer_s']['median']:.1f} and {load['answer_s']['p95']:.1f} s",
        "server's memory, first and last minute": " and ".join(f"{mb:.0f} MB" for mb in load["memory_mb"]),
        "programs compiled while it ran, in the last half": str(load["compiled_late"]),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES))
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--clients", type=int, default=64, help="with --load")
    parser.add_argument("--seconds", type=float, default=300, help="with --load")
    parser.add_argument("--report", action="store_true", help="the tables from stored results, run nothing")
    parser.add_argument("--be-llama-cpp", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be_llama_cpp:
        be_llama_cpp(options.be_llama_cpp)
    stored = read_result("serve")
    if options.load:
        model = ROOT / "reference_models" / "llama"
        command = ["qs_jax", "serve", str(model), "--places", "16", "--port", "0", "--json"]
        with served(command) as url:
            load = loaded(url, model, clients=options.clients, seconds=options.seconds)
        stored["load"] = {"measured": _facts(), **load}
    elif not options.report:
        stored["servers"] = {"measured": _facts(), "found": measured(options.dtype)}
    if not options.report:
        print(write_result("serve", {name: stored[name] for name in ("servers", "load") if name in stored}))
    blocks = {}
    if "servers" in stored:
        blocks["servers"] = table(stored["servers"]["found"])
    if "load" in stored:
        blocks["load"] = load_table(stored["load"])
    print("\n\n".join(blocks.values()))
    fill(PAGE, blocks)


def _facts() -> dict[str, Any]:
    facts = environment()
    return {name: facts[name] for name in ("cpu", "cores", "date", "versions")}


if __name__ == "__main__":
    main()
