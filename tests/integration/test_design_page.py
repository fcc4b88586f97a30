"""docs/design.md is true of the tree: its floors are those that imports are held to, and it names what there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text("utf-8")
HOUSE = PAGE[PAGE.index("## 1. The house") : PAGE.index("## 2. ")]
TREE = re.search(r"(?:^    .*\n)+", HOUSE, re.MULTILINE)


def named() -> dict[str, str]:
    """The floor of every module that the tree names, by its path."""
    assert TREE is not None
    found, floor, folder = {}, "", ""
    for line in TREE[0].splitlines():
        if new := re.match(r"^    (\d)  ", line):
            floor = new[1]
        if new := re.search(r"\b((?:qs_jax|convert)/(?:\w+/)?)(?:\s|$)", line):
            folder = new[1]
        for module in re.findall(r"(\w+\.py)\b", line):
            found[folder + module] = floor
    return found


def layers() -> dict[str, str]:
    """The floor of every module and package that the rule for imports names, which a comment before it gives."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    rule = text[text.index('containers = ["qs_jax"]') :].split("]\n\n")[0]
    found, floor = {}, ""
    for line in rule.splitlines():
        if new := re.match(r"\s+# (\d) \w+", line):
            floor = new[1]
        for name in re.findall(r"\w+", line) if line.strip().startswith('"') else ():
            found[name] = floor
    return found


def test_the_tree_names_every_module_and_no_other() -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("qs_jax", "convert")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert set(named()) == modules


def test_its_floors_are_those_that_imports_are_held_to() -> None:
    held = layers()
    assert {path: floor for path, floor in named().items() if path.startswith("qs_jax/")} == {
        path: held[path.removeprefix("qs_jax/").split("/")[0].removesuffix(".py")]
        for path in named()
        if path.startswith("qs_jax/")
    }


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+[\w.]*)`", PAGE.replace("NAME", "llama")))))
def test_files_that_the_page_names_are_there(path: str) -> None:
    places = (ROOT / path, ROOT / "qs_jax" / path)
    assert any(place.exists() for place in places)
