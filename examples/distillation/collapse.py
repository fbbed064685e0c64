"""Neural collapse of networks with different heads, trained on distilled and on real images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor, nn

from distillation.collapse_figures import ALL, RANDOM, curves_figure, several_sizes, sizes_figure
from distillation.common import DistilHeadName, NetworkSettings, first_set, inner_loss, random_lesson
from distillation.inducing import Inducing
from distillation.kernel_settings import KernelSettings
from etflayers.checks import require
from etflayers.distill import DistilledSet, Lesson, teach
from etflayers.errors import NonFiniteError
from lab.data import ImageData, Split, load_inputs
from lab.evaluation import measure
from lab.files import Row, kept
from lab.heads import HeadOptions, make_head
from lab.networks import Network, make_factory, seeded
from lab.options import Count, Distinct, Free, MoreThanOne, NotNegative, Positive, Share
from lab.progress import bar
from lab.results import Column, Results, grouped, mean_and_deviation, summary_table
from lab.training import Progress, in_silence, threads

ON_REAL = (
    Column("test\nacc. %", "test_accuracy", ".1f", True, ".1g"),
    Column("NC1\ntrain", "train_nc1_trace", ".3g", deviation_digits=".1g"),
    Column("NC2 ETF\ntrain", "train_nc2_etf_distance_means", ".3f", deviation_digits=".1g"),
    Column("NC3 dual\ntrain", "train_nc3_distance", ".3f", deviation_digits=".1g"),
    Column("NC4 %\ntest", "test_nc4_disagreement", ".1f", True, ".1g"),
    Column("margin\ntest", "test_margin_mean", ".3f", deviation_digits=".1g"),
)
ON_OWN = (
    Column("acc. %", "own_accuracy", ".1f", True, ".1g"),
    Column("NC1", "own_nc1_trace", ".2g", deviation_digits=".1g"),
    Column("NC2 ETF", "own_nc2_etf_distance_means", ".3f", deviation_digits=".1g"),
    Column("NC3 dual", "own_nc3_distance", ".3f", deviation_digits=".1g"),
    Column("NC4 %", "own_nc4_disagreement", ".1f", True, ".1g"),
    Column("margin", "own_margin_mean", ".3f", deviation_digits=".1g"),
)


@dataclass(frozen=True, kw_only=True)
class CollapseSettings(NetworkSettings):
    """Train networks with different heads on distilled and on real images, and measure how far they collapse.

    All trainings take the same steps, at the same rates. Finished ones are kept for `--resume`.
    """

    default_out: ClassVar[str] = "runs/distill-collapse"
    small: ClassVar[dict[str, Any]] = {"data": "digits", "network": "mlp", "width": 32}
    small |= {"steps": 100, "spacing": 4.0, "kernel_steps": 30}

    sets: Free[tuple[Path, ...]] = ()
    """Files of distilled sets, as the other studies write them (default: a kernel set is learned first)."""
    per_class: Free[Count] = 10
    """Without `--sets`: images of each class in the kernel set."""
    kernel_steps: Free[Count] = 200
    """Without `--sets`: updates of the kernel set."""
    heads: Free[Distinct[DistilHeadName]] = ("standard", "fixed", "nearest")
    """standard: a learned weight with rows of length 1, without a bias; fixed, nearest: the ETF heads of this
    library; linear: nn.Linear."""
    normalize: bool = True
    """Whether the standard and the ETF heads divide features by their length."""
    scale: Positive = 5.0
    """Scale of their logits. The frame of the fixed head is rotated at random."""

    steps: Count = 500
    """Training steps."""
    batch_size: Count = 50
    """Images in a step; all, if there are no more."""
    lr: Positive = 0.02
    """Learning rate at the start; it falls to 0 as a cosine."""
    momentum: Share = 0.9
    """Nesterov's."""
    weight_decay: NotNegative = 1e-3
    """Of all parameters."""
    spacing: MoreThanOne = 3.0
    """Ratio of successive steps that are measured."""

    def check(self) -> None:
        super().check()
        stems = [path.stem for path in self.sets]
        require(len(set(stems)) == len(stems), f"--sets must be files of different names, got {stems}")
        for path in self.sets:
            require(path.is_file(), f"--sets {path}: there is no such file")

    def lesson(self, training: TrainingSet, seed: int) -> Lesson:
        """The steps that all sets have in common."""
        options = {"momentum": self.momentum, "nesterov": self.momentum > 0}
        rule = partial(torch.optim.SGD, weight_decay=self.weight_decay, **options)
        images = (training.inputs, training.labels)
        return random_lesson(*images, self.batch_size, self.steps, rule, seed).scaled(self.lr)

    def measured_steps(self) -> list[int]:
        """0, 1, then a geometric sequence, and the last step."""
        steps = [0, 1]
        while steps[-1] < self.steps:
            steps.append(min(self.steps, max(steps[-1] + 1, int(steps[-1] * self.spacing))))
        return steps


