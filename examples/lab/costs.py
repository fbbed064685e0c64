"""What a head costs: time of a step and the head's share of it, parameters, and memory of training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import median

import torch
from rich.table import Table
from torch import Tensor, nn

from etflayers import capture_features
from lab.classifiers import Trained, Trainer, autocast
from lab.data import ImageData
from lab.files import Row
from lab.heads import HeadName, head_of
from lab.results import make_table
from lab.settings import Settings
from lab.training import synchronize

ROUNDS = 25
WARM_UPS = 3


def step_times(runs: Sequence[Trained], settings: Settings, data: ImageData) -> dict[HeadName, Row]:
    """Milliseconds of a training step, whole and of the head alone, of one trained model for each head.

    One method for all: after the training, on copies, with the first batch of epoch 0. *Step* is everything
    from clearing the gradients to the step of the optimizers. *Head* is the head's forward pass, on the
    features that this batch gave, and its backward pass from a fixed gradient of the logits to these features
    and to the head's own parameters. The measurements of all heads take turns, so that whatever else happens
    on the machine meets each of them; the results are medians.
    """
    pairs = {run.head: _timed_pair(run, settings, data) for run in runs}
    times: dict[HeadName, list[list[float]]] = {head: [] for head in pairs}
    for _ in range(WARM_UPS + ROUNDS):
        for head, pair in pairs.items():
            times[head].append([1e3 * _elapsed(action, settings.torch_device) for action in pair])
    found = {}
    for head, rounds in times.items():
        whole, own = map(median, zip(*rounds[WARM_UPS:], strict=True))
        found[head] = {"ms_per_step": whole, "head_ms": own, "head_share": own / whole}
    return found


def _timed_pair(run: Trained, settings: Settings, data: ImageData) -> tuple[Callable[[], None], ...]:
    trainer = Trainer(run.head, run.seed, settings, data)
    trainer.model.load_state_dict(run.model.state_dict())
    trainer.model.train()
    images, targets = next(trainer.batches())
    head = copy.deepcopy(head_of(trainer.model))
    with capture_features(trainer.model, head_of(trainer.model)) as captured:
        trainer.update(images, targets)
    features = captured[0].detach().requires_grad_()
    inputs = (features, targets) if getattr(head, "accepts_targets", False) else (features,)

    def forward() -> Tensor:
        with autocast(settings):
            return head(*inputs)

    gradient = torch.randn_like(forward())

    def head_alone() -> None:
        features.grad = None
        head.zero_grad(set_to_none=True)
        forward().backward(gradient)

    return lambda: trainer.update(images, targets), head_alone


def _elapsed(action: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Memory:
    """Sizes of a model in training: numbers, and bytes as counted after one step."""

    label: str
    features: int
    parameters: int
    states: int
    activations: int

    @property
    def memory(self) -> int:
        return self.states + self.activations


def memory_report(settings: Settings, data: ImageData) -> list[Memory]:
    """Sizes with ``settings.feature_dim``, for each head, after those of a linear head at the default width.

    *States* are parameters, gradients, optimizer states and buffers. *Activations* are the tensors that
    autograd keeps between the forward and the backward pass of one batch, each storage counted once.
    """
    seed = settings.seeds[0]
    default = replace(settings, feature_dim=None, loss="ce")
    wanted: list[tuple[str, HeadName, Settings]] = [("linear (default)", "linear", default)]
    wanted += [(head, head, settings) for head in settings.head]
    return [_memory(label, Trainer(head, seed, own, data)) for label, head, own in wanted]


def memory_table(report: Sequence[Memory], batch_size: int) -> Table:
    """The sizes of :func:`memory_report`, and what is saved against its first row."""
    headings = ("features", "parameters", f"memory, batch of {batch_size}")
    table = make_table("What the number of features saves", ["head"], headings)
    table.caption = (
        "memory: parameters, gradients, optimizer states and activations kept for the backward pass"
    )
    table.caption_justify = "left"
    for size in report:
        cells = [f"{size.parameters:,}", f"{size.memory / 2**20:.1f} MiB"]
        for place, name in enumerate(("parameters", "memory")):
            change = getattr(size, name) / getattr(report[0], name) - 1
            cells[place] += f" ({change:+.1%})" if change else ""
        table.add_row(size.label, str(size.features), *cells)
    return table


def _memory(label: str, trainer: Trainer) -> Memory:
    images, targets = next(trainer.batches())
    trainer.model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in trainer.model.state_dict().values()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        trainer.update(images, targets)
    return Memory(
        label,
        head_of(trainer.model).in_features,
        sum(parameter.numel() for parameter in trainer.model.parameters()),
        _bytes_of(trainer.model, trainer.optimizers),
        sum(kept.values()),
    )


def _bytes_of(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    states = [state.values() for optimizer in optimizers for state in optimizer.state.values()]
    gradients = (parameter.grad for parameter in model.parameters())
    tensors = [*model.state_dict().values(), *gradients, *chain.from_iterable(states)]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
