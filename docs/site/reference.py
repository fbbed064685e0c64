"""The pages of the reference: every public name, package by package.

Public are the names in ``__all__`` of the packages one level below ``etflayers``, of the conformance suites
and of the modules of exceptions and of statuses. What they are is read from the sources; nothing is imported.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Module", "public_modules", "reference_pages"]

ROOT = Path(__file__).parents[2]
MODULES = ("etflayers.errors", "etflayers.status", "etflayers.testing.suites")


@dataclass(frozen=True)
class Module:
    """A public module: its name, its purpose in a sentence, the names it offers, the modules among them."""

    name: str
    purpose: str
    names: tuple[str, ...]
    modules: tuple[Module, ...]

    @property
    def page(self) -> str:
        return f"reference/{self.name.removeprefix('etflayers').lstrip('.') or 'etflayers'}.md"


def public_modules(root: Path = ROOT) -> list[Module]:
    """All of them, the top level first."""
    packages = (path.parent.name for path in (root / "etflayers").glob("*/__init__.py"))
    names = {*MODULES, *(f"etflayers.{name}" for name in packages if not name.startswith("_"))}
    return [read("etflayers", root), *(read(name, root) for name in sorted(names))]


def read(name: str, root: Path) -> Module:
    path = root.joinpath(*name.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets)
    ]
    (value,) = found
    purpose = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    names = ast.literal_eval(value)
    # What is imported from the package itself is a module of it.
    own = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == name]
    modules = [alias.name for node in own for alias in node.names if alias.name in names]
    return Module(name, purpose, tuple(names), tuple(read(f"{name}.{module}", root) for module in modules))


def reference_pages(root: Path = ROOT) -> dict[str, str]:
    """The text of each page by its place in the site."""
    modules = public_modules(root)
    pages = {module.page: page_of(module) for module in modules[1:]}
    pages[modules[0].page] = top_level(modules[0], modules[1:])
    pages["reference/index.md"] = index(modules)
    return pages


def page_of(module: Module) -> str:
    parts = [f"# {module.name}\n", directive(module)]
    parts += [
        f"## {part.name} {{ #{part.name} }}\n\n{directive(part, heading_level=3)}" for part in module.modules
    ]
    return "\n".join(parts)


def directive(module: Module, heading_level: int = 2) -> str:
    """What mkdocstrings makes the descriptions of."""
    modules = {part.name for part in module.modules}
    names = [name for name in module.names if f"{module.name}.{name}" not in modules]
    members = "".join(f"\n        - {name}" for name in names)
    return f"::: {module.name}\n    options:\n      heading_level: {heading_level}\n      members:{members}\n"


def top_level(module: Module, others: list[Module]) -> str:
    """The names of ``etflayers`` itself are those of its packages: a link to each."""
    homes = {name: other.name for other in reversed(others) for name in other.names}
    rows = [
        f'| <a id="{module.name}.{name}"></a>[`{name}`][{homes[name]}.{name}] | `{homes[name]}` |'
        for name in module.names
        if name in homes
    ]
    return "\n".join(
        [
            f"# {module.name}",
            "",
            module.purpose,
            "",
            "What most models need can be imported from here; each name is at home in one of the packages.",
            f'<a id="{module.name}.__version__"></a>`etflayers.__version__` is the version.',
            "",
            "| name | is described in |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def index(modules: list[Module]) -> str:
    rows = [
        f"| [`{module.name}`]({module.page.removeprefix('reference/')}) | {module.purpose} |"
        for module in modules
    ]
    return "\n".join(
        [
            "# Reference",
            "",
            "Every public name, with its arguments, what it returns and what it raises.",
            "",
            "| package | what is in it |",
            "|---|---|",
            *rows,
            "",
        ]
    )
