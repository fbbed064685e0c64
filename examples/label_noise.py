"""Wrong labels: what networks memorize of them by loss and by head, and what that costs on test data.

    python examples/label_noise.py --classes 2 --tune --seeds 0 1 2             two digits, half an hour
    python examples/label_noise.py --data fashion --per-class 120 --tune        ten classes of clothes
    python examples/label_noise.py --resume                                     continue what was killed
    python examples/label_noise.py --help                                       everything else

Every method gets the same network, the same noisy labels and the same batches; --tune chooses learning
rate, its decay, weight decay and alpha of each by Ray Tune, on validation labels that are as noisy. The
output folder gets every epoch of every run (runs.csv), means over the seeds (summary.csv), the corrupted
samples (samples.csv), with two classes what theory says (theory.csv), with --tune every trial and the choices
(tuning.csv, choices.json), figures and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from math import nan

from rich.console import Console

from lab.data import ImageData, load
from lab.files import Row
from lab.options import command
from lab.progress import bar, make_console
from lab.results import Column, Results, Section, grouped, mean_and_deviation
from lab.training import reproducible, threads
from noise.comparison import theory_rows
from noise.data import with_noise
from noise.figures import curves_figure, dilation_figure
from noise.methods import Knobs, MethodName, own_knobs
from noise.search import METRIC, choose
from noise.settings import NoiseSettings
from noise.training import Key, NoiseRun

COLUMNS = (
    Column("test %", "test_accuracy", ".1f", percent=True),
    Column("learned %", "accuracy_wrong_labels", ".1f", percent=True),
    Column("memor.", "memorization_relative", ".3f"),
    Column("dilation", "dilation_relative", ".3f"),
    Column("test NC1", "dilation_nc1", ".3f"),
)
# In the tables, and too many for a screen.
MORE = (
    *("validation_accuracy", "noise_rate", "accuracy_noisy", "accuracy_clean", "accuracy_right_labels"),
    *("recovered", "memorization", "memorization_mean", "memorization_mean_relative", "corruption_bias"),
    *("corruption_bias_relative", "dilation_trace", "distance", "nc1_trace_noisy", "nc1_trace_clean"),
    *("nc1_trace_logits", "probability_right_labels", "probability_wrong_labels"),
)
KNOB_COLUMNS = tuple(Column(name.replace("_", " "), name, "g") for name in Knobs._fields)


def compare(settings: NoiseSettings, console: Console) -> list[Row]:
    """Choose if asked to, train every method at every noise for every seed; return the means over seeds."""
    settings.check()
    study = Study(settings, console)
    if settings.tune:
        study.tune()
    with threads(settings.threads), reproducible(settings.torch_device):
        for seed, eta in product(settings.seeds, settings.etas):
            study.train(seed, eta)
    return study.finish()


class Study:
    """The rows that have come so far, and the files that they are written to."""

    def __init__(self, settings: NoiseSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.results = Results(settings.folder, console)
        self.data: ImageData = load(settings)
        self.chosen = settings.read_choices()
        self.rows: list[Row] = []
        self.samples: list[Row] = []
        train, validation = self.data.held_out()
        sizes = f"{len(train)} images to train, {len(validation)} to validate, {len(self.data.test)} to test"
        self.results.say(f"{self.data.name}, {self.data.num_classes} classes: {sizes}")

    def tune(self) -> None:
        """Of each method the point with the best accuracy on noisy validation labels, the first of equals."""
        trials = choose(self.settings)
        for method, rows in trials.items():
            best = max(rows, key=lambda row: row[METRIC])
            own = own_knobs(method, self.settings.given)
            self.chosen[method] = self.settings.given._replace(
                **{name: best[name] for name, value in own.items() if value is not None}
            )
            found = ", ".join(f"{name} {best[name]:.3g}" for name, value in own.items() if value is not None)
            self.results.say(f"{method}: {found}, validation {best[METRIC]:.1%} of {len(rows)} trials")
        self.results.csv("tuning", [row for rows in trials.values() for row in rows])
        self.results.json("choices", choice_rows(self.chosen))

    def train(self, seed: int, eta: float) -> None:
        """All methods on the same noisy labels."""
        noisy = with_noise(self.data, eta, seed).to(self.settings.torch_device)
        for method in self.settings.methods:
            knobs = self.chosen.get(method, self.settings.given)
            run = NoiseRun(Key(eta, method, seed, knobs), self.settings, noisy)
            self._finish(run)
            self.rows += run.history
            place = {"eta": eta, "method": method, "seed": seed}
            columns = {name: values.tolist() for name, values in run.samples.items()}
            self.samples += [
                place | dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
            self.results.csv("runs", self.rows)

    def _finish(self, run: NoiseRun) -> None:
        name, settings = run.key.name, self.settings
        with bar(self.console, name, lambda row: f"loss {row['train_loss']:.3f}") as shown:
            checkpoint = settings.checkpoint(name)
            run.finish(checkpoint, resume=settings.resume, every=settings.checkpoint_every, progress=shown)
        row = run.history[-1]
        memorized, spread = (row.get(f"{name}_relative", nan) for name in ("memorization", "dilation"))
        text = f"{name}: test {row['test_accuracy']:.1%}, memorization {memorized:.3f}, dilation {spread:.3f}"
        self.results.say(f"{text}, {shown.seconds:.0f} s")

    def finish(self) -> list[Row]:
        """Write and print means over the seeds."""
        settings, results = self.settings, self.results
        last = [row for row in self.rows if row["epoch"] == settings.epochs]
        summary = summary_rows(last)
        results.names = ["runs.csv", *(["tuning.csv", "choices.json"] if settings.tune else [])]
        results.csv("summary", summary)
        results.csv("samples", self.samples)
        theory = theory_rows(last) if self.data.num_classes == 2 else []
        if theory:
            results.csv("theory", theory)
        results.figures(
            {"dilation": partial(dilation_figure, last, theory), "by-noise": partial(curves_figure, last)}
        )
        seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
        for (eta,), same in grouped(summary, "eta").items():
            title = f"{self.data.name}, eta {eta:g}, epochs: {settings.epochs}{seeds}"
            results.table(Section(title, {"method": "method"}, COLUMNS, same))
        if settings.tune:
            rows = choice_rows(self.chosen)
            results.sections.append(Section("Chosen by the search", {"method": "method"}, KNOB_COLUMNS, rows))
        results.report(f"Label noise, {self.data.name}", settings)
        results.tell()
        return summary


def choice_rows(chosen: dict[MethodName, Knobs]) -> list[Row]:
    """What ``--choices`` reads."""
    return [{"method": method, **own_knobs(method, knobs)} for method, knobs in chosen.items()]


def summary_rows(last: Sequence[Row]) -> list[Row]:
    """For each noise and method its knobs, and the means and deviations over the seeds."""
    names = [*(column.measure for column in COLUMNS), *MORE]
    return [
        {"eta": eta, "method": method}
        | {name: same[0][name] for name in Knobs._fields}
        | {"seeds": len(same)}
        | mean_and_deviation(same, names)
        for (eta, method), same in grouped(last, "eta", "method").items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line and return the exit status."""
    return command(NoiseSettings, lambda settings: compare(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
