"""Long-tailed training: ten methods for rare classes, tuned alike and trained on the same batches.

    python examples/long_tail.py --tune --seeds 0 1 2            all six tails: a day or two on one core
    python examples/long_tail.py --kinds exponential --ratios 100 --epochs 3     a first look, minutes
    python examples/long_tail.py --data glyphs --classes 62      letters and digits in twelve faces
    python examples/long_tail.py --resume                        continue what was killed
    python examples/long_tail.py --help                          everything else

Every method gets the same network, the same batches and the same learning rate; --tune chooses scale,
weight decay and tau of each on a validation set. Validation and test sets are balanced, and the test set is
looked at once, at the end. The output folder gets every epoch of every run (runs.csv), means over the seeds
(summary.csv), with --tune every trial and the choices (tuning.csv, choices.json), a figure for each tail
and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product

from matplotlib.figure import Figure
from rich.console import Console

from imbalance.data import Kind, long_tailed
from imbalance.methods import Knobs, MethodName, own_knobs
from imbalance.settings import LongTailSettings
from imbalance.training import MEASURES, Key, LongTailRun
from lab.data import ImageData, load
from lab.figures import BLUE, GREY, new_figure
from lab.files import Row
from lab.options import command
from lab.progress import bar, make_console
from lab.results import Column, Results, Section, grouped, mean_and_deviation
from lab.training import reproducible, threads

Case = tuple[Kind, float, MethodName]  # what knobs are chosen for
GROUPS = ("all", "many", "medium", "few")
COLUMNS = (
    *(Column(f"{group} %", f"test_accuracy_{group}", ".1f", percent=True) for group in GROUPS),
    Column("merged", "minority_collapse_means_few", ".2f"),
)
KNOB_COLUMNS = tuple(Column(name.replace("_", " "), name, "g") for name in Knobs._fields)


def compare(settings: LongTailSettings, console: Console) -> list[Row]:
    """Train every method on every tail for every seed; return the means over the seeds."""
    settings.check()
    study = Study(settings, console)
    with threads(settings.threads), reproducible(settings.torch_device):
        for kind, ratio in product(settings.kinds, settings.ratios):
            study.tail(kind, ratio)
    return study.finish()


class Study:
    """The rows that have come so far, and the files that they are written to."""

    def __init__(self, settings: LongTailSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.results = Results(settings.folder, console)
        self.balanced = load(settings)
        self.chosen = settings.read_choices()
        self.rows: list[Row] = []
        self.trials: list[Row] = []

    def tail(self, kind: Kind, ratio: float) -> None:
        """Choose, then train, all methods on one tail."""
        settings = self.settings
        data = long_tailed(self.balanced, kind, ratio, settings.number_of_views, settings.rare)
        data = data.to(settings.torch_device)
        sizes = f"{len(data.train)} images to train, {len(data.test)} to test, {data.num_classes} classes"
        self.results.say(f"{data.name}, {kind} {ratio:g}: {sizes}")
        for method in settings.methods if settings.tune else ():
            self._choose(Key(kind, ratio, method, settings.tune_seed, settings.given, trial=True), data)
        for seed, method in product(settings.seeds, settings.methods):
            knobs = self.chosen.get((kind, ratio, method), settings.given)
            self.rows += self._train(Key(kind, ratio, method, seed, knobs), data)
            self.results.names.clear()
            self._write()

    def _choose(self, key: Key, data: ImageData) -> None:
        """The point of the grid with the best accuracy on the validation set, the first of equals."""
        grid = self.settings.grid(key.method)
        best = grid[0]
        if len(grid) > 1:
            found = {knobs: self._train(key._replace(knobs=knobs), data)[-1] for knobs in grid}
            self.trials += found.values()
            best = max(found, key=lambda knobs: found[knobs]["validation_accuracy_all"])
        self.chosen[key.kind, key.ratio, key.method] = best
        self.results.names.clear()
        self._write()

    def _train(self, key: Key, data: ImageData) -> list[Row]:
        settings, run = self.settings, LongTailRun(key, self.settings, data)
        with bar(self.console, key.name, lambda row: f"loss {row['train_loss']:.3f}") as shown:
            checkpoint = settings.checkpoint(key.name)
            run.finish(checkpoint, resume=settings.resume, every=settings.checkpoint_every, progress=shown)
        row, part = run.history[-1], "validation" if key.trial else "test"
        found = ", ".join(
            f"{group} {row[name]:.1%}" for group in GROUPS if (name := f"{part}_accuracy_{group}") in row
        )
        self.results.say(f"{key.name}: {part} {found}, {shown.seconds:.0f} s")
        return run.history

    def _write(self) -> None:
        if self.trials:
            self.results.csv("tuning", self.trials)
        if self.settings.tune:
            self.results.json("choices", choice_rows(self.chosen))
        if self.rows:
            self.results.csv("runs", self.rows)

    def finish(self) -> list[Row]:
        """Write and print means over the seeds."""
        settings = self.settings
        last = [row for row in self.rows if row["epoch"] == settings.epochs]
        summary = summary_rows(last)
        self.results.csv("summary", summary)
        tails = grouped(last, "kind", "ratio")
        self.results.figures(
            {
                f"accuracy-{kind}-{ratio:g}": partial(accuracy_figure, same)
                for (kind, ratio), same in tails.items()
            }
        )
        seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
        for (kind, ratio), same in grouped(summary, "kind", "ratio").items():
            title = f"{self.balanced.name}, {kind} {ratio:g}, epochs: {settings.epochs}{seeds}"
            self.results.table(Section(title, {"method": "method"}, COLUMNS, same))
        if settings.tune:
            labels = {"tail": "kind", "ratio": "ratio", "method": "method"}
            chosen = Section("Chosen on the validation set", labels, KNOB_COLUMNS, choice_rows(self.chosen))
            self.results.sections.append(chosen)
        self.results.report(f"Long tails of {self.balanced.name}", settings)
        self.results.tell()
        return summary


def choice_rows(chosen: dict[Case, Knobs]) -> list[Row]:
    """What ``--choices`` reads."""
    return [
        {"kind": kind, "ratio": ratio, "method": method, **own_knobs(method, knobs)}
        for (kind, ratio, method), knobs in chosen.items()
    ]


def summary_rows(last: Sequence[Row]) -> list[Row]:
    """For each tail and method its knobs, and the means and deviations over the seeds."""
    names = [f"{part}_accuracy_{group}" for part in ("validation", "test") for group in GROUPS]
    names += [f"{measure}_{group}" for measure in MEASURES for group in GROUPS]
    return [
        {"kind": kind, "ratio": ratio, "method": method}
        | {name: same[0][name] for name in Knobs._fields}
        | {"seeds": len(same)}
        | mean_and_deviation(same, names)
        for (kind, ratio, method), same in grouped(last, "kind", "ratio", "method").items()
    ]


def accuracy_figure(last: Sequence[Row]) -> Figure:
    """Of one tail the accuracy of each method by group: the mean over the seeds, and each seed as a point."""
    methods = grouped(last, "method")
    shown = [group for group in GROUPS if f"test_accuracy_{group}" in last[0]]
    figure = new_figure(2 + 2 * len(shown), 1 + 0.3 * len(methods))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, shown, strict=True):
        for place, same in enumerate(methods.values()):
            values = [row[f"test_accuracy_{group}"] for row in same]
            axes.scatter(values, [place] * len(values), s=14, color=BLUE, alpha=0.7, label="one seed")
            axes.scatter([sum(values) / len(values)], [place], s=160, color=GREY, marker="|", label="mean")
        axes.set(title=group)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
    panels[0].set_yticks(range(len(methods)), [method for (method,) in methods])
    panels[0].invert_yaxis()
    figure.supxlabel("accuracy on the balanced test set")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside right upper")
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line and return the exit status."""
    return command(LongTailSettings, lambda settings: compare(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
