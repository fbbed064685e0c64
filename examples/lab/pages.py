"""HTML files that open without a server and without a network."""

from __future__ import annotations

import base64
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import torch

import etflayers

TEMPLATES = Path(__file__).parent / "templates"


def rendered(template: str, figures: Sequence[Path], **values: Any) -> str:
    """A template with figures as base64, the versions of all that decides numbers, and the time of now."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.4g}"
    return environment.get_template(template).render(
        figures=[(path.stem, base64.b64encode(path.read_bytes()).decode()) for path in figures],
        versions=versions(),
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )


def versions() -> dict[str, str]:
    """Of the library, of what it stands on, and of the system."""
    return {
        "etflayers": etflayers.__version__,
        "torch": torch.__version__,
        **{name: version(name) for name in ("torchmetrics", "numpy", "matplotlib")},
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
