"""Cross-entropy of an ETF head, forward and backward: time and peak memory against ``F.cross_entropy``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.timing import DEVICE, eager_seconds, medians, peak_bytes
from benchmarks.report import Check, Claim, Report, Table, number
from etflayers.functional import canonical_etf_logits, code_cross_entropy, etf_cross_entropy
from etflayers.testing import relative_error

# B, d, K of the canonical frame, and of any other frame.
SIZES = [(512, 512, 10), (512, 512, 100), (4096, 32768, 32768)]
LINEAR_SIZES = [(512, 512, 100), (4096, 512, 32768)]
QUICK = [(16, 32, 10)]
LARGE = (4096, 32768, 32768)
BOUND = 2.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]
CANONICAL: dict[str, Loss] = {
    "etf_cross_entropy": lambda f, w, y, k: etf_cross_entropy(f, y, k),
    "etf_cross_entropy, reference": lambda f, w, y, k: etf_cross_entropy(f, y, k, impl="reference"),
    "F.cross_entropy of the head": lambda f, w, y, k: F.cross_entropy(canonical_etf_logits(f, k), y),
    "F.cross_entropy of the features": lambda f, w, y, k: F.cross_entropy(f, y),
}
LINEAR: dict[str, Loss] = {
    "code_cross_entropy": lambda f, w, y, k: code_cross_entropy(f, w, y),
    "F.cross_entropy of F.linear": lambda f, w, y, k: F.cross_entropy(F.linear(f, w), y),
}
RIVAL = {"etf_cross_entropy": "F.cross_entropy of the head"}


def problem(batch: int, width: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    features = torch.randn(batch, width, device=DEVICE).to(dtype).requires_grad_()
    frame = torch.randn(classes, width, device=DEVICE) / width**0.5 if width != classes else torch.empty(0)
    return features, frame.to(dtype).requires_grad_(), torch.randint(classes, (batch,), device=DEVICE)


def run(quick: bool = False) -> Report:
    report = Report("cross-entropy")
    bandwidth = ceilings(quick).copy
    for title, rivals, sizes in [
        ("Canonical frame", CANONICAL, QUICK if quick else SIZES),
        ("Any frame", LINEAR, QUICK if quick else LINEAR_SIZES),
    ]:
        rows = []
        for size in sizes:
            for name, dtype in DTYPES.items():
                rows += _rows(report, rivals, size, name, dtype, bandwidth)
        report.tables.append(
            Table(
                f"{title}, loss and gradient",
                ["B, d, K", "dtype", "loss", "time, ms", "peak memory, MB", "of the copy bandwidth"],
                rows,
                "Memory beyond the features, gradients included. Bandwidth: as if the features were read "
                "twice and their gradient written, and nothing else.",
            )
        )
    return report


def _rows(
    report: Report,
    rivals: dict[str, Loss],
    size: tuple[int, int, int],
    dtype_name: str,
    dtype: torch.dtype,
    bandwidth: float,
) -> list[list[str]]:
    batch, width, classes = size
    features, frame, targets = problem(*size, dtype)
    inputs = [features, frame] if rivals is LINEAR else [features]
    calls = {}
    for name, loss in rivals.items():
        if name == "F.cross_entropy of the features" and width != classes:
            continue
        calls[name] = lambda loss=loss: torch.autograd.grad(loss(features, frame, targets, classes), inputs)
    # On a few rows: the float64 reference of all of them would not fit.
    few, some = features[:16].detach().requires_grad_(), targets[:16]
    wide = few.detach().double().requires_grad_()
    for name in list(calls)[:1]:
        loss = rivals[name]
        (found,) = torch.autograd.grad(loss(few, frame, some, classes), few)
        plain = list(rivals.values())[-1] if rivals is LINEAR else CANONICAL["F.cross_entropy of the head"]
        (exact,) = torch.autograd.grad(plain(wide, frame.double(), some, classes), wide)
        limit = 2e-5 if dtype == torch.float32 else 2e-2
        report.checks.append(
            Check(f"{name} {size} {dtype_name}: gradient", relative_error(found, exact), limit)
        )
    large = batch * classes > 2**24
    samples = eager_seconds(calls, rounds=10 if large else 30, repeats=2 if large else 10)
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    report.samples[f"{size} {dtype_name} {next(iter(calls))}"] = {"seconds": samples, "peak bytes": peaks}
    seconds = medians(samples)
    if size == LARGE and rivals is CANONICAL:
        ours = "etf_cross_entropy"
        rival = RIVAL[ours]
        what = f"B = {batch}, K = {classes}, {dtype_name}: {rival} over {ours}"
        report.claims += [
            Claim(f"{what}, time", seconds[rival] / seconds[ours], "at least", BOUND, "x"),
            Claim(f"{what}, peak memory", peaks[rival] / peaks[ours], "at least", BOUND, "x"),
        ]
    moved = 3 * features.numel() * features.element_size()
    return [
        [
            f"{batch}, {width}, {classes}",
            dtype_name,
            name,
            number(1e3 * seconds[name]),
            number(peaks[name] / 2**20),
            f"{100 * moved / seconds[name] / bandwidth:.0f} %" if rivals is CANONICAL else "",
        ]
        for name in calls
    ]
