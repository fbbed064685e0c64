"""``python -m etflayers.demo``: one small network with four classifiers, and how far each collapses.

It needs PyTorch alone, and learns scikit-learn's images of digits where that is installed. Larger examples
are in the repository: ``git clone https://github.com/etflayers/etflayers``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_module, require_size
from etflayers.errors import EtfLayersError, MissingDependencyError
from etflayers.metrics import class_statistics, classifier_inputs, collapse_measures
from etflayers.nn import FixedETFHead, NearestETFHead, UnitRowHead, provide_targets

__all__ = ["HEADS", "Problem", "Result", "digits", "gaussians", "main", "measure", "perceptron", "train"]

NUM_CLASSES, FEATURES, SCALE, TRAIN_SHARE, BATCH = 10, 64, 5.0, 0.8, 128

# Features of length 1 leave the classes only directions to differ by, and those collapse further.
HEADS: dict[str, Callable[[], nn.Module]] = {
    "nn.Linear": lambda: nn.Linear(FEATURES, NUM_CLASSES),
    "UnitRowHead": lambda: UnitRowHead(FEATURES, NUM_CLASSES, normalize=True, scale=SCALE),
    "NearestETFHead": lambda: NearestETFHead(FEATURES, NUM_CLASSES, normalize=True, scale=SCALE),
    "FixedETFHead": lambda: FixedETFHead(FEATURES, NUM_CLASSES, normalize=True, scale=SCALE),
}


class Problem(NamedTuple):
    """Samples of ten classes; the first ``train_size`` are to be learned from, the others test.

    Attributes:
        name: what they are.
        inputs: ``(N, p)``.
        targets: ``(N,)``, their classes.
        train_size: between 1 and N - 1.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    train_size: int

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets to learn from."""
        return self.inputs[: self.train_size], self.targets[: self.train_size]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets never learned from."""
        return self.inputs[self.train_size :], self.targets[self.train_size :]


class Result(NamedTuple):
    """What became of a network.

    Attributes:
        train_accuracy: share of the training samples that it gets right.
        test_accuracy: share of the others.
        nc1: variance of the training features within classes over that between classes, tr S_W / tr S_B.
        nc2: mean over pairs of classes of ``|cos + 1/(K-1)|`` of the centered class means.
    """

    train_accuracy: float
    test_accuracy: float
    nc1: float
    nc2: float


def digits(seed: int = 0) -> Problem:
    """1,797 images of handwritten digits, 8 by 8 pixels, which scikit-learn brings along.

    Args:
        seed: of the split.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    bunch = require_module("sklearn.datasets", extra="distill").load_digits()
    inputs = torch.from_numpy(bunch.data).float() / 16
    return _shuffled("images of digits", inputs, torch.from_numpy(bunch.target).long(), seed)


def gaussians(seed: int = 0, per_class: int = 180) -> Problem:
    """Ten Gaussian classes in 64 dimensions, of which two percent lie nearer to the mean of another class.

    Args:
        seed: of the class means, the samples and the split.
        per_class: number of samples of each class.
    """
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(NUM_CLASSES, 64, generator=generator) / 2
    targets = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    inputs = means[targets] + torch.randn(len(targets), 64, generator=generator)
    return _shuffled("samples of Gaussian classes", inputs, targets, seed)


def _shuffled(name: str, inputs: Tensor, targets: Tensor, seed: int) -> Problem:
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    return Problem(name, inputs[order], targets[order], int(TRAIN_SHARE * len(targets)))


def perceptron(head: nn.Module, in_features: int) -> nn.Sequential:
    """Two hidden layers, whose output goes to ``head``."""
    layers: list[nn.Module] = []
    for width_in, width_out in ((in_features, 2 * FEATURES), (2 * FEATURES, FEATURES)):
        layers += [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU()]
    return nn.Sequential(*layers, head)


def train(model: nn.Sequential, problem: Problem, epochs: int) -> None:
    """Train by SGD with momentum on the cross-entropy; the step size goes up and down in one cycle."""
    inputs, targets = problem.train
    steps = epochs * -(-len(targets) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    takes_targets = getattr(model[-1], "accepts_targets", False)
    model.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(targets)), BATCH):
            # All that a training loop has to do for a head whose frame follows the class means.
            with provide_targets(model, targets[batch]) if takes_targets else nullcontext():
                logits = model(inputs[batch])
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(logits, targets[batch]))
            optimizer.step()
            schedule.step()


@torch.no_grad()
def measure(model: nn.Sequential, problem: Problem) -> Result:
    """Accuracies, and neural collapse of what the classifier is given of the training samples."""
    model.eval()
    inputs, targets = problem.train
    features = classifier_inputs(model[-1], model[:-1](inputs))
    measures = collapse_measures(class_statistics(features, targets, NUM_CLASSES))
    train_accuracy, test_accuracy = (
        (model(x).argmax(-1) == y).double().mean().item() for x, y in (problem.train, problem.test)
    )
    return Result(
        train_accuracy,
        test_accuracy,
        nc1=measures["nc1_quotient"].item(),
        nc2=measures["nc2_equiangularity_mean_means"].item(),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train the network with each head and print a table.

    Args:
        argv: the arguments of the command line; default those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m etflayers.demo", description=__doc__)
    parser.add_argument("--data", choices=("auto", "digits", "gaussians"), default="auto")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        require_size("--epochs", options.epochs)
        require(options.seed >= 0, f"--seed must be at least 0, got {options.seed}")
        problem = _problem(options.data, options.seed)
    except EtfLayersError as error:
        parser.error(str(error))
    print(
        f"{problem.train_size} {problem.name} to train, {len(problem.targets) - problem.train_size} to test\n"
        f"a perceptron with {FEATURES} features, {options.epochs} epochs with each head\n\n"
        f"{'head':16}{'train':>9}{'test':>9}{'NC1':>9}{'NC2':>9}{'seconds':>10}"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, threads would spend the time waiting for each other
    try:
        for name in HEADS:
            _print_row(name, problem, options.epochs, options.seed)
    finally:
        torch.set_num_threads(threads)
    print(_EXPLANATION)


def _print_row(name: str, problem: Problem, epochs: int, seed: int) -> None:
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = perceptron(HEADS[name](), problem.inputs.shape[1])
        train(model, problem, epochs)
    result = measure(model, problem)
    print(
        f"{name:16}{result.train_accuracy:9.1%}{result.test_accuracy:9.1%}{result.nc1:9.4f}"
        f"{result.nc2:9.4f}{time.perf_counter() - start:10.1f}",
        flush=True,
    )


_EXPLANATION = f"""
NC1: variance of the features within classes, over that between classes.
NC2: how far the angles between class means are from those of a simplex ETF.
Both are 0 at neural collapse. The heads of etflayers are given features of length 1, with
scale={SCALE:g}; UnitRowHead shows how much of the difference that alone makes. On balanced
classes such as these the accuracy does not tell the heads apart.

Larger examples, on images:
    git clone https://github.com/etflayers/etflayers && cd etflayers && make demo"""


def _problem(data: str, seed: int) -> Problem:
    if data == "gaussians":
        return gaussians(seed)
    try:
        return digits(seed)
    except MissingDependencyError:
        if data == "digits":
            raise
        print("(scikit-learn, which has images of digits, could not be imported: Gaussian classes instead)")
        return gaussians(seed)


if __name__ == "__main__":
    main()
