"""What the device can do at best, measured: bytes and floating-point operations a second."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.gpu.timing import DEVICE, graph_seconds, medians
from benchmarks.report import Report, Table, number

__all__ = ["Ceilings", "ceilings", "run"]


@dataclass(frozen=True)
class Ceilings:
    """In units a second: bytes copied (read and written), and operations of a product by input dtype."""

    copy: float
    products: dict[str, float]


@cache
def ceilings(quick: bool = False) -> Ceilings:
    """Copy 2 GB, multiply square matrices of 8192 (``quick``: 64 MB and 1024)."""
    bytes_, size = (2**26, 1024) if quick else (2**31, 8192)
    source = torch.empty(bytes_ // 4, device=DEVICE).normal_()
    target = torch.empty_like(source)
    products = {}
    for name, dtype in [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]:
        square = torch.randn(size, size, device=DEVICE).to(dtype)
        out = torch.empty_like(square)
        call = [lambda a=square, b=out: torch.mm(a, a, out=b)]
        products[name] = 2 * size**3 / medians(graph_seconds({name: call}, rounds=5, repeats=2))[name]
    copied = medians(graph_seconds({"copy": [lambda: target.copy_(source)]}, rounds=10))["copy"]
    return Ceilings(2 * bytes_ / copied, products)


def run(quick: bool = False) -> Report:
    report = Report("ceilings")
    found = ceilings(quick)
    rows = [["copy, read and written", f"{number(found.copy / 1e12)} TB/s"]]
    rows += [[f"product, {name}", f"{number(rate / 1e12)} TFLOP/s"] for name, rate in found.products.items()]
    note = f"float32 products: allow_tf32 = {torch.backends.cuda.matmul.allow_tf32}"
    report.tables.append(Table("Ceilings of this device", ["what", "measured"], rows, note))
    report.samples["ceilings"] = {"copy": found.copy, **found.products}
    return report
