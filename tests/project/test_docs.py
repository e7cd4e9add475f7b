"""The site says what is there: every public name, every command, pictures of real commands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import commands
import mkdocs_hook
import numpy as np
import pictures
import pytest
from documents import DOCUMENTS, ROOT, blocks_of

import flax_partial as fp
from flax_partial import callbacks

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
CODE_WIDTH = 120  # of a line; docs/site.css makes room for it
DRAWN = sorted(pictures.PICTURES.iterdir())


def described(page: str) -> list[str]:
    return re.findall(r"^::: ([\w.]+)", (REFERENCE / page).read_text(), re.MULTILINE)


def test_reference_has_every_public_name_once() -> None:
    errors = {name for name in fp.__all__ if name.endswith("Error")}
    names = sorted(set(fp.__all__) - errors - {"__version__"})
    assert sorted(described("engine.md")) == [f"flax_partial.{name}" for name in names]
    assert described("errors.md") == ["flax_partial.errors"]
    assert errors <= set(dir(fp.errors))


def test_reference_has_every_callback() -> None:
    assert {f"flax_partial.callbacks.{name}" for name in callbacks.__all__} <= set(
        described("callbacks.md")
    )


def test_reference_has_every_command_as_its_help_has_it() -> None:
    assert commands.PAGE.read_text() == commands.page(), "run docs/commands.py"


def test_links_of_the_readme_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_contributing_names_files_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`((?:flax_partial|callbacks|docs|tests)/[\w/.]*)`", text))
    assert len(named) > 15
    places = (ROOT, ROOT / "flax_partial")  # an sdist has the callbacks in the package only
    assert [name for name in named if not any((top / name).exists() for top in places)] == []


@pytest.mark.parametrize("picture", DRAWN, ids=lambda path: path.name)
def test_picture_is_shown_and_asks_for_nothing_from_elsewhere(picture: Path) -> None:
    shown = [page for page in DOCUMENTS if f"pictures/{picture.name})" in page.read_text()]
    assert shown
    content = picture.read_bytes()
    assert len(content) < 200_000
    if picture.suffix == ".svg":
        text = content.decode()
        assert not re.search(r"url\((?!#)|(href|src)=\"(?!#)|@import|/tmp|/root", text)


def test_picture_shows_what_the_command_says(tmp_path: Path) -> None:
    fp.save(tmp_path / "c", {"weights": np.ones(3)})
    fp.finalize(tmp_path / "c")
    text = pictures.on_terminal("show c", str(tmp_path))
    picture = pictures.draw("show", "show c", text).replace("&#160;", " ")
    for said in ("$ flax-partial show c", "weights", "(3,)", "float64"):
        assert said in picture


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_links_are_called_by_titles_not_by_files(page: Path) -> None:
    links = re.findall(r"\[([^]\[]+)\]\(", page.read_text())
    assert [text for text in links if re.search(r"\.(md|html)\b", text)] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_pictures_of_a_page_are_there_and_described(page: Path) -> None:
    for description, path in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / path).is_file(), path
        assert len(description) > 10, path


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_code_is_as_wide_as_the_site_has_room_for(page: Path) -> None:
    lines = [line for block in blocks_of(page.read_text()) for line in block.code.splitlines()]
    assert [line for line in lines if len(line) > CODE_WIDTH] == []


LOOP = re.compile(r"\bckpt\.step\(|\.fit\(|checkpoints\(step|trainer\.train\(|on_train_batch_end\(")
WAYS = (r"restore\(|[Gg]o(es|ing)? on\b", r"\bbest\b", r"\b[Gg]o(es|ing)? back\b")


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_page_with_a_loop_says_how_it_goes_on_and_back_and_evaluates_the_best(page: Path) -> None:
    text = page.read_text()
    if any(LOOP.search(block.code) for block in blocks_of(text)):
        words = " ".join(text.split())
        assert [way for way in WAYS if not re.search(way, words)] == []


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: path.name)
def test_figures_say_of_which_version_they_are(page: Path) -> None:
    text = page.read_text()
    blocks = re.findall(r"<!-- figures: (.+?) -->(.*?)<!-- end of figures -->", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- figures:")
    assert [name for name, block in blocks if not re.search(r"[vV]ersion \d", block)] == []


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        pytest.param("git@host.org:owner/name.git", "https://host.org/owner/name", id="ssh"),
        pytest.param("ssh://git@host.org/owner/name", "https://host.org/owner/name", id="ssh URL"),
        pytest.param("https://host.org/owner/name.git", "https://host.org/owner/name", id="https"),
        pytest.param("https://user:key@host.org/a/b", "https://host.org/a/b", id="with a key"),
        pytest.param("/srv/name.git", "", id="a directory"),
        pytest.param("../name", "", id="a relative directory"),
        pytest.param("", "", id="none"),
    ],
)
def test_site_links_to_the_repository_where_it_has_an_address(origin: str, address: str) -> None:
    assert mkdocs_hook.repository(origin) == address
