"""What every script does: read its options, run, and say in one line what was wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from etflayers.errors import EtfLayersError

Options = TypeVar("Options")


def command(options: type[Options], action: Callable[[Options], object], argv: Sequence[str] | None) -> int:
    """Run ``action`` with options from the command line and return the exit status."""
    settings = tyro.cli(options, args=argv)
    try:
        action(settings)
    except EtfLayersError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
