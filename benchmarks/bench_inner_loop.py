"""What the hypergradient of a distilled set costs: graphs that are kept against steps that are re-derived."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.convnet import Problem
from benchmarks.findings import Findings, cases
from benchmarks.processes import in_a_process, peak_mb
from benchmarks.report import Check, number
from benchmarks.timing import median_ratio
from etflayers.distill import KeptGraph, StepAdjoint, cross_entropy, unrolled_inner_loop
from etflayers.distill.adjoints import InnerAdjoint
from etflayers.testing import relative_error

Gradient = tuple[Tensor, ...]
Rival = Callable[[Problem], Gradient]
# Images, steps, and the width and number of blocks of the network.
Size = tuple[int, int, int, int]
Found = dict[str, Any]


def by(adjoint: InnerAdjoint) -> Rival:
    def hypergradient(problem: Problem) -> Gradient:
        trained = unrolled_inner_loop(
            problem.model,
            dict(problem.model.named_parameters()),
            problem.images,
            problem.labels,
            lr=problem.rates,
            epochs=problem.steps,
            adjoint=adjoint,
        )
        outputs = torch.func.functional_call(problem.model, trained.state, (problem.real,))
        return torch.autograd.grad(F.cross_entropy(outputs, problem.targets), problem.variables)

    return hypergradient


def by_higher(problem: Problem) -> Gradient:
    higher = importlib.import_module("higher")
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1.0)
    with higher.innerloop_ctx(problem.model, optimizer) as (model, steps):
        for rate in problem.rates:
            loss = F.cross_entropy(model(problem.images[0]), problem.labels[0])
            steps.step(loss, override={"lr": [rate]})
        outer = F.cross_entropy(model(problem.real), problem.targets)
        return torch.autograd.grad(outer, problem.variables)


def by_torchopt(problem: Problem) -> Gradient:
    torchopt = importlib.import_module("torchopt")
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=1.0))
    names, params = zip(*problem.model.named_parameters(), strict=True)

    def model(images: Tensor) -> Tensor:
        named = dict(zip(names, params, strict=True))
        output: Tensor = torch.func.functional_call(problem.model, named, (images,))
        return output

    for rate in problem.rates:
        # Its rates are numbers; a rate of 1 on a loss that is scaled is the same step.
        params = optimizer.step(rate * cross_entropy(model, problem.images[0], problem.labels[0]), params)
    return torch.autograd.grad(cross_entropy(model, problem.real, problem.targets), problem.variables)


KEPT, STEP = "kept graph", "re-derived, reverse over reverse"
COMPILED, ROOT = "re-derived, forward over reverse, compiled", "re-derived, checkpoints every sqrt(T)"
HIGHER, TORCHOPT = "higher", "torchopt"
RIVALS: dict[str, Rival] = {
    KEPT: by(KeptGraph()),
    HIGHER: by_higher,
    TORCHOPT: by_torchopt,
    STEP: by(StepAdjoint()),
    "re-derived, forward over reverse": by(StepAdjoint(mode="forward")),
    COMPILED: by(StepAdjoint(mode="forward", compile=True)),
    ROOT: by(StepAdjoint(checkpoint_every="sqrt")),
}
OTHERS = (KEPT, HIGHER, TORCHOPT)
# The slowest size is for those that a claim is about.
LONG = (*OTHERS, STEP, COMPILED)
SIZES: tuple[Size, ...] = ((10, 10, 64, 3), (100, 10, 64, 3), (100, 50, 64, 3))
QUICK_SIZES: tuple[Size, ...] = ((2, 2, 4, 1),)
ROUNDS, QUICK_ROUNDS = 2, 1
LONG_STEPS = 50
# Memory against T: ten images and a narrow network, so that a thousand steps take seconds.
GROWTH, QUICK_GROWTH = (10, 100, 1000), (2, 4)
GROWING: Size = (10, 1, 32, 3)
QUICK_GROWING: Size = (2, 1, 4, 1)
GROWERS = (KEPT, STEP, ROOT)
FITS_MB = 4096.0
# At 100 images: how many times less memory than the kept graph, by number of steps, and the times allowed.
MEMORY_BOUNDS = {10: 2.5, 50: 10.0}
COMPILED_TIME, EAGER_TIME = 0.8, 1.0
# Bytes that a further step adds, over those of the parameters that it has to keep. What checkpoints add is
# too little to tell from what an allocator rounds up; the tests count it tensor by tensor.
GROWTH_BOUND = 1.1


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    return f"fails with this torch: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:100]


def available(problem: Problem) -> tuple[dict[str, Gradient], dict[str, str]]:
    """What each rival finds, but for the compiled one, and why a peer finds nothing."""
    found, absent = {}, {}
    for name, rival in RIVALS.items():
        if name == COMPILED:
            continue
        try:
            found[name] = rival(problem)
        except Exception as error:
            if name not in (HIGHER, TORCHOPT):
                raise
            absent[name] = reason(error)
    return found, absent


def checks(count: int, steps: int, **network: int) -> tuple[list[Check], dict[str, str]]:
    """Each rival in float64 against the kept graph, a few steps decide; and who is absent, and why."""
    found, absent = available(Problem(count, steps, torch.float64, **network))
    return [
        Check(
            f"{count} images, {steps} steps, {name}: hypergradient",
            max(relative_error(a, b) for a, b in zip(gradient, found[KEPT], strict=True)),
            1e-10,
        )
        for name, gradient in found.items()
        if name != KEPT
    ], absent


def compiled_check(count: int, steps: int, **network: int) -> Check:
    """The compiled rival likewise, which takes a minute to compile.

    Not in float32: a sum in another order can put an activation on the other side of a kink of ReLU, and then
    the hypergradient of that image differs by a thousandth, whoever computes it.
    """
    problem = Problem(count, steps, torch.float64, **network)
    pairs = zip(RIVALS[COMPILED](problem), RIVALS[KEPT](problem), strict=True)
    error = max(relative_error(a, b) for a, b in pairs)
    return Check(f"{count} images, {steps} steps, {COMPILED}: hypergradient", error, 1e-10)


def problem_of(size: Size, steps: int | None = None, dtype: torch.dtype = torch.float32) -> Problem:
    count, all_steps, width, blocks = size
    return Problem(count, all_steps if steps is None else steps, dtype, width=width, blocks=blocks)


def measure_here(rival: str, size: Size) -> Found:
    """Seconds and megabytes of a hypergradient in this process, after one of a single step."""
    torch.set_num_threads(1)
    problem = problem_of(size)
    # The same network with a single step: what is compiled for it serves the others.
    all_rates, problem.rates, problem.steps = problem.rates, problem.rates[:1], 1
    start = time.perf_counter()
    RIVALS[rival](problem)
    first = time.perf_counter() - start
    start = time.perf_counter()
    RIVALS[rival](problem)
    again = time.perf_counter() - start
    problem.rates, problem.steps = all_rates, size[1]
    found: Found = {"compile": first - again} if rival == COMPILED else {}
    before = forgotten_peak_mb()
    start = time.perf_counter()
    RIVALS[rival](problem)
    found["seconds"] = time.perf_counter() - start
    found["megabytes"] = peak_mb() - before
    return found


def forgotten_peak_mb() -> float:
    """Give freed memory back and forget the peak so far, where Linux can; the peak from which to count."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def measure(rival: str, size: Size) -> Found:
    found: Found = in_a_process("benchmarks.bench_inner_loop", rival, *size)
    return found


