"""The code of README and docs runs as it stands, the blocks of one document one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
from mktestdocs import check_md_file

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def containing(text: str) -> list[Path]:
    return [document for document in DOCUMENTS if text in document.read_text(encoding="utf-8")]


@pytest.mark.parametrize("document", containing("```python"), ids=lambda path: path.name)
def test_code_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they write stays here
    check_md_file(document, memory=True)


def test_there_is_something_to_run() -> None:
    assert {"README.md", "heads.md", "metrics.md"} <= {path.name for path in containing("```python")}
