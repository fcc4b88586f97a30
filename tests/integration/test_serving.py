"""The server through OpenAI's own client, and side by side with `generate`."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import qs_jax
from qs_jax.engine.compilation import METER
from qs_jax.errors import QsJaxError
from qs_jax.serving.options import ServeOptions
from qs_jax.serving.running import warm_up
from qs_jax.serving.service import Service, served_policies
from tests.serving import Running, alone, running
from tests.tiny import quantised, tiny_model

MODEL = tiny_model("llama", tokenizer=True)
NAME = MODEL.name
CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MODEL, places=4) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


def test_a_completion_is_what_generate_gives(client: openai.OpenAI) -> None:
    found = client.completions.create(model=NAME, prompt="Once upon", max_tokens=12, temperature=0)
    assert found.choices[0].text == alone(MODEL, "Once upon", max_new_tokens=12)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (9, 12, 21)
    assert (found.model, found.object) == (NAME, "text_completion")


def test_a_chat_goes_through_the_template(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model=NAME, messages=CHAT, max_completion_tokens=9, temperature=0)
    expected = qs_jax.generate(MODEL, [CHAT], max_new_tokens=9).texts[0]
    assert found.choices[0].message.content == expected
    assert found.choices[0].message.role == "assistant"


def test_streams_join_to_the_whole(client: openai.OpenAI) -> None:
    ours = {"seed": 5, "temperature": 1.3, "top_p": 0.9}
    expected = alone(MODEL, "Once", max_new_tokens=20, do_sample=True, **ours)
    stream = client.completions.create(
        model=NAME, prompt="Once", max_tokens=20, stream=True, stream_options={"include_usage": True}, **ours
    )
    parts = list(stream)
    assert "".join(choice.text for part in parts for choice in part.choices) == expected
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == 20
    chat = client.chat.completions.create(model=NAME, messages=CHAT, max_tokens=20, stream=True, **ours)
    deltas = [choice.delta for part in chat for choice in part.choices]
    assert deltas[0].role == "assistant"
    text = "".join(delta.content or "" for delta in deltas)
    assert text == qs_jax.generate(MODEL, [CHAT], max_new_tokens=20, do_sample=True, **ours).texts[0]


def test_a_stream_is_events_and_ends_with_done(server: Running) -> None:
    body = {"prompt": "Hi", "max_tokens": 9, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]][-1] == "length"


def test_several_prompts_and_sequences(client: openai.OpenAI) -> None:
    prompts = ["One", "Another"]
    found = client.completions.create(model=NAME, prompt=prompts, n=2, max_tokens=10, seed=3, temperature=0.9)
    settings = {"max_new_tokens": 10, "do_sample": True, "temperature": 0.9, "num_return_sequences": 2, "seed": 3}
    expected = qs_jax.generate(MODEL, prompts, None, **settings).texts
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model=NAME, prompt=[47, 78], max_tokens=5, temperature=0)
    assert ids.choices[0].text == qs_jax.generate(MODEL, [47, 78], max_new_tokens=5).texts[0]


def test_logprobs_are_those_of_generate(client: openai.OpenAI) -> None:
    plain = qs_jax.generate(MODEL, "Hi", max_new_tokens=6)
    found = client.completions.create(model=NAME, prompt="Hi", max_tokens=6, temperature=0, logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx(plain.logprobs[0], abs=1e-4)
    assert logprobs.tokens == plain.pieces[0]
    assert logprobs.text_offset == list(range(6))
    assert [max(top.values()) for top in logprobs.top_logprobs or ()] == pytest.approx(plain.logprobs[0], abs=1e-4)
    chat = client.chat.completions.create(
        model=NAME, messages=CHAT, max_tokens=4, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content is not None
    assert [one.logprob for one in content] == pytest.approx([one.top_logprobs[0].logprob for one in content])
    assert [len(one.top_logprobs) for one in content] == [2] * 4


def test_stops_end_an_answer(client: openai.OpenAI) -> None:
    plain = alone(MODEL, "Hi", max_new_tokens=40)
    stop = plain[11:13]
    found = client.completions.create(model=NAME, prompt="Hi", max_tokens=40, temperature=0, stop=[stop])
    assert found.choices[0].text == plain[: plain.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_what_was_spent_is_told_where_it_is_asked_for(server: Running) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "policy": "paper", "spent": True}
    (choice,) = server.post(body).json()["choices"]
    plain = qs_jax.generate(MODEL, "Once upon a time", max_new_tokens=8, policy="paper")
    assert "".join(token["text"] for token in choice["spent"]) == choice["text"] == plain.texts[0]
    assert [token["layers_run"] for token in choice["spent"]] == plain.trace["layers_run"][0]
    assert [token["layers_run"] for token in choice["prompt_spent"]] == plain.trace["prompt_layers_run"][0]
    assert "".join(token["text"] for token in choice["prompt_spent"]) == "Once upon a time"
    assert choice["ledger"]["kv_slots"] == plain.ledger["kv_slots"]
    exact = server.post({**body, "policy": "off", "prompt": "abc" * 9, "exact": True, "draft": "lookup"}).json()[
        "choices"
    ][0]
    assert exact["text"] == alone(MODEL, "abc" * 9, max_new_tokens=8)
    assert {token["drafted"] for token in exact["spent"]} <= {True, False}


def test_fewer_bits_where_the_model_has_codes() -> None:
    model = quantised(MODEL)
    with running(model) as server:
        body = {"prompt": "Hi", "max_tokens": 6, "temperature": 0, "bits": 4}
        assert server.post(body).json()["choices"][0]["text"] == alone(model, "Hi", max_new_tokens=6, bits=4)
        assert server.service.described()["bits"] == [8, 4, 2]


def test_models_and_health(client: openai.OpenAI, server: Running) -> None:
    (model,) = client.models.list().data
    assert model.id == NAME
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    health = httpx.get(f"{server.url}/health").json()
    assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)


def test_errors_are_in_openais_shape(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=NAME, prompt="x" * 600, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bits:
        client.completions.create(model=NAME, prompt="x", extra_body={"bits": 4})
    assert "Matryoshka" in bits.value.message
    for path, status in (("/v1/nothing", 404), ("/v1/completions", 405)):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_requests_that_arrive_together_are_batched_and_each_is_as_alone(server: Running) -> None:
    """Greedy and sampled, each with its own temperature, seed and length; after the warm-up nothing is compiled."""
    random = np.random.default_rng(0)
    bodies = [
        {
            "prompt": "".join(map(chr, random.integers(65, 122, random.integers(2, 16)).tolist())),
            "max_tokens": int(random.integers(2, 40)),
            "temperature": float(random.choice([0, 0.7, 1.5])),
            "seed": int(random.integers(1000)),
        }
        for _ in range(48)
    ]
    warm_up(server.service)
    before = METER.reading()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda body: server.post(body).json()["choices"][0]["text"], bodies))
    assert METER.since(before).programs == 0
    for body, text in zip(bodies, found, strict=True):
        sampled = {"do_sample": True, "temperature": body["temperature"]} if body["temperature"] else {}
        expected = alone(MODEL, body["prompt"], max_new_tokens=body["max_tokens"], seed=body["seed"], **sampled)
        assert text == expected


def test_a_client_that_goes_away_frees_its_place(server: Running) -> None:
    body = {"prompt": "Hi", "max_tokens": 500, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert server.service.scheduler.running == 1
    server.settle(5)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**body, "stream": False}, timeout=0.2)
    server.settle(5)


def test_a_full_server_says_so() -> None:
    with running(MODEL, places=1, queue=1) as server, ThreadPoolExecutor(6) as pool:
        body = {"prompt": "Hi", "max_tokens": 300, "temperature": 0}
        answers = list(pool.map(lambda _: server.post(body), range(6)))
        refused = [answer for answer in answers if answer.status_code == 503]
        expected = alone(MODEL, "Hi", max_new_tokens=300)
        assert refused
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {answer.json()["error"]["code"] for answer in refused} == {"server_full"}
        good = [answer for answer in answers if answer.status_code == 200]
        assert len(good) + len(refused) == 6
        assert all(answer.json()["choices"][0]["text"] == expected for answer in good)


def test_keys_hosts_and_origins() -> None:
    with running(MODEL, api_key="secret") as server:
        url, body = f"{server.url}/v1/completions", {"prompt": "Hi", "max_tokens": 2, "temperature": 0}

        def status(**headers: str) -> int:
            return httpx.post(url, json=body, headers=headers, timeout=60).status_code

        assert status() == 401
        assert status(Authorization="Bearer wrong") == 401
        assert status(Authorization="secret") == 401
        good = {"Authorization": "Bearer secret"}
        assert status(**good) == 200
        assert status(**good, Origin="http://evil.example") == 403
        assert status(**good, Origin=server.url) == 200
        assert status(**good, Host="evil.example") == 403
        assert status(**good, Host=f"localhost:{server.port}") == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(server.url).status_code == 200


def test_a_policy_is_served_by_its_name_only(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    qs_jax.Policy.balanced().save(folder / "policy.json")
    (folder / "policy-broken.json").write_text("{", "utf-8")
    served = served_policies(replace(MODEL, name=str(folder)), [])
    assert list(served) == ["off", "balanced", "paper", "calibrated"]
    assert list(served_policies(MODEL, [f"mine={folder / 'policy.json'}"])) == ["off", "balanced", "paper", "mine"]
    for wrong in ("mine", "=x", f"off={folder / 'policy.json'}"):
        with pytest.raises(QsJaxError, match="NAME=FILE"):
            served_policies(MODEL, [wrong])
    name = Service(replace(MODEL, name=str(folder)), ServeOptions()).name
    assert name == "model"


@pytest.mark.slow
def test_under_load_none_is_lost_and_none_mixed_up() -> None:
    """Half a minute of 32 clients, some of which leave in the middle; `python -m benchmarks.serve --load` is longer."""
    end = time.monotonic() + 30
    random = np.random.default_rng(0)
    prompts = ["".join(map(chr, random.integers(65, 122, length).tolist())) for length in range(2, 18)]
    cases = [(prompt, tokens) for prompt in prompts for tokens in (3, 17, 40)]
    expected = {case: alone(MODEL, case[0], max_new_tokens=case[1]) for case in cases}
    counts, lock = {"right": 0, "left": 0}, threading.Lock()

    def client(number: int, server: Running) -> None:
        for step, (prompt, tokens) in enumerate(cycle(cases[number:] + cases[:number])):
            if time.monotonic() > end:
                return
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
            if step % 7 == 6:
                with httpx.stream(
                    "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60
                ) as one:
                    next(one.iter_lines())
                outcome = "left"
            else:
                assert server.post(body).json()["choices"][0]["text"] == expected[prompt, tokens]
                outcome = "right"
            with lock:
                counts[outcome] += 1

    with running(MODEL, places=8, queue=64) as server, ThreadPoolExecutor(32) as pool:
        for one in [pool.submit(client, number, server) for number in range(32)]:
            one.result()
        server.settle()
    assert counts["right"] > 100
    assert counts["left"] > 5
