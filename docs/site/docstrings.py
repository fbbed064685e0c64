"""Docstrings as Markdown: what stands between Sphinx's roles and Markdown's own notation.

The docstrings name other objects by roles (``:class:`~etflayers.nn.ETFHead` ``), and show code as doctests,
which Markdown would take for quotations of quotations of quotations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod|exc|data):`([^`]+)`")
DOCTEST = re.compile(r"(?m)^( *)>>> .*\n(?:\1(?=\S).*\n)*")
CODE_BLOCK = re.compile(r"(?m)^( *)\.\. code-block:: (\w+)\n\n((?:\1 +.*\n|\n)+)")
logger = griffe.get_logger(__name__)


class Markdown(griffe.Extension):
    """Rewrites every docstring of the package once all of it has been read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        modules = list(modules_of(pkg))
        shadowed = {module.path: module for module in modules if shares_its_name(module)}
        for module in modules:
            for name, path in module.imports.items():
                # The function was imported from its package, or from its module by the package.
                found = shadowed.get(path) or shadowed.get(path.rpartition(".")[0])
                if found is not None and name == found.name:
                    module.members[name] = griffe.Alias(name, found.members[name], parent=module)
        for module in [pkg, *shadowed.values()]:
            self.rewrite(module)

    def rewrite(self, scope: griffe.Object) -> None:
        if scope.docstring is not None:
            scope.docstring.value = as_markdown(scope.docstring.value, scope)
        for member in scope.members.values():
            if not member.is_alias:
                self.rewrite(member)


def modules_of(package: griffe.Module) -> Iterator[griffe.Module]:
    yield package
    for member in list(package.members.values()):
        if isinstance(member, griffe.Module):
            yield from modules_of(member)


def shares_its_name(module: griffe.Module) -> bool:
    """Whether its package offers a function of that name, which takes the name from the module."""
    package = module.parent
    return package is not None and package.imports.get(module.name) == f"{module.path}.{module.name}"


def as_markdown(text: str, scope: griffe.Object) -> str:
    text = f"{text}\n"
    text = CODE_BLOCK.sub(lambda found: fenced(found[2], found[3], found[1]), text)
    text = DOCTEST.sub(lambda found: fenced("pycon", found[0], found[1]), text)
    return ROLE.sub(lambda found: link(found[1], scope), text).rstrip()


def fenced(language: str, code: str, indent: str) -> str:
    lines = [line.rstrip() for line in code.strip("\n").splitlines()]
    margin = min(len(line) - len(line.lstrip()) for line in lines if line)
    return "\n".join(
        [f"{indent}```{language}", *(indent + line[margin:] for line in lines), f"{indent}```", ""]
    )


def link(target: str, scope: griffe.Object) -> str:
    """A reference that need not exist: private objects have no page, those of PyTorch none here."""
    short = target.startswith("~")
    target = target.removeprefix("~")
    shown = target.rpartition(".")[2] if short else target
    found = resolve(target, scope)
    if found is None:
        if target.startswith("etflayers"):
            logger.warning("%s: nothing is called %s", scope.path, target)
        return f"`{shown}`"
    return f'<autoref identifier="{found}" optional><code>{shown}</code></autoref>'


def resolve(target: str, scope: griffe.Object) -> str | None:
    """The full name of what a docstring of ``scope`` names: something in the scope or in one around it."""
    package = scope.package
    if target.startswith("etflayers."):
        path = target.removeprefix("etflayers.")
        return target if has(package, path) else None
    around: Any = scope
    while around is not None:
        if has(around, target):
            return f"{around.path}.{target}"
        around = around.parent
    return None


def has(scope: griffe.Object, path: str) -> bool:
    """Whether ``path`` names a member, of the object or of what it inherits."""
    try:
        scope[path]
    except KeyError:
        owner, _, name = path.rpartition(".")
        try:
            holder = scope[owner] if owner else scope
            return name in holder.all_members
        except (KeyError, AttributeError, griffe.AliasResolutionError):
            return False
    return True
