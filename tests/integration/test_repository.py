"""What the repository promises about itself: one version, no large file, links that lead somewhere."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

import qs_jax

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

LARGEST = 1 << 20
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npy", ".npz", ".onnx"}


def tracked() -> dict[str, int]:
    """Bytes of every file that git tracks."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: only git knows which files are tracked")
    # a clone may be another user's, as in a container
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: path.stat().st_size for name in listed.split("\0") if (path := ROOT / name).is_file()}


def unwanted(files: Mapping[str, int]) -> set[str]:
    """Files too large, and weights, outside the places that are for them: the reference models, the tests' goldens."""
    return {
        name
        for name, size in files.items()
        if (path := PurePosixPath(name)).parts[0] != "reference_models"
        and (size > LARGEST or (path.suffix in WEIGHTS and not ("tests" in path.parts and "goldens" in path.parts)))
    }


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give a page's headings."""
    found: set[str] = set()
    tokens = MarkdownIt().parse(page.read_text("utf-8"))
    for opening, heading in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            number = 0
            while (anchor := f"{slug}-{number}" if number else slug) in found:
                number += 1
            found.add(anchor)
    return found


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """A page's relative links that lead to no file of the repository, or to no heading of a page."""
    inline = [part for token in MarkdownIt().parse(page.read_text("utf-8")) for part in token.children or ()]
    links = [str(link) for part in inline if (link := part.attrs.get("href") or part.attrs.get("src"))]
    broken = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or not target.is_relative_to(root) or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def test_the_version_stands_once() -> None:
    assert version("qs_jax") == qs_jax.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]


def test_nothing_large_and_no_weights_are_tracked() -> None:
    assert not unwanted(tracked())


def test_large_files_and_weights_are_found() -> None:
    files = {"reference_models/a/model.safetensors": 10**8, "tests/goldens/a.safetensors": 10**5, "a.py": 2**20}
    assert not unwanted(files)
    bad = {"docs/film.mp4": 2**20 + 1, "tests/goldens/b.npz": 10**7, "tests/a.npz": 1, "weights.gguf": 1}
    assert unwanted(files | bad) == set(bad)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Title: *one*\n\n## Same\n\n## Same\n\n```\n# no heading\n```\n", "utf-8")
    good = "[a](other.md#title-one) ![b](other.md) [c](other.md#same-1) [d](https://a.org/x) [e](#here) `[f](g.md)`"
    bad = "[a](none.md) ![b](none.png) [c](other.md#same-2) [d](other.md#no-heading) [e](#there) [f](../)"
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{good}\n\n{bad}\n", "utf-8")
    expected = ["none.md", "none.png", "other.md#same-2", "other.md#no-heading", "#there", "../"]
    assert broken_links(page, tmp_path.resolve()) == expected