@contextmanager
def compiled_afresh() -> Iterator[None]:
    """An empty cache of compiled code, which the processes started here share."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, name, folder)  # type: ignore[arg-type]
        yield


def sampled(size: Size, rivals: list[str], rounds: int) -> dict[str, list[Found]]:
    """A fresh process for each sample, the rivals taking turns."""
    samples: dict[str, list[Found]] = {name: [] for name in rivals}
    order = list(rivals)
    for _ in range(rounds):
        for name in order:
            samples[name].append(measure(name, size))
        order.append(order.pop(0))
    return samples


@pytest.mark.bench
@cases("network", full=[{}], quick=[{"width": 4, "blocks": 1}])
def test_hypergradients_agree(findings: Findings, network: dict[str, int]) -> None:
    found, _ = findings.once(lambda: checks(2, 3, **network))
    findings.require(*found, compiled_check(2, 3, **network))


@pytest.mark.bench
@cases("size", full=SIZES, quick=QUICK_SIZES, ids=str)
def test_cost(findings: Findings, size: Size) -> None:
    count, steps, width, blocks = size
    _, absent = checks(2, 3, width=4, blocks=1)
    entered = LONG if steps >= LONG_STEPS else tuple(RIVALS)
    present = [name for name in entered if name not in absent]
    with compiled_afresh():
        samples = findings.once(lambda: sampled(size, present, QUICK_ROUNDS if findings.quick else ROUNDS))
    seconds = {name: [found["seconds"] for found in runs] for name, runs in samples.items()}
    megabytes = {name: [found["megabytes"] for found in runs] for name, runs in samples.items()}
    extra = {name: statistics.median(values) for name, values in megabytes.items()}
    compiling = samples[COMPILED][0]["compile"]  # later processes find the code on disk
    case = f"{count} images, {steps} steps"
    findings.keep(case, seconds)
    findings.keep(f"{case}, MB", megabytes)
    for name in entered:
        cells = (
            [
                number(statistics.median(seconds[name])),
                f"{median_ratio(seconds, name, KEPT):.2f}",
                number(compiling) if name == COMPILED else "",
                f"{extra[name]:.0f}",
                f"{extra[KEPT] / extra[name]:.1f}",
            ]
            if name in present
            else [absent[name], "", "", "", ""]
        )
        findings.row(
            f"Hypergradient for images, soft labels and rates, {blocks} blocks of {width}, 28x28, float32",
            [
                "images",
                "steps",
                "",
                "seconds",
                "of the kept graph",
                "compilation, s",
                "extra MB",
                "times less",
            ],
            [f"{count}", f"{steps}", name, *cells],
            "One thread. A fresh process for each sample, rivals taking turns: seconds and peak memory "
            "of one hypergradient, after one of a single step. Compilation is paid once, beside the seconds.",
        )
    if count == 100:
        claims(findings, case, steps, seconds, extra)


def claims(
    findings: Findings, case: str, steps: int, seconds: dict[str, list[float]], extra: dict[str, float]
) -> None:
    for name in (STEP, COMPILED):
        less = extra[KEPT] / extra[name]
        findings.claim(f"{case}, {name}: memory", less, "at least", MEMORY_BOUNDS[steps], "x less")
    ratio = median_ratio(seconds, STEP, KEPT)
    findings.claim(f"{case}, {STEP}: time of {KEPT}", ratio, "at most", EAGER_TIME, "x")
    if steps >= LONG_STEPS:
        others = [name for name in OTHERS if name in seconds]
        fastest = min(others, key=lambda name: statistics.median(seconds[name]))
        what = f"{case}, {COMPILED}: time of the fastest of {', '.join(others)} ({fastest})"
        findings.claim(what, median_ratio(seconds, COMPILED, fastest), "at most", COMPILED_TIME, "x")


def growing(size: Size, lengths: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """Extra megabytes by rival and number of steps, as far as they fit."""
    count, _, width, blocks = size
    extra: dict[str, dict[int, float]] = {name: {} for name in GROWERS}
    for name, known in extra.items():
        for steps in lengths:
            if not known or max(known.values()) / max(known) * steps <= FITS_MB:
                known[steps] = measure(name, (count, steps, width, blocks))["megabytes"]
    return extra


@pytest.mark.bench
@cases("size, lengths", full=[(GROWING, GROWTH)], quick=[(QUICK_GROWING, QUICK_GROWTH)])
def test_growth(findings: Findings, size: Size, lengths: tuple[int, ...]) -> None:
    """Peak memory against the number of steps, with the claim about the states that are kept."""
    extra = findings.once(lambda: growing(size, lengths))
    weights = sum(p.nbytes for p in problem_of(size).model.parameters()) / 1024**2
    for name, known in extra.items():
        findings.keep("memory against steps, MB", {f"{name}, T = {t}": [mb] for t, mb in known.items()})
        findings.row(
            f"Extra memory (MB) against the number of steps T, {size[0]} images, width {size[2]}",
            ["", *(f"T = {t}" for t in lengths)],
            [name, *(f"{known[t]:.0f}" if t in known else "does not fit" for t in lengths)],
            f"The parameters of a step are {weights:.3f} MB. More than {FITS_MB:.0f} MB does not fit.",
        )
    *_, before, last = lengths
    added = (extra[STEP][last] - extra[STEP][before]) / ((last - before) * weights)
    what = f"{STEP}: growth from {before} to {last} steps, over that of the parameters"
    findings.claim(what, added, "at most", GROWTH_BOUND, "x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("size", type=int, nargs=4)
    arguments = parser.parse_args()
    print(json.dumps(measure_here(arguments.rival, tuple(arguments.size))))
