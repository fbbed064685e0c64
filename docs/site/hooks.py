"""What the site has beside the pages in docs/: reference, benchmarks, papers, and files that pages link to.

MkDocs calls the functions ``on_...``. Every generated page exists in memory only.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(Path(__file__).parent)]

from papers import papers_page  # noqa: E402
from reference import reference_pages  # noqa: E402
from results import benchmarks_pages  # noqa: E402

from explorer import DEMO  # noqa: E402
from lab.explorer import page, read_exploration  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# The target of [text](target#anchor), unless it is in the web or on the same page.
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
# The same where the text is the name of a file: that is for those who read the file.
NAMED = re.compile(r"\[[\w/.-]+\.md\]\(([^)\s#]+)")
# What has a page even if no other links to it.
DOCUMENTS = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LANGUAGES = {".py": "python", ".sh": "sh", ".cff": "yaml", ".toml": "toml", ".yml": "yaml", ".json": "json"}

_generated: set[str] = set()  # the pages that are not in docs/


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put generated pages where the navigation has the first of them."""
    for section in config.nav:
        if "Reference" in section:
            first = ["reference/index.md", "reference/etflayers.md"]
            section["Reference"] = [*first, *sorted(set(reference_pages()) - set(first))]
        if "Benchmarks" in section:
            section["Benchmarks"] = list(benchmarks_pages(ROOT))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and, transitively, the files of the repository that pages link to."""
    _generated.clear()
    waiting = list(DOCUMENTS)
    for file in files.documentation_pages():
        waiting += linked(file.content_string, f"docs/{file.src_uri}")

    def add(uri: str, text: str, **options: InclusionLevel) -> None:
        _generated.add(uri)
        files.append(File.generated(config, uri, content=text, **options))

    for uri, text in reference_pages().items():
        add(uri, text)
    papers = {"understand/papers.md": papers_page(ROOT)}
    for origin, pages in (("docs/understand", papers), ("benchmarks/results", benchmarks_pages(ROOT))):
        for uri, text in pages.items():
            path = f"{origin}/{PurePosixPath(uri).name}"  # where its links are relative to
            waiting += linked(text, path)
            add(uri, relocated(text, path, uri))

    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        uri = place(path)
        if path in seen or path.startswith("docs/") or path == "README.md":
            continue
        seen.add(path)
        if uri.endswith(".png"):
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            waiting += linked(text, path)
            text = relocated(text, path, uri)
        else:
            text = listing(text, path)
        add(uri, text, inclusion=InclusionLevel.UNDEFINED if path in DOCUMENTS else InclusionLevel.NOT_IN_NAV)

    shown = page([read_exploration(path) for path in DEMO])
    files.append(File.generated(config, "explorer.html", content=shown))
    files.append(File.generated(config, "site/tex-svg.js", abs_src_path=str(mathjax())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Send links that leave docs/ to where the site has the file."""
    uri = page.file.src_uri
    return markdown if uri in _generated else relocated(markdown, f"docs/{uri}", uri)


def mathjax() -> Path:
    """MathJax in one file, which draws formulas without fonts, from the package that carries it."""
    package = importlib.util.find_spec("mathjax")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("formulas need MathJax: pip install 'etflayers[docs]'")
    return Path(package.origin).parent / "static" / "mathjax" / "es5" / "tex-svg.js"


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"project/{path}" if path.endswith((".md", ".png")) else f"project/{path}.md"


def linked(text: str, path: str) -> list[str]:
    """The files that a document at ``path`` of the repository links to."""
    targets = (target_of(found, path) for found in LINK.finditer(text))
    return [target for target in targets if (ROOT / target).is_file()]


def relocated(text: str, path: str, uri: str) -> str:
    """The text of a document at ``path`` of the repository with links that hold at ``uri`` of the site."""

    def link(found: re.Match[str]) -> str:
        target = target_of(found, path)
        # Code may look like a link; what it would lead to does not exist.
        return relpath(place(target), folder(uri)) if (ROOT / target).is_file() else found[1]

    def titled(found: re.Match[str]) -> str:
        target = ROOT / target_of(found, path)
        return f"[{title(target)}]({found[1]}" if target.is_file() else found[0]

    return LINK.sub(link, NAMED.sub(titled, text))


def title(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(line.removeprefix("# ") for line in lines if line.startswith("# "))


def target_of(found: re.Match[str], path: str) -> str:
    return normpath(f"{folder(path)}/{found[1]}")


def folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


def listing(text: str, path: str) -> str:
    """A source as a page."""
    language = LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f"# {PurePosixPath(path).name}\n\n`{path}`\n\n````{language}\n{text}````\n"
