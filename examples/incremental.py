"""Classes that come in sessions, with few images of each: heads with reserved directions, and simple methods.

    python examples/incremental.py --seeds 0 1 2 3 4             all methods, with one image and with five
    python examples/incremental.py --data fashion --more-data mnist5k --classes 20 --base-classes 12 \
        --new-classes 2 --per-class 400 --copies 1 --epochs 15   clothes and digits, whose sessions mix both
    python examples/incremental.py --classes 30 --base-classes 20 --features 32 --epochs 5     a first look
    python examples/incremental.py --resume                      continue what was killed
    python examples/incremental.py --help                        everything else

Every method gets the same body at the start, the same images in the same order and the same choice of
learning rates and steps, of which the validation set chooses. The output folder gets every session of every
run (runs.csv), means over the seeds (summary.csv), figures and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from matplotlib.figure import Figure
from rich.console import Console

from lab.figures import PALETTE, draw_band, in_percent, new_figure
from lab.files import Row, kept
from lab.options import command
from lab.progress import bar, make_console
from lab.results import Column, Results, Section, grouped, mean_and_deviation, percent
from lab.training import reproducible, threads
from sessions.base import BaseKey, BaseName, BaseRun
from sessions.learners import BASES, COLLAPSE, rows_of
from sessions.protocol import (
    FRAMED,
    SIMPLE,
    Episode,
    IncrementalSettings,
    Method,
    load_classes,
    make_episode,
)

COLUMNS = (
    Column("average", "accuracy_average", ".1f", percent=True),
    Column("last", "accuracy", ".1f", percent=True),
    Column("drop", "accuracy_drop", ".1f", percent=True),
    Column("novel", "accuracy_novel", ".1f", percent=True),
)
# In the tables, and too many for a screen.
MORE = ("accuracy_first", "accuracy_base", "accuracy_harmonic", "forgetting", *COLLAPSE)
CHOICES = ("validation_accuracy_average", "validation_accuracy")
MEASURES = (*(column.measure for column in COLUMNS), *MORE, *CHOICES)


def compare(settings: IncrementalSettings, console: Console) -> list[Row]:
    """Teach every method all sessions for every seed and number of shots; return the means over the seeds."""
    settings.check()
    study = Study(settings, console)
    with threads(settings.threads), reproducible(settings.torch_device):
        for seed in settings.seeds:
            study.of_seed(seed)
    return study.finish()


class Study:
    """The rows that have come so far, and the files that they are written to."""

    def __init__(self, settings: IncrementalSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.results = Results(settings.folder, console)
        self.data = load_classes(settings).to(settings.torch_device)
        self.rows: list[Row] = []
        later = len(settings.seen) - 1
        text = f"{self.data.name}: {settings.base_classes} classes, then {later} sessions"
        console.print(f"{text} of {settings.new_classes}", highlight=False)

    def of_seed(self, seed: int) -> None:
        """Train the networks of the base session once, and go on from them with each number of shots."""
        bases: dict[BaseName, BaseRun] = {}
        for shots in self.settings.shots:
            episode = make_episode(seed, shots, self.settings, self.data)
            for method in self.settings.methods:
                base = BASES.get(method, method)
                if base not in bases:
                    bases[base] = self._best_base(base, seed, episode)
                self.rows += self._teach(method, shots, bases[base], episode)
            self.results.names.clear()
            self.results.csv("runs", self.rows)

    def _best_base(self, base: BaseName, seed: int, episode: Episode) -> BaseRun:
        """The learning rate whose network is best on the validation images, the first of equals."""
        runs = [
            self._train(BaseRun(BaseKey(base, seed, lr), self.settings, episode)) for lr in self.settings.lr
        ]
        return max(runs, key=BaseRun.validation_accuracy) if len(runs) > 1 else runs[0]

    def _train(self, run: BaseRun) -> BaseRun:
        settings, name = self.settings, run.key.name
        with bar(self.console, name, lambda row: f"loss {row['loss']:.3f}") as shown:
            checkpoint = settings.checkpoint(f"base-{name}")
            run.finish(checkpoint, resume=settings.resume, every=settings.checkpoint_every, progress=shown)
        self.console.print(f"{name}: base session, {shown.seconds:.0f} s", highlight=False)
        return run

    def _teach(self, method: Method, shots: int, run: BaseRun, episode: Episode) -> list[Row]:
        settings, seed = self.settings, run.key.seed
        own = {"shots": shots, "method": method, "seed": seed, "base_lr": run.key.lr}

        def teach() -> list[Row]:
            return [own | row for row in rows_of(method, run.model, episode, settings)]

        name = f"{method}-shots{shots}-seed{seed}"
        fingerprint = run.fingerprint | settings.fingerprint() | own
        rows: list[Row] = kept(settings.checkpoint(name), fingerprint, teach, resume=settings.resume)
        average, last = (percent(rows[-1][measure]) for measure in ("accuracy_average", "accuracy"))
        self.console.print(f"{name}: average {average}%, last {last}%", highlight=False)
        return rows

    def finish(self) -> list[Row]:
        """Write and print means over the seeds."""
        summary = summary_rows(self.rows)
        self.results.csv("summary", summary)
        by_shots = grouped(self.rows, "shots")
        self.results.figures(
            {f"sessions-{shots}-shot": partial(sessions_figure, rows) for (shots,), rows in by_shots.items()}
        )
        seeds = len(self.settings.seeds)
        of_seeds = f", mean ± deviation of {seeds} seeds" if seeds > 1 else ""
        for (shots,), rows in grouped(summary, "shots").items():
            title = f"Test accuracy in %, {shots} image(s) of each later class{of_seeds}"
            self.results.table(Section(title, {"method": "method"}, COLUMNS, rows))
        self.results.report(f"Classes of {self.data.name} that come later", self.settings)
        self.results.tell()
        return summary


def summary_rows(rows: Sequence[Row]) -> list[Row]:
    """For each method and number of shots the means and deviations over the seeds, after the last session."""
    last: list[Row] = []
    for same in grouped(rows, "shots", "method", "seed").values():
        first = same[0]["accuracy"]
        lost = first - same[-1]["accuracy_base"]
        last.append({**same[-1], "accuracy_first": first, "forgetting": lost})
    return [
        {"shots": shots, "method": method, "seeds": len(same)} | mean_and_deviation(same, MEASURES)
        for (shots, method), same in grouped(last, "shots", "method").items()
    ]


def sessions_figure(rows: Sequence[Row]) -> Figure:
    """Accuracy after each session: the mean over the seeds, and a band from the lowest to the highest."""
    figure = new_figure(9.6, 5)
    panels = {"simple methods": SIMPLE, "directions of a simplex": FRAMED}
    for axes, (title, methods) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for method, color in (*zip(methods, PALETTE, strict=False), ("joint", "black")):
            runs = list(grouped((row for row in rows if row["method"] == method), "seed").values())
            if runs:
                curves = [[row["accuracy"] for row in run] for run in runs]
                style = {"color": color, "label": method, "linestyle": ":" if method == "joint" else "-"}
                draw_band(axes, [row["classes"] for row in runs[0]], curves, **style)
        axes.set(title=title, xlabel="classes seen so far", ylim=(0, 1))
        in_percent(axes)
        axes.legend(loc="lower left", fontsize=8)
    figure.axes[0].set_ylabel("accuracy on all of them, faces never seen")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line and return the exit status."""
    return command(IncrementalSettings, lambda settings: compare(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
