"""A training seen in three dimensions: what is kept of it from epoch to epoch, and the projection.

A simplex ETF W* with rows of length 1 has the Gram matrix ``W* W*' = c^2 (I - 11'/K)`` with
``c^2 = K / (K - 1)``. Let the columns of V, ``(K, r)``, be orthonormal and orthogonal to 1. Then those of

    B = W*' V / c,   (d, r),   are orthonormal:   B' B = V' (I - 11'/K) V = V' V = I,

and they lie in the span of W*. So ``h -> B'(h - m)`` is the orthogonal projection onto r of the K - 1
dimensions that W* spans, and the vertices of W* come to rest at ``W* B = c V``, whatever W* is.

Class means less their mean m lie in K - 1 dimensions, which their nearest simplex ETF spans too. With
K <= 4 classes ``r = K - 1``: nothing is lost of the class means, and W* may be another one at every epoch,
which turns each picture such that the nearest ETF is always the same tetrahedron. With more classes
something is lost, and B comes from the last class means for all epochs, so that what moves in the picture
has moved.

V is made of cosines and sines over the classes. It gives the regular tetrahedron for K = 4, the octahedron
for K = 6 and two rings of classes, one above the other, for every even K; with odd K the rings are bent.

Symbols: K <-> num_classes, V <-> class_coordinates, B <-> basis, W* <-> nearest, m <-> center.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etflayers.checks import require
from etflayers.functional import nearest_etf
from etflayers.metrics import ClassStatistics

DIMENSIONS = 3
MOST_FEATURES = 100  # of all classes together: more would hide each other, and make the file large
MOST_EPOCHS = 60

Moment = dict[str, Any]  # the ``epoch``, and tensors on the CPU: see :func:`moment_of`


def is_kept(epoch: int, epochs: int) -> bool:
    """Whether this one of so many epochs is recorded: all, or every n-th of a long training, and the last."""
    return epoch == epochs or epoch % math.ceil(epochs / MOST_EPOCHS) == 0


def moment_of(
    epoch: int, statistics: ClassStatistics, frame: Tensor, features: Tensor, targets: Tensor
) -> Moment:
    """What there is to keep of an epoch: few enough numbers to be kept for all of them.

    Args:
        epoch: its number.
        statistics: of all samples: class means ``(K, d)`` and the variances about them ``(K,)``.
        frame: rows of the classifier ``(K, d)``.
        features: h, ``(N, d)``, always of the same samples; the first ones of every class are kept.
        targets: y, ``(N,)``.
    """
    num_classes = len(statistics.means)
    each = max(1, MOST_FEATURES // num_classes)
    first = [(targets == k).nonzero()[:each, 0] for k in range(min(num_classes, MOST_FEATURES))]
    chosen = torch.cat(first)
    kept = {"means": statistics.means, "variances": statistics.variances}
    kept |= {"frame": frame, "features": features[chosen]}
    tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in kept.items()}
    return {"epoch": epoch, **tensors, "targets": targets[chosen].cpu()}


def class_coordinates(num_classes: int) -> Tensor:
    """V, ``(K, min(3, K - 1))``: orthonormal columns that sum to zero, in float64."""
    angles = 2 * math.pi * torch.arange(num_classes, dtype=torch.float64) / num_classes
    waves = [angles.cos(), angles.sin(), (num_classes // 2 * angles).cos()]
    columns = torch.stack(waves[: min(DIMENSIONS, num_classes - 1)], 1)
    return columns / columns.norm(dim=0)


def is_exact(num_classes: int) -> bool:
    """Whether three dimensions hold all that the class means span."""
    return num_classes - 1 <= DIMENSIONS


@dataclass(frozen=True)
class Picture:
    """A moment in three dimensions. The class means have a root mean square length of 1 in all d dimensions.

    Attributes:
        epoch: its number.
        means, frame, features: points ``(K, 3)``, ``(K, 3)`` and ``(M, 3)``, magnified such that the vertices
            of an ETF have a root mean square length of 1 in the picture.
        shares: how much of the sum of squares is seen of the means about their mean, of the features about
            the mean of their class, and of the rows of the frame about their mean: numbers in [0, 1].
        distances: of each class mean from its vertex of the nearest ETF, ``(K,)``, in all d dimensions.
        cosines: of each row of the frame with its class mean, both centered, ``(K,)``.
        spreads: root mean square distance of all features of a class from their mean, ``(K,)``.
    """

    epoch: int
    means: Tensor
    frame: Tensor
    features: Tensor
    shares: tuple[float, float, float]
    distances: Tensor
    cosines: Tensor
    spreads: Tensor


def corners(num_classes: int) -> Tensor:
    """Where the vertices of the nearest ETF stand in every picture, ``(K, 3)``."""
    return (
        _magnification(num_classes)
        * math.sqrt(num_classes / (num_classes - 1))
        * _in_space(class_coordinates(num_classes))
    )


def pictures(recording: Sequence[Moment]) -> list[Picture]:
    """The moments of a training, projected.

    Raises:
        InvalidArgumentError: no moment, or fewer features d than the K - 1 that an ETF of K classes needs.
    """
    require(len(recording) > 0, "recording must hold at least one epoch")
    num_classes, dim = recording[0]["means"].shape
    require_room(num_classes, dim)
    last = nearest_etf(recording[-1]["means"].double())
    own = is_exact(num_classes)
    return [_picture(now, nearest_etf(now["means"].double()) if own else last) for now in recording]


def require_room(num_classes: int, dim: int) -> None:
    """Raise unless K classes can form a simplex ETF in d dimensions, which the pictures show them against."""
    require(
        dim >= num_classes - 1 >= 1,
        "the explorer shows class means beside a simplex ETF, which needs at least 2 classes and K - 1 "
        f"features: got {num_classes} classes and {dim} features",
    )


def _picture(now: Moment, nearest: Tensor) -> Picture:
    num_classes = len(nearest)
    c = math.sqrt(num_classes / (num_classes - 1))
    basis = nearest.mT @ class_coordinates(num_classes) / c
    means, center = _centered(now["means"].double())
    frame, _ = _centered(now["frame"].double())
    features, targets = now["features"].double() - center, now["targets"]
    within = features - means[targets]
    unit, unit_of_frame = _inverse_length(means), _inverse_length(frame)

    def seen(rows: Tensor, scale: float) -> Tensor:
        return _in_space(_magnification(num_classes) * scale * rows @ basis)

    return Picture(
        epoch=int(now["epoch"]),
        means=seen(means, unit),
        frame=seen(frame, unit_of_frame),
        features=seen(features, unit),
        shares=(_share(means, basis), _share(within, basis), _share(frame, basis)),
        distances=(unit * means - nearest).norm(dim=1),
        cosines=torch.nn.functional.cosine_similarity(means, frame, dim=1),
        spreads=unit * now["variances"].double().sqrt(),
    )


def _magnification(num_classes: int) -> float:
    """1 where nothing is lost; else the share of an ETF's squares that is seen, 3 / (K - 1), is undone."""
    return math.sqrt((num_classes - 1) / min(DIMENSIONS, num_classes - 1))


def _centered(rows: Tensor) -> tuple[Tensor, Tensor]:
    center = rows.mean(0)
    return rows - center, center


def _inverse_length(rows: Tensor) -> float:
    """One over the root mean square length; 0 of rows that are all zero, which stay where they are."""
    length = float(rows.square().sum(1).mean().sqrt())
    return 1 / length if length > 0 else 0.0


def _share(rows: Tensor, basis: Tensor) -> float:
    """Of the sum of squares, what lies in the span of the basis; 1 if there is nothing."""
    whole = float(rows.square().sum())
    return min(1.0, float((rows @ basis).square().sum()) / whole) if whole > 0 else 1.0


def _in_space(points: Tensor) -> Tensor:
    """Points of fewer dimensions in three."""
    return torch.nn.functional.pad(points, (0, DIMENSIONS - points.shape[1]))
