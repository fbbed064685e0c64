"""Classes that come in sessions, with one image of each: heads with reserved directions, and simple methods.

    python examples/incremental.py --seeds 0 1 2 3 4             all methods: 22 minutes on a shared core
    python examples/incremental.py --classes 30 --base-classes 20 --features 32 --epochs 5     a first look
    python examples/incremental.py --resume                      continue what was killed
    python examples/incremental.py --help                        everything else

Every method gets the same body at the start, the same images in the same order and the same choice of
learning rates and steps, of which the validation set chooses. The output folder gets every session of every
run (runs.csv), means over the seeds (summary.csv), a figure and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib.figure import Figure
from rich.console import Console

from lab.data import ImageData, load
from lab.figures import PALETTE, draw_band, in_percent, new_figure
from lab.files import Row, kept
from lab.options import command
from lab.progress import bar, make_console
from lab.results import Column, Results, grouped, mean_and_deviation, percent, summary_table
from lab.training import reproducible, threads
from sessions.base import BaseKey, BaseRun
from sessions.learners import BASES, rows_of
from sessions.protocol import FRAMED, SIMPLE, Episode, IncrementalSettings, make_episode

COLUMNS = (
    Column("average", "accuracy_average", ".1f", percent=True),
    Column("last", "accuracy", ".1f", percent=True),
    Column("drop", "accuracy_drop", ".1f", percent=True),
    Column("novel", "accuracy_novel", ".1f", percent=True),
)
# In the tables, and too many for a screen.
MORE = ("accuracy_first", "accuracy_base", "accuracy_harmonic")
CHOICES = ("validation_accuracy_average", "validation_accuracy")
MEASURES = (*(column.measure for column in COLUMNS), *MORE, *CHOICES)


def compare(settings: IncrementalSettings, console: Console) -> list[Row]:
    """Teach every method all sessions for every seed; return the means over the seeds."""
    settings.check()
    results = Results(settings.folder, console)
    data = load(settings).to(settings.torch_device)
    later = len(settings.seen) - 1
    text = f"{data.name}: {settings.base_classes} classes, then {later} sessions of {settings.new_classes}"
    console.print(f"{text} with {settings.shots} image(s) of each", highlight=False)
    rows: list[Row] = []
    with threads(settings.threads), reproducible(settings.torch_device):
        for seed in settings.seeds:
            rows += _one_seed(seed, settings, data, console)
            results.names.clear()
            results.csv("runs", rows)
    summary = summary_rows(rows)
    results.csv("summary", summary)
    results.figures({"sessions": lambda: sessions_figure(rows)})
    seeds = f", mean ± deviation of {len(settings.seeds)} seeds" if len(settings.seeds) > 1 else ""
    title = f"Test accuracy in %, {settings.shots} image(s) of each later class{seeds}"
    console.print(summary_table(title, {"method": "method"}, COLUMNS, summary))
    results.tell()
    return summary


def _one_seed(seed: int, settings: IncrementalSettings, data: ImageData, console: Console) -> list[Row]:
    episode = make_episode(seed, settings, data)
    bases: dict[BaseKey, BaseRun] = {}
    rows: list[Row] = []
    for method in settings.methods:
        key = BaseKey(BASES.get(method, method), seed)
        if key not in bases:
            bases[key] = _train_and_tell(BaseRun(key, settings, episode), settings, console)
        rows += _teach_and_tell(method, bases[key], episode, settings, console)
    return rows


def _train_and_tell(run: BaseRun, settings: IncrementalSettings, console: Console) -> BaseRun:
    name = run.key.name
    with bar(console, name, lambda row: f"loss {row['loss']:.3f}") as shown:
        checkpoint = settings.checkpoint(f"base-{name}")
        run.finish(checkpoint, resume=settings.resume, every=settings.checkpoint_every, progress=shown)
    console.print(f"{name}: base session, {shown.seconds:.0f} s", highlight=False)
    return run


def _teach_and_tell(
    method: str, run: BaseRun, episode: Episode, settings: IncrementalSettings, console: Console
) -> list[Row]:
    own = {"method": method, "seed": run.key.seed}

    def teach() -> list[Row]:
        return [own | row for row in rows_of(method, run.model, episode, settings)]

    path = settings.checkpoint(f"{method}-seed{run.key.seed}")
    rows: list[Row] = kept(path, run.fingerprint | own, teach, resume=settings.resume)
    average, last = (percent(rows[-1][name]) for name in ("accuracy_average", "accuracy"))
    console.print(f"{method}-seed{run.key.seed}: average {average}%, last {last}%", highlight=False)
    return rows


def summary_rows(rows: Sequence[Row]) -> list[Row]:
    """For each method the means and deviations over the seeds, after the last session."""
    last: list[Row] = []
    for same in grouped(rows, "method", "seed").values():
        last.append({**same[-1], "accuracy_first": same[0]["accuracy"]})
    return [
        {"method": method, "seeds": len(same)} | mean_and_deviation(same, MEASURES)
        for (method,), same in grouped(last, "method").items()
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
