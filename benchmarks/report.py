"""What a suite hands back: tables to read, claims to hold against a bound, checks that must pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

__all__ = ["Check", "Claim", "Report", "Table", "milliseconds", "number"]


@dataclass(frozen=True)
class Check:
    """An error that has to stay below its limit, or the timing beside it means nothing."""

    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Claim:
    """A measured number and the bound that the project sets for it."""

    COLUMNS: ClassVar[tuple[str, ...]] = ("claim", "measured", "bound", "")

    what: str
    value: float
    sense: Literal["at least", "at most"]
    bound: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.sense == "at least" else self.value <= self.bound

    def cells(self) -> list[str]:
        verdict = "met" if self.met else "MISSED"
        return [
            self.what,
            f"{number(self.value)}{self.unit}",
            f"{self.sense} {self.bound:g}{self.unit}",
            verdict,
        ]


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Report:
    """Everything that one suite found.

    ``samples`` are the measured numbers behind the tables, in seconds unless named otherwise: by case and
    rival the quartiles and how many samples there were.
    """

    suite: str
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def add(self, table: Table) -> None:
        """Add a table, or its rows to the one of that title."""
        for known in self.tables:
            if known.title == table.title:
                known.rows.extend(table.rows)
                return
        self.tables.append(table)

    def join(self, other: Report) -> None:
        """Add what another part of the suite found."""
        for table in other.tables:
            self.add(table)
        self.claims += other.claims
        self.checks += other.checks
        for title, found in other.samples.items():
            self.samples.setdefault(title, {}).update(found)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Report:
        return cls(
            suite=record["suite"],
            tables=[Table(**table) for table in record["tables"]],
            claims=[Claim(**claim) for claim in record["claims"]],
            checks=[Check(**check) for check in record["checks"]],
            samples=record["samples"],
        )


def number(value: float) -> str:
    """Three digits, and no exponent for what is large."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return number(1e3 * seconds)
