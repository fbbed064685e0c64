"""The code of documents runs as it stands, the blocks of one after the other, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
# Pages that the site alone has: tests/test_site.py looks for them.
GENERATED = re.compile(r"docs/(benchmarks|reference)/|docs/understand/papers\.md$")
# A page named in prose, a docstring or a message.
MENTION = re.compile(r"\bdocs/[\w-]+/[\w./-]+\.md\b")


def containing(text: str) -> list[Path]:
    return [document for document in DOCUMENTS if text in document.read_text(encoding="utf-8")]


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", containing("```python"), ids=name)
def test_code_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they write stays here
    check_md_file(document, memory=True)


def test_there_is_something_to_run() -> None:
    some = {"README.md", "docs/howto/heads.md", "docs/understand/metrics.md"}
    assert some <= set(map(name, containing("```python")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_to_files(document: Path) -> None:
    targets = LINK.findall(CODE.sub("", document.read_text(encoding="utf-8")))
    places = {target: (document.parent / target).resolve() for target in targets}
    missing = {target for target, place in places.items() if not place.exists()}
    assert {target for target in missing if not GENERATED.match(name(places[target]))} == set()


def test_pages_that_sources_name_exist() -> None:
    folders = ("benchmarks", "etflayers", "examples", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in [*sources, *DOCUMENTS]]
    named = {page for text in texts for page in MENTION.findall(text)}
    assert len(named) > 5
    assert {page for page in named if not (ROOT / page).exists()} == set()
