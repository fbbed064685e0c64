"""The study of learned images: sets, what networks make of them and of baselines, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from distillation.common import digest
from distillation.lessons import Lesson, Outcome, best_rate, evaluate, real_lesson
from distillation.unrolled import (
    ImagesSettings,
    Objective,
    Starts,
    Unrolled,
    main_factory,
    make_objective,
    make_starts,
    unseen,
)
from etflayers.checks import require
from etflayers.distill import DistilledSet, write_png
from lab.data import ImageData, Split, load_inputs
from lab.figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, in_percent, legend_beside, new_figure
from lab.files import Row, kept, write_csv, write_json
from lab.networks import make_factory
from lab.progress import bar
from lab.results import Column, Results, grouped, mean_and_deviation, percent, summary_table
from lab.training import threads

ENLARGED = 3
KINDS = {"random real images": "real", "k-means centers": "kmeans", "average images": "means"}
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


@dataclass(frozen=True)
class SeedResult:
    """The set learned with a seed, and what networks made of it and of the baselines."""

    seed: int
    learned: Unrolled
    outcomes: list[Outcome]


def learn_images(settings: ImagesSettings, console: Console) -> list[SeedResult]:
    """Learn a set for each seed, train networks on it and on the baselines; write tables and figures.

    Raises:
        InvalidArgumentError: settings that cannot be run.
        MissingDependencyError: a package that the settings need is not installed.
        NonFiniteError: a training has diverged.
    """
    settings = settings.resolved
    settings.check()
    results = Results(settings.folder, console)
    with threads(settings.threads):
        data = load_inputs(settings)
        source = _source_data(settings, data)
        objective = make_objective(settings, data.num_classes)
        console.print(
            f"{data.name}: {len(data.train)} images to learn from, {len(data.test)} to test on; "
            f"{settings.per_class * data.num_classes} images for {settings.inner_steps} steps of a "
            f"{settings.network} from {settings.initialization} initial states",
            highlight=False,
        )
        found = [_one_seed(settings, seed, data, source, objective, console) for seed in settings.seeds]

    rows = summary_rows(found)
    results.csv("summary", [{n: v for n, v in row.items() if not n.endswith("_seeds")} for row in rows])
    results.json("summary", {"settings": settings.fingerprint(), "rows": rows})
    makers = {"steps": steps_figure, "learning": learning_figure}
    results.figures(
        {name: partial(make, found, objective.headline, data.name) for name, make in makers.items()}
    )
    measures = [name for name in ("attack", "others", "accuracy") if name in rows[0]]
    columns = [Column(f"{measure} %", measure, ".1f", percent=True) for measure in measures]
    labels = {"training": "training", "network": "network", "rate": "rate"}
    shown = [{**row, "rate": row["rate"] or "learned"} for row in rows]
    title = f"Networks trained on a few images, tested on {data.name}"
    console.print(summary_table(title, labels, [*columns, Column("of", "networks", "d")], shown))
    results.tell(", and the sets")
    return found


def _source_data(settings: ImagesSettings, data: ImageData) -> ImageData:
    """What the pretrained networks have been trained on."""
    if settings.source is None or settings.source == settings.data:
        return data
    source = load_inputs(replace(settings, data=settings.source, image_size=data.shape[-1]))
    require(
        source.shape == data.shape and source.num_classes == data.num_classes,
        f"--source {settings.source} has images {source.shape} of {source.num_classes} classes, --data "
        f"{settings.data} {data.shape} of {data.num_classes}: one network must fit both",
    )
    return source


def _one_seed(
    settings: ImagesSettings,
    seed: int,
    data: ImageData,
    source: ImageData,
    objective: Objective,
    console: Console,
) -> SeedResult:
    starts, name, headline = make_starts(settings, data, source, seed), f"seed{seed}", objective.headline
    run = Unrolled(settings, seed, data, starts, objective)
    with bar(console, name, lambda row: f"loss {row['loss']:.3f}, {headline} {row[headline]:.1%}") as shown:
        run.finish(
            settings.checkpoint(name),
            resume=settings.resume,
            every=settings.checkpoint_every,
            progress=shown,
        )
    last = run.history[-1]
    console.print(
        f"seed {seed}: {len(run.history)} outer steps, {run.seconds:.0f} s, last loss {last['loss']:.3f}, "
        f"{headline} {last[headline]:.1%} on its {settings.outer_batch} training images",
        highlight=False,
        soft_wrap=True,
    )
    folder, plain, distilled = settings.folder, settings.fingerprint(), run.distilled
    distilled.metadata = {"settings": plain, "seed": seed}
    distilled.save(folder / f"{name}.safetensors")
    # Every pixel as a square, or small images could not be seen.
    picture = distilled.images().repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)
    write_png(folder / f"{name}-images.png", picture)
    write_csv(folder / f"{name}-history.csv", run.history)

    asked = settings.values("evaluations", "other_networks", "draws", "baselines")
    found = kept(
        settings.checkpoint(f"{name}-outcomes-{digest(asked)}"),
        run.fingerprint,
        lambda: [asdict(o) for o in evaluate_all(settings, seed, data, starts, objective, distilled)],
        resume=settings.resume,
    )
    outcomes = [Outcome(**outcome) for outcome in found]
    for outcome in outcomes:
        console.print(f"  {outcome_text(outcome)}", highlight=False, soft_wrap=True)
    content: Row = {"settings": plain, "evaluation": asked, "seed": seed, "seconds": run.seconds}
    content["rates"] = distilled.rates.tolist()
    content["outcomes"] = [
        {**asdict(o), "networks": len(o.each), **mean_and_deviation(o.each, o.each[0])} for o in outcomes
    ]
    write_json(folder / f"{name}.json", content | {"history": run.history})
    return SeedResult(seed, run, outcomes)


def evaluate_all(
    settings: ImagesSettings,
    seed: int,
    data: ImageData,
    starts: Starts,
    objective: Objective,
    distilled: DistilledSet,
) -> list[Outcome]:
    """The set as it was learned, in other conditions, and the baselines."""
    lesson, judge = Lesson.of(distilled, settings.steps, settings.optimizer), objective.judge
    rest, validation = data.held_out()
    many, count = settings.evaluations, 1 if starts.single else settings.evaluations
    name = settings.network

    def outcome(training: str, lessons: list[Lesson], number: int = count, **options: Any) -> Outcome:
        options = {"network": name, "fresh": starts.fresh, "curves": True, **options}
        return evaluate(training, lessons=lessons, count=number, data=data, judge=judge, **options)

    outcomes = [outcome("distilled", [lesson])]
    if settings.steps > 1:
        generator = torch.Generator().manual_seed(seed)
        orders = [lesson.in_other_order(generator) for _ in range(count)]
        mixtures = [lesson.in_other_batches(generator) for _ in range(count)]
        outcomes.append(outcome("distilled, other order", orders))
        outcomes.append(outcome("distilled, other batches", mixtures))
    if starts.single:
        fresh = unseen(main_factory(settings, data), seed)
        outcomes.append(outcome("distilled, fresh networks", [lesson], many, fresh=fresh))
    for other in settings.other_networks:
        fresh = unseen(make_factory(other, data, head=settings.head, norm=settings.norm), seed)
        options: dict[str, Any] = {"network": other, "fresh": fresh, "curves": False}
        outcomes.append(outcome("distilled", [lesson], many, **options))
        rate = best_rate([lesson], fresh, validation, judge)
        chosen = [lesson.with_rate(rate)]
        outcomes.append(outcome("distilled, rate chosen", chosen, many, rate=rate, **options))
    for training, kind in KINDS.items() if settings.baselines else ():
        if kind == "kmeans" and settings.per_class == 1:
            continue  # the one center of a class is its average image
        draws = settings.draws if kind == "real" else 1

        def lessons(images: Split, kind: str = kind, draws: int = draws) -> list[Lesson]:
            seeds = range(1000 * seed, 1000 * seed + draws)
            return [baseline(kind, images, settings, data.num_classes, number) for number in seeds]

        rate = best_rate(lessons(rest), starts.fresh, validation, judge)
        chosen = [lesson.with_rate(rate) for lesson in lessons(data.train)]
        outcomes.append(outcome(training, chosen, max(count, draws), rate=rate))
    return outcomes


def baseline(kind: str, images: Split, settings: ImagesSettings, num_classes: int, seed: int) -> Lesson:
    """As many real images, in as many steps, as are learned."""
    shape = (settings.per_class, settings.steps, settings.inner_steps)
    return real_lesson(kind, *shape, settings.optimizer, images, num_classes, seed)


def summary_rows(results: Sequence[SeedResult]) -> list[Row]:
    """One row for each training and architecture: mean and deviation over all networks of all seeds.

    ``NAME_seeds`` are the means of each seed by itself, ``NAME_before`` the mean of networks not yet trained.
    """
    rows = []
    outcomes = [vars(outcome) for result in results for outcome in result.outcomes]
    for (training, network), same in grouped(outcomes, "training", "network").items():
        every = [measures for o in same for measures in o["each"]]
        rates = sorted({o["rate"] for o in same if o["rate"] is not None})
        row: Row = {"training": training, "network": network, "networks": len(every)}
        row["rate"] = ", ".join(f"{rate:g}" for rate in rates) if rates else None
        row |= mean_and_deviation(every, every[0])
        before = [curve[0][1] for o in same for curve in o["curves"]]  # after no step
        for name in every[0]:
            row[f"{name}_seeds"] = [fmean(measures[name] for measures in o["each"]) for o in same]
            if before:
                row[f"{name}_before"] = fmean(measures[name] for measures in before)
        rows.append(row)
    return rows


def outcome_text(outcome: Outcome) -> str:
    """One line: what was trained on what, and how well."""
    found = mean_and_deviation(outcome.each, outcome.each[0])
    parts = [f"{name} {percent(found[name], found[f'{name}_std'])} %" for name in outcome.each[0]]
    rate = "" if outcome.rate is None else f", rate {outcome.rate:g}"
    return f"{outcome.training}, {outcome.network}{rate}: {', '.join(parts)}"


def steps_figure(results: Sequence[SeedResult], measure: str, title: str) -> Figure:
    """The measure on test images by training steps: mean and deviation over networks and seeds."""
    figure = new_figure(7.5, 4)
    axes = figure.subplots()
    outcomes = [vars(outcome) for result in results for outcome in result.outcomes]
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


def learning_figure(results: Sequence[SeedResult], measure: str, title: str) -> Figure:
    """Outer loss and measure on training batches, and the norm of the hypergradient, by outer step."""
    figure = new_figure(11, 3.4, f"Learning the images of {title}")
    panels = {"loss": "outer loss", measure: f"{measure}, training batches"}
    panels["gradient_norm"] = "hypergradient norm"
    for axes, (name, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for result in results:
            history = result.learned.history
            values = _smoothed(np.asarray([row[name] for row in history]))
            axes.plot([row["step"] for row in history], values, label=f"seed {result.seed}")
        axes.set(title=label, xlabel="outer step")
        if name == measure:
            in_percent(axes)
        elif name == "gradient_norm":
            axes.set_yscale("log")
    figure.axes[0].legend()
    return figure


def _smoothed(values: np.ndarray, width: int = 15) -> np.ndarray:
    """A running mean, over what there is near the ends and where a batch had something to measure."""
    width = max(1, min(width, len(values) // 4))
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return total / np.maximum(count, 1)
