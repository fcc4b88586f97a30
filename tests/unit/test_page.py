"""The page's contract: one file, nothing from elsewhere, and a policy under which exactly it runs."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from qs_jax.serving import page


class Elements(HTMLParser):
    """Every element with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.HTML)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


FOUND = Elements().found
IDS = [attributes["id"] for _, attributes in FOUND if "id" in attributes]


def test_nothing_comes_from_elsewhere() -> None:
    assert "http://" not in page.HTML
    assert "https://" not in page.HTML
    assert not [tag for tag, attributes in FOUND if "src" in attributes]
    assert [attributes["href"] for tag, attributes in FOUND if "href" in attributes] == ["data:,"]
    assert not re.search(r"@import|url\(", page.HTML)


def test_the_policy_lets_the_pages_own_code_run_and_no_other() -> None:
    for element in ("script", "style"):
        (text,) = re.findall(rf"<{element}>(.*?)</{element}>", page.HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}'" in page.POLICY
    assert "unsafe" not in page.POLICY
    assert page.POLICY.startswith("default-src 'none'")
    assert not [
        tag for tag, attributes in FOUND if "style" in attributes or any(n.startswith("on") for n in attributes)
    ]


def test_text_goes_into_the_page_as_text() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page.HTML)


def test_it_is_for_phones_light_and_dark_and_keyboards() -> None:
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in FOUND
    assert "prefers-color-scheme: dark" in page.HTML
    assert ("html", {"lang": "en"}) in FOUND
    labelled = {attributes.get("for") for tag, attributes in FOUND if tag == "label"}
    fields = {attributes["id"] for tag, attributes in FOUND if tag in ("input", "textarea", "select")}
    assert fields - labelled == {"chat"}  # which its label holds
    assert ":focus-visible" in page.HTML


def test_every_part_that_the_script_asks_for_is_there_once() -> None:
    assert len(IDS) == len(set(IDS))
    assert set(re.findall(r'\$\("(\w+)"\)', page.HTML)) <= set(IDS)
