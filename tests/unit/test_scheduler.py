"""Who is decoded when: the order, the bounds, and that nobody falls with another."""

import math
import queue
import threading
import time
from typing import Any

import pytest

import qs_jax
from qs_jax.engine.places import Places
from qs_jax.serving.errors import ApiError
from qs_jax.serving.options import ServeOptions
from qs_jax.serving.scheduler import Event, RowAsked, Scheduler
from qs_jax.serving.service import Service
from tests.tiny import tiny_model

MODEL = tiny_model("llama", tokenizer=True)


@pytest.fixture
def service() -> Any:
    """Not yet started: what is submitted waits."""
    service = Service(MODEL, ServeOptions(places=2, queue=3, chunk=4))
    yield service
    service.scheduler.stop()


def rows(service: Service, prompt: str = "Hi", tokens: int = 8, **body: Any) -> list[RowAsked]:
    asked = service.read({"prompt": prompt, "max_tokens": tokens, "temperature": 0, **body}, chat=False)
    return service.rows(asked)


class Told:
    """What a job is told, and how long it takes."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.ended = math.inf

    def __call__(self, event: Event) -> None:
        if event.piece and event.piece.finish:
            self.ended = time.monotonic()
        self.events.put(event)

    def text(self) -> str:
        """Of a single row, to its end."""
        found = ""
        while True:
            event = self.events.get(timeout=60)
            if event.error:
                raise event.error
            assert event.piece is not None
            found += event.piece.text
            if event.piece.finish:
                return found


def test_a_full_queue_refuses_and_says_when_to_come_again(service: Service) -> None:
    told = [Told() for _ in range(5)]
    jobs = [service.submit(rows(service), one) for one in told]
    with pytest.raises(ApiError) as raised:
        service.submit(rows(service), Told())
    assert raised.value.status == 503
    assert int(raised.value.headers["Retry-After"]) >= 1
    with pytest.raises(ApiError, match="6 answers are asked for"):
        rows(service, n=6)
    assert (service.scheduler.waiting, service.scheduler.running) == (5, 0)
    jobs[3].cancel()
    service.scheduler.start()
    expected = qs_jax.generate(MODEL, "Hi", max_new_tokens=8).texts[0]
    assert [one.text() for one in (*told[:3], told[4])] == [expected] * 4
    assert told[3].events.empty()


def test_kinds_take_turns(service: Service) -> None:
    """A request of another kind does not wait for a long one to end."""
    told = [Told() for _ in range(3)]
    service.submit(rows(service, tokens=400), told[0])
    service.submit(rows(service, "Ho", tokens=8, policy="paper"), told[1])
    service.submit(rows(service, "Hey", tokens=8, exact=True), told[2])
    service.scheduler.start()
    texts = [one.text() for one in told]
    assert texts[0] == qs_jax.generate(MODEL, "Hi", max_new_tokens=400).texts[0]
    assert texts[1] == qs_jax.generate(MODEL, "Ho", max_new_tokens=8, policy="paper").texts[0]
    assert texts[2] == qs_jax.generate(MODEL, "Hey", max_new_tokens=8).texts[0]
    assert told[1].ended < told[2].ended < told[0].ended


def test_a_batch_that_fails_takes_nobody_along(service: Service, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    step = Places.step

    def failing(places: Places) -> Any:
        if not places._like.policy.is_off:
            raise RuntimeError("out of memory")
        return step(places)

    monkeypatch.setattr(Places, "step", failing)
    good, bad = Told(), Told()
    service.submit(rows(service, tokens=40), good)
    service.submit(rows(service, policy="paper", tokens=40), bad)
    service.scheduler.start()
    with pytest.raises(ApiError) as raised:
        bad.text()
    assert raised.value.status == 500
    assert "memory" not in str(raised.value)
    assert good.text() == qs_jax.generate(MODEL, "Hi", max_new_tokens=40).texts[0]
    assert "out of memory" in capfd.readouterr().err
    service.submit(rows(service), again := Told())
    assert again.text() == qs_jax.generate(MODEL, "Hi", max_new_tokens=8).texts[0]


def test_a_prompt_that_fails_takes_nobody_along(service: Service, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    join = Places.join

    def failing(places: Places, request: Any) -> Any:
        if request.max_new_tokens == 7:
            raise RuntimeError("no")
        return join(places, request)

    monkeypatch.setattr(Places, "join", failing)
    good, bad = Told(), Told()
    service.submit(rows(service, tokens=7), bad)
    service.submit(rows(service, tokens=8), good)
    service.scheduler.start()
    with pytest.raises(ApiError):
        bad.text()
    assert good.text() == qs_jax.generate(MODEL, "Hi", max_new_tokens=8).texts[0]
    assert service.scheduler.running == 0
    assert capfd.readouterr().err


def test_an_answer_that_fails_does_not_end_the_thread(
    service: Service, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    bad, told = rows(service), [Told(), Told()]
    monkeypatch.setattr(bad[0].answer, "take", lambda gain: 1 // 0)
    service.submit(bad, told[0])
    service.scheduler.start()
    with pytest.raises(ApiError):
        told[0].text()
    service.submit(rows(service), told[1])
    assert told[1].text() == qs_jax.generate(MODEL, "Hi", max_new_tokens=8).texts[0]
    assert service.scheduler.running == 0
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_who_is_left_when_it_stops_is_told(service: Service) -> None:
    service.scheduler.start()
    first, waits = Told(), Told()
    service.submit(rows(service, tokens=400, n=2), first)
    service.submit(rows(service), waits)
    first.events.get(timeout=60)
    service.scheduler.stop()
    with pytest.raises(ApiError) as raised:
        waits.text()
    assert raised.value.status == 503
    with pytest.raises(ApiError):
        service.submit(rows(service), Told())


def test_many_threads_may_submit() -> None:
    scheduler = Scheduler(MODEL, places=4, queue=100)
    service = Service(MODEL, ServeOptions(places=4, queue=100, chunk=4))
    service.scheduler = scheduler
    scheduler.start()
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        told = Told()
        service.submit(rows(service, "x" * (number + 1), tokens=5 + number), told)
        found[number] = told.text()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scheduler.stop()
    for number, text in found.items():
        assert text == qs_jax.generate(MODEL, "x" * (number + 1), max_new_tokens=5 + number).texts[0]
    assert len(found) == 12
