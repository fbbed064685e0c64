"""The study of learned images: sets, what networks make of them and of baselines, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from distillation.common import digest, learning_figure, rates_of
from distillation.images_settings import ImagesSettings
from distillation.judging import Judging, ranked
from distillation.objective import Objective
from distillation.starts import Starts, make_starts
from distillation.unrolled import Unrolled
from etflayers.checks import require
from etflayers.distill import DistilledSet, write_png
from lab.data import ImageData, load_inputs
from lab.figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, in_percent, legend_beside, new_figure
from lab.files import Row, kept, write_json
from lab.ranks import process_group, rank
from lab.results import Column, Results, grouped, mean_and_deviation, percent, summary_table
from lab.training import threads

ENLARGED = 3
# What a finished set is tried on: other answers are kept in other files.
ASKED = ("evaluations", "curves", "other_networks", "other_weights", "other_epochs", "draws", "baselines")
ASKED += ("baseline_epochs", "ranking", "ranking_epochs")
NOT_IN_CSV = ("_seeds", "class_accuracy", "class_accuracy_std")  # ends of names
# What was learned is drawn in solid lines.
STYLES: dict[str, tuple[str, str]] = {
    "distilled": (RED, "-"),
    "distilled, other order": (ORANGE, "-"),
    "distilled, other batches": (GREEN, "-"),
    "distilled, fresh networks": (PINK, "-"),
    "random real images": (SKY, "--"),
    "k-means centers": (BLUE, "--"),
    "average images": (GREY, "--"),
}


def learn_images(settings: ImagesSettings, console: Console) -> None:
    """Learn a set for each seed, train networks on it and on the baselines; write tables and figures."""
    with process_group(settings.torch_device), threads(settings.threads):
        study = Study(settings, console if rank() == 0 else Console(quiet=True))
        found = [study.one_seed(seed) for seed in settings.seeds]
        if rank() == 0:
            histories, outcomes = zip(*found, strict=True)
            study.report(list(histories), list(chain(*outcomes)))


class Study:
    """What all seeds share: settings, data, those of the pretrained networks, and what is learned for."""

    def __init__(self, settings: ImagesSettings, console: Console) -> None:
        self.settings, self.results = settings, Results(settings.folder, console)
        self.data = data = load_inputs(settings)
        self.source = self._source_data()
        self.objective = Objective.of(settings, data.num_classes)
        self.results.say(
            f"{data.name}: {len(data.train)} images to learn from, {len(data.test)} to test on; "
            f"{settings.per_class * data.num_classes} images for {settings.inner_steps} steps of a "
            f"{settings.network} from {settings.initialization} initial states"
        )

    def _source_data(self) -> ImageData:
        data, name = self.data, self.settings.source
        if name is None or name == self.settings.data:
            return data
        source = load_inputs(replace(self.settings, data=name, image_size=data.shape[-1]))
        require(
            source.shape == data.shape and source.num_classes == data.num_classes,
            f"--source {name} has images {source.shape} of {source.num_classes} classes, --data "
            f"{self.settings.data} {data.shape} of {data.num_classes}: one network must fit both",
        )
        return source

    def one_seed(self, seed: int) -> tuple[list[Row], list[Row]]:
        """Learn a set; the first rank judges it and writes both. The history and the outcomes."""
        settings, folder, name = self.settings, self.settings.folder, f"seed{seed}"
        starts = make_starts(settings, self.data, self.source, seed)
        run = Unrolled(settings, seed, self.data, starts, self.objective)
        run.learn_and_write(name, self.results)
        if rank() > 0:
            return run.history, []
        self.results.say(
            f"seed {seed}: {len(run.history)} outer steps, {run.seconds:.0f} s, last "
            f"{run.tell(run.history[-1])} on its {settings.outer_batch} training images"
        )
        if run.validation.curve:
            step, score = run.validation.best
            self.results.say(f"  kept: that of step {step}, {run.headline} {score:.1%} in validation")
        distilled = run.distilled
        # Every pixel as a square, or small images could not be seen.
        picture = distilled.images().repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)
        write_png(folder / f"{name}-images.png", picture)

        asked = settings.values(*ASKED)
        path = settings.checkpoint(f"{name}-outcomes-{digest(asked)}")
        make = partial(self.judge, seed, starts, distilled)
        outcomes: list[Row] = kept(path, run.fingerprint, make, resume=settings.resume)
        for outcome in outcomes:
            self.results.say(f"  {outcome_text(outcome)}")
        content: Row = {"settings": settings.fingerprint(), "evaluation": asked, "seed": seed}
        content |= {
            "seconds": run.seconds,
            "validation": run.validation.curve,
            "rates": distilled.rates.tolist(),
            "history": run.history,
        }
        content["outcomes"] = [
            {**o, "networks": len(o["each"]), **mean_and_deviation(o["each"], o["each"][0])} for o in outcomes
        ]
        if settings.ranking:
            content["ranking"] = ranked(outcomes, settings.network)._asdict()
        write_json(folder / f"{name}.json", content)
        return run.history, outcomes

    def judge(self, seed: int, starts: Starts, distilled: DistilledSet) -> list[Row]:
        """Outcomes of the set as it was learned, in other conditions, and of the baselines."""
        return Judging(self.settings, seed, self.data, starts, self.objective).all(distilled)

    def report(self, histories: list[list[Row]], outcomes: list[Row]) -> None:
        """Tables and figures over all seeds."""
        rows, name, headline = summary_rows(outcomes), self.data.name, self.objective.headline
        self.results.csv(
            "summary", [{n: v for n, v in r.items() if not n.endswith(NOT_IN_CSV)} for r in rows]
        )
        summary: Row = {"settings": self.settings.fingerprint(), "rows": rows}
        if self.settings.ranking:
            place = ranked(outcomes, self.settings.network)
            summary["ranking"] = place._asdict()
            self.results.say(
                f"hard label recovery {place.hard_label_recovery:.1%} (0 is best), improvement over random "
                f"{place.improvement_over_random:.1%}, score {place.score:.3f}"
            )
        self.results.json("summary", summary)
        panels = {"loss": "outer loss", headline: f"{headline}, training batches"}
        panels["gradient_norm"] = "hypergradient norm"
        seeds = {f"seed {seed}": [run] for seed, run in zip(self.settings.seeds, histories, strict=True)}
        learning = partial(learning_figure, seeds, panels, f"Learning the images of {name}")
        (self.settings.folder / "steps.png").unlink(missing_ok=True)  # that of an earlier run
        steps = {"steps": partial(steps_figure, outcomes, headline, name)} if self.settings.curves else {}
        self.results.figures({**steps, "learning": learning})
        measures = [measure for measure in ("attack", "others", "modified", "accuracy") if measure in rows[0]]
        columns = [Column(f"{measure} %", measure, ".1f", percent=True) for measure in measures]
        columns.append(Column("of", "networks", "d"))
        labels = {"training": "training", "network": "network", "rate": "rate"}
        shown = [{**row, "rate": row["rate"] or "learned"} for row in rows]
        title = f"Networks trained on a few images, tested on {name}"
        self.results.console.print(summary_table(title, labels, columns, shown))
        self.results.tell(", and the sets")


def summary_rows(outcomes: Sequence[Row]) -> list[Row]:
    """One row for each training and architecture: mean and deviation over all networks of all seeds.

    ``NAME_seeds`` are the means of each seed by itself, ``NAME_before`` that of watched networks at first,
    ``class_accuracy`` a list with the mean for each class, of networks that were to be misled.
    """
    rows = []
    for (training, network), same in grouped(outcomes, "training", "network").items():
        every = [measures for o in same for measures in o["each"]]
        row: Row = {"training": training, "network": network, "networks": len(every), "rate": rates_of(same)}
        if epochs := sorted({o["epochs"] for o in same if o["epochs"]}):
            row["epochs"] = ", ".join(map(str, epochs))
        totals, classes = split_measures(every[0])
        row |= mean_and_deviation(every, totals)
        if classes:
            found = mean_and_deviation(every, classes)
            row["class_accuracy"] = [found[name] for name in classes]
            row["class_accuracy_std"] = [found[f"{name}_std"] for name in classes]
        before = [curve[0][1] for o in same for curve in o["curves"]]  # after no step
        for name in totals:
            row[f"{name}_seeds"] = [fmean(measures[name] for measures in o["each"]) for o in same]
            if before:
                row[f"{name}_before"] = fmean(measures[name] for measures in before)
        rows.append(row)
    return rows


def split_measures(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of what is measured of all images, and of each class."""
    classes = [name for name in names if name.startswith("class ")]
    return [name for name in names if name not in classes], classes


