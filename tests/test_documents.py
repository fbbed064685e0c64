"""The code of documents runs as it stands, and links lead somewhere.

Blocks of Python run one after the other, those of a page in one process. A block with a title is a script: it
runs alone in a process of its own, in the way that its first comments say,

    # pip install lightning torchmetrics
    # torchrun --nproc-per-node 2 script.py

and is skipped where one of these packages is not installed. `make integrations` installs them all.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from mktestdocs import check_md_file
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
# Pages that the site alone has: tests/test_site.py looks for them.
GENERATED = re.compile(r"docs/(benchmarks|reference)/|docs/understand/papers\.md$")
SCRIPT = re.compile(r'^```python title="([\w.]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCK = "```python\n"
# A page named in prose, a docstring or a message.
MENTION = re.compile(r"\bdocs/[\w-]+/[\w./-]+\.md\b")


def containing(text: str) -> list[Path]:
    return [document for document in DOCUMENTS if text in document.read_text(encoding="utf-8")]


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


SCRIPTS = {
    f"{name(document)}: {file}": (file, script)
    for document in DOCUMENTS
    for file, script in SCRIPT.findall(document.read_text(encoding="utf-8"))
}

# A C++ compiler runs for most of a minute, and each process of several imports PyTorch.
SLOW = {
    "docs/howto/distill.md: ten_images.py",
    "docs/recipes/compile-and-export.md: compiled.py",
    "docs/recipes/logging-and-search.md: wandb_log.py",
    "docs/recipes/several-processes.md: ddp.py",
    "docs/recipes/several-processes.md: divided_classes.py",
    "docs/recipes/several-processes.md: fsdp.py",
}
# What a page says that the reader will see: a number in what the script prints, at least.
PROMISED = {"docs/howto/distill.md: ten_images.py": (r"right on ([\d.]+)% of", 85.0)}


def comment(script: str, start: str) -> list[str]:
    """The words after ``start`` in a comment on a line of its own."""
    found = re.search(rf"^# {start} (.+)$", script, re.MULTILINE)
    return shlex.split(found[1]) if found else []


def requirements(script: str) -> list[Requirement]:
    """What a script needs beside the library."""
    return [Requirement(text) for text in comment(script, "pip install")]


def installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


@pytest.mark.parametrize("document", containing(BLOCK), ids=name)
def test_code_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they write stays here
    check_md_file(document, memory=True)


def test_there_is_something_to_run() -> None:
    some = {"README.md", "docs/howto/heads.md", "docs/understand/metrics.md"}
    assert some <= set(map(name, containing(BLOCK)))
    assert len(SCRIPTS) > 15
    assert SCRIPTS.keys() >= SLOW


@pytest.mark.parametrize(
    "title", [pytest.param(it, marks=[pytest.mark.slow] * SLOW.issuperset([it])) for it in SCRIPTS]
)
def test_scripts_run(title: str, tmp_path: Path) -> None:
    file, script = SCRIPTS[title]
    absent = [str(requirement) for requirement in requirements(script) if not installed(requirement)]
    if absent:
        pytest.skip(f"needs {' and '.join(absent)}, which `make integrations` installs")
    (tmp_path / file).write_text(script, encoding="utf-8")
    launcher = comment(script, "torchrun")
    command = ["-m", "torch.distributed.run", "--standalone", *launcher] if launcher else [file]
    # Nothing is asked of a network, nor reported to one.
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_ERROR_REPORTING": "false"}
    finished = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip(), "a script shows its reader something"
    if title in PROMISED:
        pattern, least = PROMISED[title]
        assert float(re.findall(pattern, finished.stdout)[-1]) >= least


def test_make_integrations_runs_every_script() -> None:
    # It installs the extras, as constraints.txt pins them, and the frameworks.
    pins: dict[str, str] = {}
    for file in ("constraints.txt", "requirements-integrations.txt"):
        lines = (ROOT / file).read_text(encoding="utf-8")
        pins |= dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==([\w.]+)", lines, re.MULTILINE))
    needed = [requirement for _, script in SCRIPTS.values() for requirement in requirements(script)]
    assert {"lightning", "ray", "timm", "torchvision", "transformers"} <= {it.name for it in needed}
    assert {str(it) for it in needed if not it.specifier.contains(pins.get(it.name, "0"))} == set()
    assert {it.name for it in needed} <= pins.keys()
    # It runs all tests but those it names, and this file is not among them.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\nintegrations:")[2].partition("\n\n")[0]
    assert "$(NEWEST)/bin/pytest" in recipe
    left_out = re.findall(r"--ignore (\S+)", recipe)
    assert not any(Path(__file__).is_relative_to(ROOT / folder) for folder in left_out)


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
