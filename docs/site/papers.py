"""The page of the papers: those of CITATION.cff, each with the modules that implement something of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["papers_page"]

INTRODUCTION = """# Papers

If you use the library, please cite it, and the papers whose methods you used. This list is that of
[CITATION.cff](../../CITATION.cff), with the modules whose docstrings refer to the paper. The docstrings name
more papers, of which the library takes a formula or a measure.
"""


def papers_page(root: Path) -> str:
    references = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    sources = {
        path.relative_to(root): path.read_text(encoding="utf-8") for path in root.glob("etflayers/**/*.py")
    }
    by_identifier = {arxiv(reference): reference for reference in references}
    ordered = sorted(by_identifier.items(), key=lambda item: (item[1]["year"], item[1]["title"]))
    lines = []
    for identifier, reference in ordered:
        modules = sorted(str(path) for path, text in sources.items() if identifier and identifier in text)
        where = f" In {', '.join(f'`{module}`' for module in modules)}." if modules else ""
        lines.append(f"- {entry(reference, identifier)}{where}")
    return "\n".join([INTRODUCTION, *lines, ""])


def arxiv(reference: dict[str, Any]) -> str:
    values = [identifier["value"] for identifier in reference.get("identifiers", [])]
    return next((value.removeprefix("arXiv:") for value in values if value.startswith("arXiv:")), "")


def entry(reference: dict[str, Any], identifier: str) -> str:
    authors = ", ".join(author["family-names"] for author in reference["authors"])
    title = " ".join(reference["title"].split())
    link = f", [arXiv {identifier}](https://arxiv.org/abs/{identifier})" if identifier else ""
    place = next((reference[key] for key in ("journal", "collection-title") if key in reference), "")
    return f"{authors} ({reference['year']}), *{title}*{', ' + place if place else ''}{link}."
