"""Imports that wait: names of a module that are loaded when first used, and actions for after an import.

What costs time to import, or is there for old code only, is paid for by those who use it.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["AfterImport", "names_on_demand"]


def names_on_demand(
    module: str, *, lazy: Mapping[str, str] | None = None, moved: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` (PEP 562) of a module that does not hold all names it offers.

    Give them to the module where a type checker does not look (``if not TYPE_CHECKING:``), which would take
    any name for one of the module from then on; import the lazy names under ``if TYPE_CHECKING:`` for it.

    Args:
        module: the module's ``__name__``.
        lazy: from a name to the module that it is imported from when it is first used.
        moved: from an old name to the new one in full, ``"package.module.name"``; its use is a
            ``DeprecationWarning``.

    >>> get, _ = names_on_demand("etflayers", moved={"make_etf": "etflayers.geometry.simplex_etf"})
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     print(get("make_etf").__name__)
    simplex_etf
    >>> print(caught[0].message)
    etflayers.make_etf is now etflayers.geometry.simplex_etf; the old name goes with the next version
    """
    lazy, moved = lazy or {}, moved or {}

    def get(name: str) -> Any:
        if name in lazy:
            value = getattr(importlib.import_module(lazy[name]), name)
            setattr(sys.modules[module], name, value)  # from now on found without this function
            return value
        if name in moved:
            warnings.warn(
                f"{module}.{name} is now {moved[name]}; the old name goes with the next version",
                DeprecationWarning,
                stacklevel=2,
            )
            place, _, new = moved[name].rpartition(".")
            return getattr(importlib.import_module(place), new)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[module]), *lazy})

    return get, names


class AfterImport(MetaPathFinder):
    """Runs actions as soon as a module has been imported, at once if it has been, and never imports it.

    An import that fails runs nothing, and the next one is watched again. Other threads get the module only
    when the actions have been run, because the import lock of the module is held until then.

    Args:
        name: the full name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._actions: deque[Callable[[], object]] = deque()
        if name not in sys.modules:
            sys.meta_path.insert(0, self)

    def run(self, action: Callable[[], object]) -> None:
        """Run ``action`` once the module is there."""
        # In this order: an import that another thread begins in between finds the action or is seen here.
        self._actions.append(action)
        if self._name in sys.modules:
            self._run_all()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as the other finders find it, with a loader that runs the actions at its end."""
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_run(module: ModuleType) -> None:
                execute(module)
                self._run_all()

            spec.loader.exec_module = execute_and_run  # type: ignore[method-assign]
        return spec

    def _run_all(self) -> None:
        with suppress(ValueError):  # where it is not in the list any more
            sys.meta_path.remove(self)
        while True:
            try:
                action = self._actions.popleft()
            except IndexError:  # all have been taken, maybe by another thread
                return
            action()
