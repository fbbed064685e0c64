r"""A head of the same kind for more classes, whose first rows stay where they were as far as they can.

Symbols: K <-> old number of classes, N <-> num_classes, W <-> frame of the old head, V <-> that of the new.

**A simplex has to move.** The inner products of a simplex ETF are -1/(K-1), so that with more classes all of
them change, and no row can stay. As near as possible to the old rows is the frame that

    minimizes  sum_{k <= K} |w_k - v_k|^2 = 2 K - 2 <W, V_{1:K}>,

the nearest ETF to W with weight 0 for the new classes (``functional.nearest``). W has the singular value
sqrt(K / (K-1)) K - 1 times, so that the maximum of <W, V_{1:K}> is (K-1) times the product of both radii, and
by symmetry each row takes the same share of it:

    |w_k - v_k|^2 = 2 - 2 sqrt((K-1) N / (K (N-1)))  for each k.

From 60 classes to 100 that is a distance of 0.08, from 2 to any number it is up to 0.77. Nothing moves in a
head that was made for N classes at the start and is told by ``deactivate`` which of them are here.

**Rows that are independent of each other stay**: learned ones, directions of class means, and the words of a
code with a formula, of which the first are the same for any number (but for the simplex).
"""

from __future__ import annotations

import copy
from functools import singledispatch
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_size
from etflayers.errors import InvalidArgumentError
from etflayers.functional.nearest import nearest_etf
from etflayers.geometry import centered_basis_apply, etf_radius, require_etf_dims
from etflayers.nn.averages import FeatureMovingAverage
from etflayers.nn.base import CodeHead
from etflayers.nn.class_means import ClassMeanHead
from etflayers.nn.distributed import overwrite
from etflayers.nn.etf import ETFHead
from etflayers.nn.fixed import FixedETFHead
from etflayers.nn.fixed_code import FixedCodeHead
from etflayers.nn.learned import LearnedETFHead, on_manifold
from etflayers.nn.nearest import NearestETFHead
from etflayers.nn.nearest_code import NearestCodeHead
from etflayers.nn.sharded import ShardedHead
from etflayers.nn.unit_rows import UnitRowHead

__all__ = ["Movement", "expand_classes"]

Head = TypeVar("Head", bound=CodeHead)


class Movement(NamedTuple):
    """How far the rows of the old classes have moved on the unit sphere, by straight distance.

    Attributes:
        largest: of any row.
        mean: over the rows.
    """

    largest: float
    mean: float


@torch.no_grad()
def expand_classes(
    head: Head, num_classes: int, *, generator: torch.Generator | None = None
) -> tuple[Head, Movement]:
    r"""A head of the same kind for more classes, with the first rows as near to the old ones as can be.

    The new head has the options of the old one and what it has learned: class means and counts, rows, scale.
    New classes are active and have not been seen. The old head stays as it is. Parameters are new tensors:
    make the optimizer anew, and wrap the model (``DistributedDataParallel``) afterwards.

    If the number of all classes that will ever come is known, make the head for all of them at the start and
    ``deactivate`` those to come: then no row ever moves.

    Args:
        head: K classes; any head of this library with independent rows or a simplex ETF.
        num_classes: N > K, for a simplex at most d + 1.
        generator: random numbers of new rows that are drawn; under ``torch.distributed`` all ranks call
            this, and get the rows of the first one.

    Returns:
        The head for N classes, and how far the rows of the K old ones have moved.

    Raises:
        InvalidArgumentError: not more classes than before, more than a simplex has room for, or a head that
            cannot grow.

    Reference:
        Yang, Yuan, Li, Lin, Torr, Tao (2023), arXiv 2302.03004, who reserve the frame instead.

    >>> from etflayers.nn import UnitRowHead
    >>> head, moved = expand_classes(FixedETFHead(in_features=128, num_classes=60), 100)
    >>> head.num_classes, round(moved.largest, 4)
    (100, 0.0821)
    >>> expand_classes(UnitRowHead(in_features=8, num_classes=60), 100)[1]
    Movement(largest=0.0, mean=0.0)
    """
    require_size("num_classes", num_classes)
    require(
        num_classes > head.num_classes,
        f"num_classes must be more than the {head.num_classes} classes of the head, got {num_classes}: "
        "head.deactivate(classes) leaves some out",
    )
    require(
        not isinstance(head, ShardedHead), "head is divided among ranks: expand it before parallelize_module"
    )
    if isinstance(head, ETFHead):
        require_etf_dims(num_classes, head.in_features)
    before = head.frame.double()
    grown = copy.deepcopy(head)
    _grow(grown, num_classes, generator)
    grown.num_classes = num_classes
    if grown.active is not None:
        grown._buffers["active"] = _taller(grown.active, num_classes, 1)
        grown.activate([])  # which counts them
    distances = torch.linalg.vector_norm(grown.frame[: len(before)].double() - before, dim=-1)
    return grown, Movement(float(distances.max()), float(distances.mean()))


