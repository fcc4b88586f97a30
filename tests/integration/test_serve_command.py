"""`qs-jax serve` as people start and end it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from qs_jax.serving.options import KEY_VARIABLE, ServeError, ServeOptions

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "reference_models" / "llama"


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "qs_jax", "serve", str(MODEL), "--no-warm-up", "--places", "2", *options]


@contextmanager
def started(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and where it listens."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command("--port", "0", "--json", *options),
        env={**os.environ, **environment},
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())["url"]
    finally:
        process.kill()
        process.communicate()


def refused(*options: str) -> str:
    done = subprocess.run(command(*options), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_what_runs(sent: signal.Signals) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 300, "temperature": 0, "stream": True, "ignore_eos": True}
    with started() as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            process.send_signal(sent)
            rest = [line for line in lines if line]
        assert first.startswith("data: {")
        assert rest[-1] == "data: [DONE]"
        assert process.wait(60) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert log.splitlines()[-1] == "the server has ended"
    assert "Traceback" not in log


def test_a_second_signal_ends_it_at_once() -> None:
    body = {"prompt": "Once", "max_tokens": 1000, "temperature": 0, "stream": True, "ignore_eos": True}
    with started() as (process, url), httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
        lines = answer.iter_lines()  # once this is gone, so is the client
        next(lines)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_key_may_come_from_the_environment() -> None:
    with started(**{KEY_VARIABLE: "secret"}) as (_, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        good = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"})
        assert good.json()["data"][0]["id"] == "llama"


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"cannot listen at 127.0.0.1 port {port}" in refused("--port", port)


def test_options_that_cannot_be_are_one_line() -> None:
    assert "places is 0" in refused("--places", "0")
    assert "not NAME=FILE" in refused("--policy", "nonsense")


@pytest.mark.parametrize(
    "wrong", [{"queue": -1}, {"port": 70_000}, {"context": 1}, {"api_key": ""}, {"api_key": "ä"}, {"chunk": 0}]
)
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ServeError):
        ServeOptions(**wrong)


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, qs_jax, qs_jax.cli; print(sorted({'starlette', 'uvicorn', 'jax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
