"""The site: every public name is described, nothing comes from a network, and the build warns of nothing."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# What a browser loads by itself, as opposed to links that a reader may follow.
LOADED = re.compile(
    r"<(?:script|img|iframe)[^>]*? src=\"?([^\"\s>]+)|<link[^>]* rel=\"?stylesheet\"? href=\"?([^\"\s>]+)"
)
CHROMIUM = shutil.which("chromium")


def reference() -> Any:
    """The module that makes the pages of the reference."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "site" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


def build(folder: Path) -> Path:
    pytest.importorskip("mkdocs", reason="pip install 'etflayers[docs]'")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=True,
    )
    return folder


def test_public_names_are_those_that_can_be_imported() -> None:
    for module in reference().public_modules():
        imported = importlib.import_module(module.name)
        assert set(module.names) == set(imported.__all__)
        assert all(hasattr(imported, name) for name in module.names)


def test_every_package_is_in_the_reference() -> None:
    described = {module.name for module in reference().public_modules()}
    packages = {f"etflayers.{path.parent.name}" for path in (ROOT / "etflayers").glob("*/__init__.py")}
    assert packages <= described
    assert "etflayers.nn" in described


def test_site(tmp_path: Path) -> None:
    site = build(tmp_path / "site")
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > 40

    for module in reference().public_modules():
        text = pages[site / module.page.replace(".md", ".html")]
        identifiers = set(re.findall(r"id=\"?([\w.]+)", text))
        assert {f"{module.name}.{name}" for name in module.names} <= identifiers

    for path, text in pages.items():
        for found in LOADED.findall(text):
            source = "".join(found).partition("?")[0]
            assert "//" not in source, f"{path.name} loads {source} from a network"
            if path.name != "404.html":  # a server shows it for any address, so its paths are absolute
                assert (path.parent / source).exists(), f"{path.name} lacks {source}"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_search_and_formulas_work_from_a_disk(tmp_path: Path) -> None:
    site = build(tmp_path / "site")

    def rendered(address: str) -> str:
        # No server, and none of the browser's own services.
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--dump-dom",
        ]
        result = subprocess.run(
            [str(CHROMIUM), *options, "--virtual-time-budget=20000", f"file://{site}/{address}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return result.stdout

    assert "matching documents" in rendered("index.html?q=nearest")
    page = rendered("understand/nearest-frame.html")
    assert page.count("<mjx-container") > 30
    assert "data-mjx-error" not in page