def outcome_text(outcome: Row) -> str:
    """One line: what was trained on what, and how well."""
    each = outcome["each"]
    totals, _ = split_measures(each[0])
    found = mean_and_deviation(each, totals)
    parts = ", ".join(f"{name} {percent(found[name], found[f'{name}_std'])} %" for name in totals)
    rate = "" if outcome["rate"] is None else f", rate {outcome['rate']:g}"
    epochs = "" if outcome["epochs"] is None else f", {outcome['epochs']} epochs"
    return f"{outcome['training']}, {outcome['network']}{rate}{epochs}: {parts}"


def steps_figure(outcomes: Sequence[Row], measure: str, title: str) -> Figure:
    """The measure on test images by training steps: mean and deviation over networks and seeds."""
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    for (training,), same in grouped(outcomes, "training").items():
        curves = [curve for outcome in same for curve in outcome["curves"]]
        if not curves:
            continue
        color, dashes = STYLES[training]
        steps = [step for step, _ in curves[0]]
        values = np.asarray([[measures[measure] for _, measures in curve] for curve in curves])
        mean, deviation = values.mean(0), values.std(0)
        axes.plot(steps, mean, color=color, linestyle=dashes, label=training)
        axes.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
    axes.set(title=f"Trained on a few images, tested on {title}", xlabel="training step", ylim=(0, 1))
    axes.set_ylabel(f"test {measure}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    in_percent(axes)
    legend_beside(figure, axes)
    return figure
