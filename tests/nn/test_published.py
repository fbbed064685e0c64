"""The published nearest-ETF step, written out from the paper, against the head with its settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from etflayers import NearestETFHead
from etflayers.errors import InvalidArgumentError


def published_frame(class_means: Tensor, before: Tensor, delta: float) -> Tensor:
    """``W = sqrt(K) (U E)'`` with ``U = argmin |H - U E|^2 + delta/2 |U - P|^2`` over K orthonormal columns.

    Both terms are linear on the Stiefel manifold, up to ``|U E|^2 = 1``: U is the polar factor of
    ``2 H E + delta P``.
    """
    num_classes = len(class_means)
    etf = (torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes) / math.sqrt(num_classes - 1)
    centered = class_means - class_means.mean(0)
    left, _, right = torch.linalg.svd(
        2 * (centered / centered.norm()).mT @ etf + delta * before, full_matrices=False
    )
    return math.sqrt(num_classes) * (left @ right @ etf).mT


def first_step(size: tuple[int, int], delta: float, *, apart: bool = False) -> tuple[Tensor, Tensor]:
    """The published frame and that of the head; ``apart``: with no feature along what no frame shows, P 1."""
    num_classes, in_features = size
    generator = torch.Generator().manual_seed(0)
    before = torch.linalg.qr(
        torch.randn(in_features, num_classes, generator=generator, dtype=torch.float64)
    ).Q
    features = torch.randn(5 * num_classes, in_features, generator=generator, dtype=torch.float64)
    if apart:
        unseen = before.sum(1) / math.sqrt(num_classes)
        features = features - torch.outer(features @ unseen, unseen)
    targets = torch.arange(5 * num_classes) % num_classes
    inputs = features / features.norm(dim=-1, keepdim=True)
    class_means = torch.stack([inputs[targets == k].mean(0) for k in range(num_classes)])

    centering = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    start = math.sqrt(num_classes / (num_classes - 1)) * (before @ centering).mT
    head = NearestETFHead.published(in_features, num_classes, delta=delta, dtype=torch.float64)
    with torch.no_grad():
        head.vertices.copy_(start)
    head(features, targets)
    return published_frame(class_means, before, delta), head.frame


SIZES = [(3, 5), (10, 64), (100, 256)]


@pytest.mark.parametrize("size", SIZES)
def test_without_the_proximal_term_the_frames_are_equal(size: tuple[int, int]) -> None:
    published, ours = first_step(size, delta=0.0)
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("delta", [1e-3, 1e-1, 10.0])
def test_the_weight_of_the_proximal_term_is_converted(size: tuple[int, int], delta: float) -> None:
    """Where no feature has a part along P 1, that direction of U does not mix with the others."""
    published, ours = first_step(size, delta=delta, apart=True)
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_direction_that_no_frame_shows_is_the_difference(size: tuple[int, int]) -> None:
    """The figure of ``docs/moving/migration.md``, for the published weight."""
    published, ours = first_step(size, delta=1e-3)
    assert 1e-4 < float((ours - published).norm() / published.norm()) < 5e-3


def test_settings_can_be_changed() -> None:
    head = NearestETFHead.published(8, 4, temperature=2.0, center=True, momentum=0.5)
    assert (head.scale, head.averages.momentum, head.global_mean is not None) == (2.0, 0.5, True)
    assert head.proximity == pytest.approx(1.5e-3)
    with pytest.raises(InvalidArgumentError, match="delta must be a finite number >= 0, got -1"):
        NearestETFHead.published(8, 4, delta=-1.0)
