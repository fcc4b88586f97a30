"""Which model the notebooks run, with a hub, without one, and where it never answers."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from notebooks import models

SHIPPED = Path("reference_models") / "llama"


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(models.CHOICE, raising=False)


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def model_info(name: str, **_: Any) -> Any:
        assert name == models.REAL
        return answer()

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)


def refuse() -> None:
    raise OSError("no route")


def test_the_real_one_where_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda: SimpleNamespace(siblings=["config.json"]))
    assert models.pick(SHIPPED) == models.REAL


def test_the_shipped_one_where_it_does_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hub(monkeypatch, refuse)
    assert models.pick(SHIPPED) == str(SHIPPED)
    assert "small llama that ships" in capsys.readouterr().out


def test_a_hub_that_never_answers_is_waited_for_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    hub(monkeypatch, lambda: ended.wait(60))
    started = time.perf_counter()
    assert not models.is_reachable(models.REAL, seconds=0.1)
    assert time.perf_counter() - started < 30
    ended.set()


def test_a_choice_goes_before_both(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, refuse)
    monkeypatch.setenv(models.CHOICE, "some/model")
    assert models.pick(SHIPPED) == "some/model"
