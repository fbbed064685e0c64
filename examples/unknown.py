"""What a network does with inputs of no class that it knows, and what its features are worth for other tasks.

    python examples/unknown.py --seeds 0 1 2 --image-size 14 --per-class 600     see docs/evidence/unknown.md
    python examples/unknown.py --data glyphs --image-size 28    letters; other scripts are unknown
    python examples/unknown.py --trained runs/study             networks of examples/collapse_study.py
    python examples/unknown.py --resume                              continue what was killed
    python examples/unknown.py --help                                everything else

All networks of a seed get the same encoder at the start, the same batches and the same learning rate. No
unknown input has a say in anything: AUROC needs no threshold, and the detectors have the numbers of their
papers. The output folder gets collapse, accuracy and transfer of every space of every network (runs.csv),
every score on every kind of unknown input (scores.csv), means over the seeds (summary.csv), the numbers by
which claims are judged (claims.csv), figures and checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product

from rich.console import Console

from etflayers.checks import require
from lab.data import load
from lab.files import Row, kept
from lab.options import command
from lab.progress import bar, make_console
from lab.results import Column, Results, Section, grouped, mean_and_deviation
from lab.training import reproducible, threads
from unknowns.claims import claim_rows, joined
from unknowns.data import World, make_world
from unknowns.evaluation import evaluate
from unknowns.networks import Collapsed, Subject, UnknownRun, settings_of
from unknowns.pictures import score_figure, trade_off_figure
from unknowns.scores import OF_LOGITS, OWN, SCORES, missing
from unknowns.settings import UnknownSettings

LABELS = ("data", "head", "variant", "space")
COLUMNS = (
    Column("NC1", "nc1_trace", ".2g"),
    Column("test %", "test_accuracy", ".1f", percent=True),
    Column("AUROC", "auroc"),
    Column("transfer %", "transfer", ".1f", percent=True),
)
SHORT = {"max-logit": "max", "vertex": "vert.", "mahalanobis": "Mah."}  # a row has to fit on a screen
SCORE_COLUMNS = tuple(
    Column(SHORT.get(score, score), f"auroc_{score}", ".0f", percent=True) for score in SCORES
)


def compare(settings: UnknownSettings, console: Console) -> list[Row]:
    """Ask every network; return the means over the seeds."""
    settings.check()
    results, missed = Results(settings.folder, console), missing()
    if missed is not None:
        results.say(missed)
    spaces: list[Row] = []
    scores: list[Row] = []
    with threads(settings.threads), reproducible(settings.torch_device):
        world = make_world_of(settings)
        known = world.known
        results.say(
            f"{known.name}: {len(known.train)} images to train, {known.num_classes} classes; "
            f"unknown: {', '.join(world.unknown)}; transfer to {', '.join(world.tasks)}"
        )
        for name, why in world.absent.items():
            results.say(f"without {name}: {why}")
        for subject in subjects(settings, world, console):
            found = ask(subject, world, settings)
            spaces += found["spaces"]
            scores += found["scores"]
            results.say(f"{subject.name}: {_told(joined(found['spaces'], found['scores']))}")
            results.names.clear()
            results.csv("runs", spaces)
            results.csv("scores", scores)
    return finish(joined(spaces, scores), settings, results)


def make_world_of(settings: UnknownSettings) -> World:
    """Of the options, or of the study whose networks are taken, which know all of their classes."""
    own = settings.trained is None
    source = settings if own else settings_of(settings)
    whole = load(source).to(settings.torch_device)
    known = settings.known_classes if own else None
    return make_world(whole, known, settings.unknown_images, settings.probe_images, source)


def subjects(settings: UnknownSettings, world: World, console: Console) -> Iterator[Subject]:
    """The networks, each trained before it is handed out."""
    if settings.trained is None:
        for seed, head, variant in product(settings.seeds, settings.heads, settings.variants):
            run = UnknownRun(head, variant, seed, settings, world.known)
            with bar(console, run.name, lambda row: f"loss {row['loss']:.3f}") as shown:
                run.finish(
                    settings.checkpoint(run.name),
                    resume=settings.resume,
                    every=settings.checkpoint_every,
                    progress=shown,
                )
            yield run
        return
    paths = sorted((settings.trained / "checkpoints").glob("*-seed*.pt"))
    require(bool(paths), f"--trained {settings.trained} has no checkpoint: let the study train first")
    source = settings_of(settings)
    for path in paths:
        subject = Collapsed(path, source, world.known)
        if subject.finished:
            yield subject
        else:
            console.print(f"{subject.name}: left out, its training has not come to its end", highlight=False)


def ask(subject: Subject, world: World, settings: UnknownSettings) -> dict[str, list[Row]]:
    """What :func:`evaluate` finds, or has found in an earlier run."""
    asked = settings.values("probe_strengths", "probe_images", "unknown_images")
    asked |= {"scores": [*OF_LOGITS, *OWN] if missing() else list(SCORES)}
    path = settings.checkpoint(f"{subject.name}-asked")
    fingerprint = subject.fingerprint | world.fingerprint | asked
    return kept(
        path, fingerprint, lambda: evaluate(subject, world, settings.probe_strengths), resume=settings.resume
    )


def finish(places: list[Row], settings: UnknownSettings, results: Results) -> list[Row]:
    """Write and print means over the seeds, and the claims."""
    measures = list(dict.fromkeys(name for row in places for name in row if name not in (*LABELS, "seed")))
    summary = [
        {**dict(zip(LABELS, place, strict=True)), "seeds": len(same)}
        | mean_and_deviation(same, [name for name in measures if name in same[0]])
        for place, same in grouped(places, *LABELS).items()
    ]
    results.csv("summary", summary)
    results.csv("claims", claim_rows(places))
    results.figures({"scores": lambda: score_figure(places), "trade-off": lambda: trade_off_figure(places)})
    labels = {"head": "head", "variant": "variant", "space": "space"}
    seeds = len({row["seed"] for row in places})
    title = f"{places[0]['data']}, " + (f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed")
    results.table(Section(title, labels, COLUMNS, summary), plus_minus="\n±")
    shown = [column for column in SCORE_COLUMNS if any(column.measure in row for row in summary)]
    means = [
        {name: row[name] for name in row if not name.endswith("_std")}
        | {"head": row["head"].replace("-", "-\n")}
        for row in summary
    ]
    results.table(Section("AUROC by score in %, mean over unknown inputs", labels, shown, means))
    results.report(f"What is unknown to classifiers of {places[0]['data']}", settings)
    results.tell()
    return summary


def _told(places: list[Row]) -> str:
    return "; ".join(
        f"{row['space']} NC1 {row['nc1_trace']:.2g}, AUROC {row['auroc']:.3f}, transfer {row['transfer']:.1%}"
        for row in places
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line and return the exit status."""
    return command(UnknownSettings, lambda settings: compare(settings, make_console()), argv)


if __name__ == "__main__":
    sys.exit(main())
