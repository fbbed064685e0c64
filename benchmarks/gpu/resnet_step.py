"""What a head costs inside a training step of a ResNet on a GPU: bfloat16 autocast, channels last."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.timing import DEVICE, eager_seconds, graph_seconds, medians
from benchmarks.report import Check, Claim, Report, Table, milliseconds, number
from benchmarks.resnet import resnet18_features, resnet50_features
from etflayers.nn import FixedETFHead, NearestETFHead

BATCH, SIDE = 256, 32
QUICK_BATCH, QUICK_SIDE = 16, 8
NUM_CLASSES = (10, 100)
# Upper bounds on what NearestETFHead adds to the step of ResNet-18, in per cent, by number of classes.
BOUNDS = {10: 3.0, 100: 5.0}
OURS, PLAIN = "NearestETFHead", "nn.Linear"


BACKBONES: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "ResNet-18": (resnet18_features, 512),
    "ResNet-50": (resnet50_features, 2048),
}
HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    PLAIN: nn.Linear,
    "FixedETFHead": FixedETFHead,
    OURS: NearestETFHead,
}


def training_step(
    backbone: nn.Module, head: nn.Module, images: Tensor, targets: Tensor
) -> Callable[[], Tensor]:
    """One step of SGD with momentum: the call returns the loss."""
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            features = backbone(images)
            logits = head(features) if isinstance(head, nn.Linear) else head(features, targets)
            loss = F.cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def step_waits(step: Callable[[], Tensor]) -> float:
    """1 if a warm step waits for the device, else 0."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError:
        return 1.0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0


def more(samples: dict[str, list[float]], name: str) -> float:
    """How much longer than with ``nn.Linear`` a step takes: median over the rounds, in per cent."""
    return statistics.median(100 * (a / b - 1) for a, b in zip(samples[name], samples[PLAIN], strict=True))


def run(quick: bool = False) -> Report:
    report = Report("resnet step")
    size, side = (QUICK_BATCH, QUICK_SIDE) if quick else (BATCH, SIDE)
    images = torch.randn(size, 3, side, side, device=DEVICE).to(memory_format=torch.channels_last)
    rows = []
    for backbone_name, (make, in_features) in BACKBONES.items():
        for k in NUM_CLASSES:
            targets = torch.arange(size, device=DEVICE) % k
            steps = {}
            for name, head in HEADS.items():
                torch.manual_seed(0)
                backbone = make(3).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
                steps[name] = training_step(backbone, head(in_features, k).to(DEVICE), images, targets)
                waited = step_waits(steps[name])
                report.checks.append(
                    Check(f"{backbone_name}, K = {k}, {name}: waits for the device", waited, 0.0)
                )
            with FlopCounterMode(display=False) as counter:
                steps[PLAIN]()
            rounds = 5 if quick else 40
            launched = eager_seconds(steps, rounds=rounds, repeats=2)
            device = graph_seconds({name: [step] for name, step in steps.items()}, rounds=rounds, repeats=2)
            report.samples[f"{backbone_name}, K = {k}"] = {"eager": launched, "graph": device}
            eager, in_graph = medians(launched), medians(device)
            ceiling = ceilings(quick).products["bfloat16"]
            for name in HEADS:
                speed = counter.get_total_flops() / in_graph[name]
                rows.append(
                    [
                        f"{backbone_name}, K = {k}: {name}",
                        milliseconds(eager[name]),
                        f"{more(launched, name):+.2f} %",
                        milliseconds(in_graph[name]),
                        f"{more(device, name):+.2f} %",
                        f"{number(speed / 1e12)} of {number(ceiling / 1e12)}",
                    ]
                )
            if backbone_name == "ResNet-18" and not quick:
                for how, samples in (("eager", launched), ("in a CUDA graph", device)):
                    what = f"ResNet-18, K = {k}, {how}: {OURS} adds to the step"
                    report.claims.append(Claim(what, more(samples, OURS), "at most", BOUNDS[k], " %"))
    report.tables.append(
        Table(
            f"Training step, batch {size}, {side}x{side}, bfloat16 autocast, channels last (milliseconds)",
            ["what", "eager", "over nn.Linear", "in a CUDA graph", "over nn.Linear", "TFLOP/s"],
            rows,
            "TFLOP/s: operations of the step with nn.Linear over the time in the graph, against the product "
            "of large bfloat16 matrices.",
        )
    )
    return report
