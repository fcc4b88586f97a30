"""The page in a real browser, without a head: text arrives, coloured; keys work; nothing overflows a phone."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving import alone, running
from tests.tiny import tiny_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="needs playwright: pip install it"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the path"),
]

MODEL = tiny_model("llama", tokenizer=True)
SECONDS = 120_000


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(MODEL, places=2) as server:
        yield server.url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        rootless = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        browser = player.chromium.launch(executable_path=CHROMIUM, args=rootless)
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_text_arrives_with_what_it_took(url: str, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.locator("h1", has_text="tiny llama").wait_for(timeout=SECONDS)
    page.locator("#chat").uncheck()
    page.locator("#budget").fill("2")
    assert page.locator("#which").inner_text().startswith("balanced")
    page.locator("summary").press("Enter")
    page.locator("#tokens").fill("9")
    page.locator("#prompt").fill("<b>Once</b>")
    page.locator("#prompt").press("Control+Enter")
    page.locator("#note", has_text="Done").wait_for(timeout=SECONDS)
    text = alone(MODEL, "<b>Once</b>", max_new_tokens=9, policy="balanced")
    assert page.locator("#output").text_content() == "<b>Once</b>" + text
    assert page.locator("#made").inner_text() == "9"
    assert "%" in page.locator("#flops").inner_text()
    page.locator("#output").press("ArrowRight")
    assert "of 2 layers" in page.locator("#note").inner_text()
    wider = page.locator("html").evaluate("page => page.scrollWidth - page.clientWidth")
    assert wider == 0
    dark = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (dark == "rgb(19, 20, 22)") == (scheme == "dark")
    assert not complaints
    page.close()


def test_a_complaint_is_shown(url: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(url)
    page.locator("h1", has_text="tiny llama").wait_for(timeout=SECONDS)
    page.locator("#prompt").fill("x" * 600)
    page.locator("#go").click()
    page.locator("#error", has_text="context").wait_for(timeout=SECONDS)
    assert page.locator("#go").is_enabled()
    page.close()
