"""What a user gets from `pip install etflayers`: the package alone, typed, on PyTorch and NumPy alone."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import etflayers
from etflayers.__main__ import OPTIONAL

ROOT = Path(__file__).parents[1]
VERSION = etflayers.__version__
REPOSITORY = "https://github.com/etflayers/etflayers"
RAW = "https://raw.githubusercontent.com/etflayers/etflayers"
PICTURES = {".gif", ".jpg", ".png", ".svg", ".webp"}
# Whatever a link or an image in Markdown or HTML points to.
TARGET = re.compile(
    r"""\]\(\s*<?([^)\s>]+)|^\[[^]]+\]:\s+(\S+)|(?:href|src|srcset)=["']([^"']+)""", re.MULTILINE
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def targets(markdown: str) -> list[str]:
    """Where a document points to, outside its blocks of code."""
    return ["".join(found) for found in TARGET.findall(FENCED.sub("", markdown))]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(f"etflayers-{VERSION}.dist-info/METADATA").decode())


# --- The wheel ---


def test_wheel_holds_the_typed_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith(f"etflayers-{VERSION}-py3-none-any")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "etflayers").rglob("*.py")}
    about = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert names == sources | {"etflayers/py.typed"} | {f"etflayers-{VERSION}.dist-info/{n}" for n in about}
    assert {"etflayers/__main__.py", "etflayers/demo.py"} <= sources  # what python -m runs


def test_only_torch_and_numpy_are_required(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist", [])
    names = {re.match(r"[\w-]+", line)[0] for line in requirements if "extra ==" not in line}
    assert names == {"torch", "numpy"}


def test_the_report_knows_the_optional_packages(metadata: Message) -> None:
    extras: dict[str, set[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        found = re.search(r"extra == '([\w-]+)'", line)
        if found and found[1] not in ("dev", "docs"):
            extras.setdefault(re.match(r"[\w-]+", line)[0], set()).add(found[1])
    assert {name: set(package.extras.split(", ")) for name, package in OPTIONAL.items()} == extras


def test_metadata_lead_to_the_project(metadata: Message) -> None:
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert set(urls) == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    assert all(url.startswith("https://") for url in urls.values())
    assert urls["Source"] == REPOSITORY
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert "neural collapse" in metadata["Keywords"]
    minors = {
        int(line.rpartition(".")[2])
        for line in metadata.get_all("Classifier", [])
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line)
    }
    assert minors == {10, 11, 12, 13}
    assert metadata["Requires-Python"] == f">=3.{min(minors)}"


# --- The long description, which an index shows without the files beside it ---


def test_links_of_the_description_work_on_an_index(metadata: Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme, shown = text("README.md"), metadata.get_payload()
    assert FENCED.findall(shown) == FENCED.findall(readme)
    before, after = targets(readme), targets(shown)
    assert len(before) == len(after)
    here = re.compile(rf"({REPOSITORY}/blob|{RAW})/v{VERSION}/")
    for old, new in zip(before, after, strict=True):
        if old.startswith(("https://", "#")):
            assert new == old
        else:
            assert here.match(new)
            assert here.sub("", new) == old
            assert (ROOT / old.partition("#")[0]).exists()
            assert new.startswith("https://raw.") == (Path(old).suffix in PICTURES)


def test_every_form_of_a_link_becomes_absolute() -> None:
    tomllib = pytest.importorskip("tomllib")
    hook = tomllib.loads(text("pyproject.toml"))["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    source = (
        '![a](docs/a.png) [![b](b.svg)](docs/b.md#part-1) [c](LICENSE) [d](examples/) <img src="docs/e.gif">'
        "\n"
        '<a href="CITATION.cff">f</a> [g](https://other.org/g.md) [h](#h) `a[0](b)` [i](docs/i/j.html)\n'
        "[k]: docs/k.md\n"
    )
    shown = source
    for each in hook["substitutions"]:
        shown = re.sub(each["pattern"], each["replacement"], shown)
    raw, blob = f"{RAW}/v$HFPR_VERSION", f"{REPOSITORY}/blob/v$HFPR_VERSION"
    assert shown == (
        f"![a]({raw}/docs/a.png) [![b]({raw}/b.svg)]({blob}/docs/b.md#part-1) [c]({blob}/LICENSE) "
        f'[d]({blob}/examples/) <img src="{raw}/docs/e.gif">\n'
        f'<a href="{blob}/CITATION.cff">f</a> [g](https://other.org/g.md) [h](#h) `a[0](b)` '
        f"[i]({blob}/docs/i/j.html)\n[k]: {blob}/docs/k.md\n"
    )


# --- One version everywhere ---

RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", re.MULTILINE)


def test_changelog_citation_and_package_agree_on_version_and_date(metadata: Message) -> None:
    releases = RELEASE.findall(text("CHANGELOG.md"))
    version, date = releases[0]
    assert version == VERSION == metadata["Version"]
    citation = text("CITATION.cff")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [version]
    assert re.findall(r"^date-released: (.+)$", citation, re.MULTILINE) == [date]
    assert [date for _, date in releases] == sorted((date for _, date in releases), reverse=True)
    assert len({version for version, _ in releases}) == len(releases)
    # Every section but one of what is not released yet, above the others, has a date.
    headings = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert headings[-len(releases) :] == [f"[{version}] - {date}" for version, date in releases]
    assert headings[: -len(releases)] in ([], ["[Unreleased]"])


def test_the_upgrade_note_leads_to_this_version() -> None:
    before, now = re.search(
        r"^From (\S+) to (\S+)\. ", text("docs/moving/upgrading.md"), re.MULTILINE
    ).groups()
    releases = [version for version, _ in RELEASE.findall(text("CHANGELOG.md"))]
    assert releases.index(now) < releases.index(before)
    assert now.rpartition(".")[0] == VERSION.rpartition(".")[0]  # a patch renames nothing


def test_the_citation_names_each_paper_once() -> None:
    papers = re.findall(r'"arXiv:([^"]+)"', text("CITATION.cff"))
    assert len(papers) > 5
    assert len(set(papers)) == len(papers)
