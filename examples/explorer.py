"""Write the page on which trainings are seen collapsing in three dimensions.

python examples/explorer.py                                  the two trainings that come with the examples
python examples/explorer.py runs/study --out explorer.html   those that collapse_study.py --explorer recorded
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etflayers.errors import EtfLayersError
from lab.explorer import PAGE, read_exploration, write_page

DEMO = tuple(
    Path(__file__).parent / "explorations" / f"{name}.json" for name in ("four-classes", "ten-classes")
)


@dataclass(frozen=True)
class PageSettings:
    """Write one HTML file that needs no server and no network."""

    recordings: Annotated[tuple[Path, ...], tyro.conf.Positional] = DEMO
    """Folders of collapse_study.py --explorer, or files explorer.json of it, to choose from on the page."""
    out: Path = Path("runs") / PAGE
    """The file to write."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and return the exit status."""
    settings = tyro.cli(PageSettings, args=argv)
    try:
        write_page(settings.out, [read_exploration(path) for path in settings.recordings])
    except (EtfLayersError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {settings.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
