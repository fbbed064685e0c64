"""The code of documents runs as it stands, the blocks of one after the other, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
# A page named in prose, a docstring or a message.
MENTION = re.compile(r"\bdocs/[\w./-]+\.md\b")


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
    targets = LINK.findall(document.read_text(encoding="utf-8"))
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_pages_that_sources_name_exist() -> None:
    folders = ("benchmarks", "etflayers", "examples", "tests")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in [*sources, *DOCUMENTS]]
    named = {page for text in texts for page in MENTION.findall(text)}
    assert len(named) > 5
    assert {page for page in named if not (ROOT / page).exists()} == set()
