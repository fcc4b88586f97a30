"""What a server is sent by those who mean it no good, or know no better: it answers in one line, and goes on."""

import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.serving import Running, alone, running
from tests.tiny import tiny_model

MODEL = tiny_model("llama", tokenizer=True)
GOOD = {"prompt": "Hi", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, places=2, queue=4, body_bytes=20_000, body_seconds=1.5) as found:
        yield found


@pytest.fixture(autouse=True)
def _still_there(server: Running) -> Iterator[None]:
    """Whatever came, the next request is answered, and no row is left behind."""
    yield
    server.settle()
    assert server.post(GOOD).json()["choices"][0]["text"] == alone(MODEL, "Hi", max_new_tokens=4)


def complaint(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert answer.status_code in statuses, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in answer.text
    return error


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 9000, b"\x00\xff", b'{"a":' * 3000, b"9" * 9000])
def test_bodies_that_are_no_json_objects(server: Running, path: str, body: bytes) -> None:
    complaint(httpx.post(f"{server.url}{path}", content=body), 400)


def test_bodies_too_large(server: Running) -> None:
    complaint(server.post({**GOOD, "prompt": "x" * 30_000}), 413)

    chunked = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    for path, status in ((b"/v1/completions", b"413"), (b"/health", b"405"), (b"/nothing", b"404")):
        with raw(server, chunked % path) as client:
            with suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(20_000):  # it goes on for as long as the server lets it
                    client.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
                pytest.fail("the server read on after it had answered")
            with suppress(ConnectionResetError):
                assert client.recv(9000).split(b" ")[1] == status


def test_numbers_and_texts_at_the_edge(server: Running) -> None:
    for field, value in (
        ("temperature", "1e999"),
        ("temperature", "NaN"),
        ("max_tokens", "9" * 400),
        ("seed", "-0.0"),
        ("n", "1e400"),
        ("top_p", "-1"),
    ):
        body = f'{{"prompt": "Hi", "{field}": {value}}}'
        complaint(httpx.post(f"{server.url}/v1/completions", content=body.encode()), 400)
    complaint(server.post({**GOOD, "prompt": ""}), 400)
    complaint(server.post({**GOOD, "prompt": [10**30]}), 400)
    complaint(server.post({**GOOD, "prompt": [-1]}), 400)
    complaint(server.post({**GOOD, "prompt": ["a"] * 300}), 400)
    surrogate = b'{"prompt": "\\ud800", "max_tokens": 2}'
    complaint(httpx.post(f"{server.url}/v1/completions", content=surrogate), 400)
    error = complaint(server.post({**GOOD, "a\n\x1b[31mb": 1}), 400)
    assert "\x1b" not in error["message"]


def test_messages_that_a_template_refuses(server: Running) -> None:
    for messages in ([{"role": "user", "content": "\ud800"}], [{"role": "\x00" * 900, "content": "x" * 900}]):
        body = json.dumps({"messages": messages, "max_tokens": 2}).encode()
        complaint(httpx.post(f"{server.url}/v1/chat/completions", content=body), 400)


def test_any_field_may_be_anything(server: Running) -> None:
    """Not one of some hundred bodies of random values is answered with a fault of ours."""
    choice = random.Random(0)
    values: list[Any] = [None, True, -1, 0, 1, 3, 2.5, "", "x", [], [1], ["x"], {}, {"a": 1}, [[]], "off", 10**20]
    names = ["prompt", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "stream", "policy"]
    names += ["messages", "bits", "exact", "draft", "echo", "stream_options", "min_p", "top_k", "spent", "ignore_eos"]
    for _ in range(120):
        body = {"max_tokens": 2, **{choice.choice(names): choice.choice(values) for _ in range(choice.randint(1, 4))}}
        answer = server.post(body, choice.choice(["/v1/completions", "/v1/chat/completions"]))
        assert answer.status_code in (200, 400, 404), (body, answer.text)


def raw(server: Running, sent: bytes) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    found.sendall(sent)
    return found


def head(server: Running, length: int) -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_a_body_that_comes_byte_by_byte(server: Running) -> None:
    body = json.dumps(GOOD).encode()
    with raw(server, head(server, len(body))) as client:
        for byte in body:
            client.sendall(bytes([byte]))
        assert client.recv(9000).startswith(b"HTTP/1.1 200")


def test_a_body_that_never_ends(server: Running) -> None:
    with raw(server, head(server, 100) + b'{"prompt"') as client:
        assert client.recv(9000).startswith(b"HTTP/1.1 408")


def test_what_is_no_http(server: Running) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"A" * 40_000):
        with raw(server, sent) as client, suppress(ConnectionResetError, TimeoutError):
            assert not client.recv(9000).startswith(b"HTTP/1.1 2")


def test_a_path_and_a_host_of_nonsense(server: Running) -> None:
    for path in ("/../../etc/passwd", "/v1/models/..%2f..", "/%00", "/v1/completions/x"):
        with raw(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()) as client:
            assert b" 404 " in client.recv(9000).split(b"\r\n")[0]
    for host in ("", "[", "evil.example", "127.0.0.1:x", "127.0.0.1.evil.example", "a@127.0.0.1.evil"):
        with raw(server, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()) as client:
            assert client.recv(9000).split(b" ")[1] in (b"403", b"400")


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish(server: Running, stream: bool) -> None:
    """Before a word, in the middle of a stream, and with a reset; more than there are places and queue."""
    body = json.dumps({"prompt": "Hi", "max_tokens": 400, "temperature": 0, "stream": stream}).encode()
    for number in range(9):
        client = raw(server, head(server, len(body)) + body)
        if number % 3 == 1 and stream:
            client.recv(200)
        if number % 3 == 2:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.close()
        time.sleep(0.05)


def test_a_client_that_does_not_read(server: Running) -> None:
    """It holds up nobody else."""
    body = json.dumps({"prompt": "Hi", "max_tokens": 500, "temperature": 0, "stream": True, "spent": True}).encode()
    with raw(server, head(server, len(body)) + body):
        assert server.post(GOOD).status_code == 200