@singledispatch
def _grow(head: CodeHead, num_classes: int, generator: torch.Generator | None) -> None:
    """Give a copy of a head what N classes need, all but the number itself."""
    raise _cannot_grow(head)


@_grow.register
def _(head: FixedETFHead, num_classes: int, generator: torch.Generator | None) -> None:
    if head.canonical and head.in_features >= num_classes:
        return  # c (I - 11'/N) is one of the frames nearest to c (I - 11'/K)
    frame = _nearest_to(head.frame, num_classes)
    if head.canonical:  # for d = N - 1 it is a reflection, and another frame is nearer
        head.rotation, head._like = "given", None
    head.vertices = frame
    head.trust(frame)


@_grow.register
def _(head: LearnedETFHead, num_classes: int, generator: torch.Generator | None) -> None:
    frame = _nearest_to(head.frame, num_classes)
    if head.manifold is None:
        head.prototypes = nn.Parameter(frame, head.prototypes.requires_grad)
        return
    rotation = (centered_basis_apply(frame) / etf_radius(num_classes)).mT.contiguous()
    head.rotation = on_manifold(rotation, requires_grad=head.rotation.requires_grad)


@_grow.register
def _(head: NearestETFHead, num_classes: int, generator: torch.Generator | None) -> None:
    _grow_averages(head.averages, num_classes)
    head.vertices = _nearest_to(head.frame, num_classes)
    head.trust(head.vertices)
    if head.anchor is not None:
        head.anchor = _nearest_to(head.anchor, num_classes)
    if head.class_weights is not None:
        head.class_weights = _taller(head.class_weights, num_classes, 1)
    # What reset_parameters goes back to.
    if head._given_anchor is not None:
        head._given_anchor = _nearest_to(head._given_anchor, num_classes)
    if head._given_weights is not None:
        head._given_weights = _taller(head._given_weights, num_classes, 1)


@_grow.register
def _(head: NearestCodeHead, num_classes: int, generator: torch.Generator | None) -> None:
    # Rows of class means, and a code with as many words as there are classes.
    raise _cannot_grow(head)


@_grow.register
def _(head: ClassMeanHead, num_classes: int, generator: torch.Generator | None) -> None:
    _grow_averages(head.averages, num_classes)
    rows = _drawn(ClassMeanHead, head.initial_rows, num_classes, generator).initial_rows
    head.initial_rows = torch.cat((head.initial_rows, rows[head.num_classes :]))


@_grow.register
def _(head: UnitRowHead, num_classes: int, generator: torch.Generator | None) -> None:
    new = _drawn(UnitRowHead, head.prototypes, num_classes, generator).prototypes
    rows = torch.cat((head.prototypes, new[head.num_classes :]))
    head.prototypes = nn.Parameter(rows, head.prototypes.requires_grad)


@_grow.register
def _(head: FixedCodeHead, num_classes: int, generator: torch.Generator | None) -> None:
    code = head.code
    if code is None:
        raise InvalidArgumentError(
            "head has a code that is stored as a matrix, which has no more words: make the head for all "
            "classes that will come, and head.deactivate(classes) for those that are not here yet"
        )
    head._given = type(code)(num_classes, head.in_features)


def _cannot_grow(head: CodeHead) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"head must be one that can grow, got {type(head).__name__}: make one for all classes that will "
        "come, and head.deactivate(classes) for those that are not here yet"
    )


def _nearest_to(frame: Tensor, num_classes: int) -> Tensor:
    """V, ``(N, d)``, in the dtype of W."""
    weights = frame.new_zeros(num_classes, dtype=torch.float64)
    weights[: len(frame)] = 1
    return nearest_etf(_taller(frame.detach().double(), num_classes), weights=weights).to(frame.dtype)


def _taller(rows: Tensor, num_classes: int, value: int = 0) -> Tensor:
    """N rows, of which the first are given and the others hold ``value``."""
    return torch.cat((rows, rows.new_full((num_classes - len(rows), *rows.shape[1:]), value)))


def _grow_averages(averages: FeatureMovingAverage, num_classes: int) -> None:
    averages.num_classes = num_classes
    for name in ("means", "counts", "updates"):
        setattr(averages, name, _taller(getattr(averages, name), num_classes))


Drawn = TypeVar("Drawn", ClassMeanHead, UnitRowHead)


def _drawn(kind: type[Drawn], like: Tensor, num_classes: int, generator: torch.Generator | None) -> Drawn:
    """A fresh head for N classes, where and as precise as the rows ``(K, d)`` are; the same on all ranks."""
    fresh: Drawn = kind(like.shape[1], num_classes, generator=generator, device=like.device, dtype=like.dtype)
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        overwrite(tensor, tensor.detach())
    return fresh
