"""Options that carry their own checks, and the command line that reads them.

An option is a field of a dataclass; the string below it is its help. Its type says what a value must be
(``Count``, ``Positive``, ...), and ``Free`` that it has no say in the numbers, so that a run may be continued
with another value.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import tyro

from etflayers.checks import require
from etflayers.errors import EtfLayersError, InvalidArgumentError
from lab.claim import claimed
from lab.progress import print_notes

T = TypeVar("T")

INTERRUPTED = 130  # the exit status of what Ctrl-C has ended: 128 and the number of the signal


@dataclass(frozen=True)
class Rule:
    """What a value must be, in words that follow "must"."""

    holds: Callable[[Any], bool]
    words: str


def at_least(bound: float) -> Rule:
    return Rule(lambda value: value >= bound, f"be at least {bound}")


FREE = "free on resume"
Free = Annotated[T, FREE]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, Rule(lambda value: 0 < value < math.inf, "be a positive number")]
NotNegative = Annotated[float, Rule(lambda value: 0 <= value < math.inf, "be a finite number >= 0")]
Share = Annotated[float, Rule(lambda value: 0 <= value < 1, "lie in [0, 1)")]
MoreThanOne = Annotated[float, Rule(lambda value: 1 < value < math.inf, "be greater than 1")]
Seed = Annotated[int, Rule(lambda value: 0 <= value < 2**31, "lie in [0, 2**31)")]
Distinct = Annotated[
    tuple[T, ...],
    Rule(lambda values: len(set(values)) == len(values) > 0, "name at least one and none twice"),
]


def broken_rules(hint: Any, value: Any) -> Iterator[Rule]:
    """The rules of a type, and of the members of a tuple, that a value breaks; None and names obey all."""
    if value is None or isinstance(value, str):
        return
    extras = getattr(hint, "__metadata__", ())
    yield from (rule for rule in extras if isinstance(rule, Rule) and not rule.holds(value))
    inner = hint.__origin__ if extras else hint
    if get_origin(inner) is tuple:
        for member in value:
            yield from broken_rules(get_args(inner)[0], member)
    elif get_origin(inner) in (Union, UnionType):
        for alternative in get_args(inner):
            yield from broken_rules(alternative, value)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Seeds and places: the same for every study."""

    default_out: ClassVar[str] = "runs"

    seeds: Free[Distinct[Seed]] = (0,)
    """One run for each seed."""
    device: str = "auto"
    """auto: CUDA where available, else the CPU."""
    out: Free[Path | None] = None
    """Folder for tables, figures and checkpoints (default: one below runs/)."""
    checkpoint_every: Free[Count] = 100
    """Steps between checkpoints."""
    resume: Free[bool] = False
    """Continue from the checkpoints in the output folder to the numbers of an unbroken run."""
    overwrite: Free[bool] = False
    """Replace what another run, or an unfinished one, has left in the output folder."""
    skip_bad: Free[bool] = False
    """Leave out the images of a folder that cannot be read, and list them at the end."""

    def check(self) -> None:
        """Raise :class:`~etflayers.errors.InvalidArgumentError` for what cannot be run."""
        for name, hint in self._hints().items():
            value = getattr(self, name)
            for rule in broken_rules(hint, value):
                raise InvalidArgumentError(f"--{name.replace('_', '-')} must {rule.words}, got {value}")
        require(
            self.torch_device.type == "cpu" or torch.cuda.is_available(),
            f"--device {self.device} cannot be used, PyTorch finds no CUDA device here: take cpu",
        )
        require(
            not (self.resume and self.overwrite),
            "--resume continues what --overwrite replaces: give one of them",
        )

    @property
    def resolved(self) -> Any:
        """What is run."""
        return self

    @classmethod
    def _hints(cls) -> dict[str, Any]:
        hints = get_type_hints(cls, include_extras=True)
        return {field.name: hints[field.name] for field in fields(cls)}

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.device(self.device)
        except RuntimeError as error:
            raise InvalidArgumentError(f"--device {self.device} is not known: take cpu or cuda") from error

    @property
    def folder(self) -> Path:
        return Path(self.default_out) if self.out is None else self.out

    def checkpoint(self, name: str) -> Path:
        """Where the state of the run of this name is kept."""
        return self.folder / "checkpoints" / f"{name}.pt"

    def values(self, *names: str) -> dict[str, Any]:
        """Options by name, as JSON values."""
        return {name: _plain(getattr(self, name)) for name in names}

    def fingerprint(self) -> dict[str, Any]:
        """What decides the numbers of a run, as JSON values: a continuation must agree with it."""
        decisive = [n for n, hint in self._hints().items() if FREE not in getattr(hint, "__metadata__", ())]
        return self.values(*decisive) | {"device": self.torch_device.type}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(member) for member in value]
    return str(value) if isinstance(value, Path) else value


def command(options: Any, action: Callable[[Any], object], argv: Sequence[str] | None = None) -> int:
    """Run ``action`` with options from the command line, alone in its output folder; return the exit status.

    A study raises InvalidArgumentError for settings that cannot be run, MissingDependencyError for a package
    that they need, NonFiniteError if something has diverged; the system may refuse a file. That is said
    without a traceback, as is how to continue what was interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    settings: Options = tyro.cli(options, args=arguments).resolved
    try:
        settings.check()
        with _claim(settings):
            action(settings)
    except (EtfLayersError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{how_to_continue(settings, arguments)}", file=sys.stderr)
        return INTERRUPTED
    finally:
        print_notes()
    return 0


def _claim(settings: Options) -> AbstractContextManager[None]:
    if "LOCAL_RANK" in os.environ:  # the process that started this one has claimed the folder
        return nullcontext()
    study = type(settings).__name__.removesuffix("Settings").lower()
    flags = {"resume": settings.resume, "overwrite": settings.overwrite}
    return claimed(settings.folder, study, settings.fingerprint(), **flags)


def how_to_continue(settings: Options, arguments: Sequence[str]) -> str:
    """What to do after an interruption, with the command to copy."""
    count = len(list(settings.folder.rglob("checkpoints/*.pt")))  # of a sweep: a folder for each trial
    if count == 0:
        return "interrupted before the first checkpoint: nothing was kept"
    kept = [argument for argument in arguments if argument not in ("--resume", "--overwrite")]
    again = shlex.join(["python", sys.argv[0], *kept, "--resume"])
    return f"interrupted; {count} checkpoint(s) in {settings.folder}. To continue:\n  {again}"