@dataclass(frozen=True)
class TrainingSet:
    """What networks are trained on: images, and classes ``(n,)`` or probabilities ``(n, K)``.

    With a lesson, in the steps and at the rates that the images were learned for, and no others.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    lesson: Lesson | None = None

    @classmethod
    def of(cls, name: str, distilled: DistilledSet) -> TrainingSet:
        """The images of a distilled set. Labels that are no probabilities, those that a regression has
        learned, become the class of their largest entry."""
        labels = distilled.labels.detach()
        if labels.dtype.is_floating_point:
            sums = labels.sum(-1)
            if labels.min() < 0 or not torch.allclose(sums, torch.ones_like(sums)):
                labels = labels.argmax(-1)
        return cls(name, distilled.inputs.detach(), labels)

    @classmethod
    def both(cls, name: str, distilled: DistilledSet) -> list[TrainingSet]:
        """The same, and the same with the lesson that comes with the set, if there is one."""
        plain, learned_for = cls.of(name, distilled), distilled.metadata.get("settings", {})
        if distilled.log_rates is None or not {"steps", "optimizer"} <= learned_for.keys():
            return [plain]
        lesson = Lesson.of(distilled, learned_for["steps"], learned_for["optimizer"])
        return [plain, replace(plain, name=f"{name}, own steps", lesson=lesson)]

    @property
    def classes(self) -> Tensor:
        return self.labels if self.labels.ndim == 1 else self.labels.argmax(-1)

    @property
    def digest(self) -> str:
        """What tells the set from another that has its name."""
        rates = [] if self.lesson is None else [self.lesson.rates]
        content = (
            tensor.cpu().contiguous().numpy().tobytes() for tensor in (self.inputs, self.labels, *rates)
        )
        return hashlib.sha256(b"".join(content)).hexdigest()


def collapse_study(settings: CollapseSettings, console: Console) -> list[Row]:
    """Train each head on each set for each seed; write tables and figures."""
    results = Results(settings.folder, console)
    rows: list[Row] = []
    with threads(settings.threads):
        data = load_inputs(settings)
        for seed in settings.seeds:
            for training in training_sets(settings, seed, data, results):
                for head in settings.heads:
                    run = {"head": head, "seed": seed}
                    named = {"set": training.name, "images": len(training.inputs), **run}
                    file = f"{training.name.replace(',', '').replace(' ', '-')}-{head}-seed{seed}"
                    own = {
                        **data.fingerprint,
                        "images of the set": training.digest,
                        "head": head,
                        "seed": seed,
                    }
                    make = partial(_train_and_tell, training, head, seed, data, settings, results, file)
                    fingerprint = settings.fingerprint() | own
                    found = kept(settings.checkpoint(file), fingerprint, make, resume=settings.resume)
                    rows += [{**named, **row} for row in found]
    summary = summary_rows(rows)
    title = f"{settings.network} on {data.name}, {settings.steps} steps"
    results.csv("collapse", rows)
    results.csv("summary", summary)
    results.json("summary", {"settings": settings.fingerprint(), "summary": summary})
    parts = {"real-images": "train", "own-images": "own"}
    figures = {name: partial(curves_figure, rows, part, title) for name, part in parts.items()}
    if several_sizes(summary):
        figures["sizes"] = partial(sizes_figure, summary, title)
    results.figures(figures)
    labels = {"trained on": "set", "head": "head"}
    for where, columns in {"real training and test images": ON_REAL, "the images trained on": ON_OWN}.items():
        console.print(summary_table(f"{title}: on {where}", labels, columns, summary, "\n± "))
    results.tell()
    return rows


def training_sets(
    settings: CollapseSettings, seed: int, data: ImageData, results: Results
) -> list[TrainingSet]:
    """All real images, the distilled sets, and as many random real images as each of these has.

    A distilled set that has learning rates is there twice: for the steps of all the others, and for its own.
    """
    distilled = [found for path in settings.sets for found in TrainingSet.both(path.stem, _read(path, data))]
    distilled = distilled or [_kernel_set(settings, seed, data, results)]
    sets = [TrainingSet(ALL, data.train.images, data.train.targets), *distilled]
    for per_class in sorted({len(training.inputs) // data.num_classes for training in distilled}):
        random = first_set("real", per_class, data, torch.Generator().manual_seed(seed))
        sets.append(TrainingSet.of(f"{len(random.inputs)} {RANDOM}", random))
    return sets


def _read(path: Path, data: ImageData) -> DistilledSet:
    distilled = DistilledSet.load(path, device=data.device)
    require(
        distilled.inputs.shape[1:] == data.shape and distilled.num_classes == data.num_classes,
        f"--sets {path}: {distilled.num_classes} classes of images {tuple(distilled.inputs.shape[1:])}, "
        f"--data has {data.num_classes} of {data.shape}",
    )
    return distilled


def _kernel_set(settings: CollapseSettings, seed: int, data: ImageData, results: Results) -> TrainingSet:
    """A set learned by kernel regression, in a place where it can be found again."""
    same = ("data", "data_dir", "image_size", "classes", "device", "resume")
    chosen: dict[str, Any] = {name: getattr(settings, name) for name in same}
    kernel = KernelSettings(**chosen, out=settings.folder, outer_steps=settings.kernel_steps)
    run = Inducing(kernel, settings.per_class, seed, data)
    name = f"kernel-{settings.per_class}-a-class-seed{seed}"
    run.learn(name)
    run.distilled.save(settings.folder / f"{name}.safetensors")
    count = len(run.distilled.inputs)
    results.say(f"learned {count} images by kernel regression, seed {seed}")
    return TrainingSet.of(f"{count} kernel images", run.distilled)


def _train_and_tell(
    training: TrainingSet,
    head: DistilHeadName,
    seed: int,
    data: ImageData,
    settings: CollapseSettings,
    results: Results,
    name: str,
) -> list[Row]:
    with bar(results.console, name) as shown:
        history = train_and_measure(training, head, seed, data, settings, shown)
    reached = f"test accuracy {history[-1]['test_accuracy']:.2%}, {shown.seconds:.0f} s"
    results.say(f"{training.name}, {head} head, seed {seed}: {reached}")
    return history


def train_and_measure(
    training: TrainingSet,
    head: DistilHeadName,
    seed: int,
    data: ImageData,
    settings: CollapseSettings,
    progress: Progress = in_silence,
) -> list[Row]:
    """Train a network and return a row for each measured step.

    In eval mode, on three sets of images: ``own_...`` those that it is trained on, ``train_...`` and
    ``test_...`` real ones. NC4 on the test set is against the class means of the real training set.

    Raises:
        InvalidArgumentError: a network that does not fit the data.
        NonFiniteError: training has diverged.
    """
    network = make_network(head, seed, data, settings)
    lesson = training.lesson or settings.lesson(training, seed)
    stops = settings.measured_steps() if training.lesson is None else (0, lesson.steps)
    rows: list[Row] = []

    def look(steps: int) -> None:
        if steps in stops:
            rows.append({"step": steps, **_measures(network, training, data, head)})
            progress(steps, lesson.steps, None)

    look(0)
    teach(network, lesson, loss=inner_loss, after_step=look)
    return rows


def make_network(head: DistilHeadName, seed: int, data: ImageData, settings: CollapseSettings) -> Network:
    """The network that the other studies train, its head replaced by one with the options of this study.

    One seed gives all heads the same body.
    """
    # Always of a linear head, or its random numbers would leave each head another body.
    network = seeded(make_factory(settings.network, data, width=settings.width, norm=settings.norm), seed)
    options = HeadOptions(normalize=settings.normalize, scale=settings.scale, rotation="haar")
    with torch.random.fork_rng():
        made = make_head(head, network.head.in_features, data.num_classes, seed, options)
    return Network(network.body, made).to(data.device)


def _measures(network: nn.Module, training: TrainingSet, data: ImageData, head: DistilHeadName) -> Row:
    own = Split(training.inputs, training.classes)
    row: Row = {}
    centers = None
    try:
        for part, split in (("own", own), ("train", data.train), ("test", data.test)):
            against = centers if part == "test" else None
            measured = measure(network, nn.CrossEntropyLoss(), split, data, centers=against)
            row |= {f"{part}_{name}": value for name, value in measured.row.items()}
            centers = measured.statistics  # after "train", those that the test set is measured against
    except NonFiniteError as error:
        raise NonFiniteError(f"{training.name}, {head} head: {error}") from error
    return row


def summary_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for each set and head: mean and deviation over the seeds of every measure at the last step.

    Where some seed has no value, because its class means coincide, there is none.
    """
    summary = []
    for (name, head), runs in grouped(rows, "set", "head").items():
        same = grouped(runs, "step")[max(row["step"] for row in runs),]
        entry: Row = {"set": name, "images": same[0]["images"], "head": head, "seeds": len(same)}
        measures = [key for key in same[0] if key.startswith(("own_", "train_", "test_"))]
        summary.append(entry | mean_and_deviation(same, measures))
    return summary
