"""Each head, end to end on the digits of scikit-learn, learns to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.nn import DotRegressionLoss, FixedETFHead

if TYPE_CHECKING:
    from tests.nn.conftest import MakeHead

EPOCHS = 10
BATCH = 64


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    datasets: Any = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]


def accuracy_after_training(
    head: nn.Module, criterion: Any, digits: tuple[Tensor, Tensor], width: int
) -> float:
    geoopt: Any = pytest.importorskip("geoopt")
    images, labels = digits
    train, test = slice(0, 1200), slice(1200, None)
    backbone = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, width))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = geoopt.optim.RiemannianAdam(parameters, lr=5e-3)
    for _ in range(EPOCHS):
        order = torch.randperm(1200)
        for start in range(0, 1200, BATCH):
            index = order[start : start + BATCH]
            loss = criterion(head(backbone(images[train][index]), labels[train][index]), labels[train][index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    head.eval()
    with torch.no_grad():
        # One sample at a time is enough for a head whose eval pass does not look at the batch.
        predictions = torch.cat([head(backbone(image.unsqueeze(0))) for image in images[test]]).argmax(-1)
    return float((predictions == labels[test]).float().mean())


@pytest.mark.parametrize("width", [9, 32])
def test_every_head_learns_to_read_digits(
    make_head: MakeHead, digits: tuple[Tensor, Tensor], width: int
) -> None:
    head = make_head(width, 10, scale=10.0, normalize=True)
    assert accuracy_after_training(head, F.cross_entropy, digits, width) > 0.9


def test_the_dot_regression_loss_learns_to_read_digits(digits: tuple[Tensor, Tensor]) -> None:
    head = FixedETFHead(32, 10, normalize=True)
    assert accuracy_after_training(head, DotRegressionLoss(), digits, width=32) > 0.9
