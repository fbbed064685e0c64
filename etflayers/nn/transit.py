r"""The head whose targets travel: from where the features of a new class are to where they have to go.

Symbols: W <-> vertices, P <-> origins, t <-> progress.

A reserved direction is assigned to a new class before anything is known about it, and the features of the
class may lie far from it. Pulled there at once they drag the features of all other classes along. So the
target starts at the direction p_k of the class mean, where the features are, and goes to the vertex w_k along
the shortest path, the great circle through both, on which

    (1 - t) p_k + t w_k,   divided by its length,   0 <= t <= 1,

is a point. There is no shortest path between opposite points, nor from a mean that is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etflayers.checks import require, require_finite, require_floating, require_number
from etflayers.codes import DenseCode
from etflayers.functional.logits import directions
from etflayers.nn.base import CodeHead, class_numbers
from etflayers.nn.distributed import overwrite
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import working_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TransitHead"]

# Smallest 1 + cos between the ends of a path: its middle is then 7e-4 long, well above rounding.
_OPPOSITE = 1e-6


class TransitHead(KeepsPrecision, CodeHead):
    r"""Classifier with rows on the way from class means to vertices: ``w_k(t) ~ (1 - t) p_k + t w_k``.

    The rows are divided by their lengths. All classes are at their vertices at first. :meth:`depart` puts new
    ones where their features are, and :meth:`transit`, called once an epoch or a step, moves them on. At
    t = 1 they have arrived, and stay. Between two calls W is a constant: the head has no parameters.

    .. code-block:: python

        head.activate(new).depart(new, means)
        for epoch in range(epochs):
            head.transit((epoch + 1) / epochs)
            train_one_epoch(model)

    Args:
        vertices: W, ``(K, d)``, unit rows, where the classes are to go: ``FixedETFHead(d, K).frame`` or the
            words of any code; copied.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.
        device: of the buffers; default that of the vertices.
        dtype: of the buffers: float32 (also where a half precision is asked for) or float64; default that of
            the vertices. ``half()`` and ``bfloat16()`` leave it.

    Attributes:
        vertices: W, ``(K, d)``.
        origins: P, ``(K, d)``, unit rows; those of classes that have never departed are their vertices.
        progress: t of each class, ``(K,)``, in [0, 1].

    Raises:
        InvalidArgumentError: vertices that are no unit rows, or a scale that is not positive.

    Reference:
        Yang, Yuan, Li, Wu, Zhang, Lin, Torr, Tao, Ghanem (2023), arXiv 2308.01746.

    >>> head = TransitHead(torch.eye(2)).depart([1], torch.tensor([[5.0, 5.0]]))
    >>> [round(float(head.transit(t).frame[1, 0]), 3) for t in (0.0, 0.5, 1.0)]
    [0.707, 0.383, 0.0]
    """

    vertices: Tensor
    origins: Tensor
    progress: Tensor

    def __init__(
        self,
        vertices: Tensor,
        *,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(
            isinstance(vertices, Tensor) and vertices.ndim == 2,
            f"vertices must be a matrix (num_classes, in_features), got {_shape(vertices)}",
        )
        super().__init__(vertices.shape[1], vertices.shape[0], scale=scale, normalize=normalize)
        require(not vertices.is_meta, "vertices must have values, and are on the meta device")
        require_floating("vertices", vertices.dtype)
        dtype = vertices.dtype if dtype is None else dtype
        require_floating("dtype", dtype)
        # What `to_empty` takes from the buffer and no random number can give back; it checks the rows.
        self._given = DenseCode(vertices)
        rows = vertices.detach().to(device, working_dtype(dtype), copy=True)
        self.register_buffer("vertices", rows)
        self.register_buffer("origins", rows.clone())
        self.register_buffer("progress", rows.new_ones(len(rows)))

    @property
    def frame(self) -> Tensor:
        """W(t), ``(K, d)``, unit rows."""
        share = self.progress.unsqueeze(-1)
        path = directions(torch.lerp(self.origins, self.vertices, share))
        return torch.where(share < 1, path, self.vertices)

    @torch.no_grad()
    def depart(self, classes: Iterable[int] | Tensor, means: Tensor) -> Self:
        """Put classes where their features are, at t = 0. Under ``torch.distributed`` all ranks call it.

        Args:
            classes: their numbers in [0, K), n of them.
            means: of the features of each, ``(n, d)``; only their directions count. A
                :class:`~etflayers.nn.FeatureMemory` has them, ``memory.means_of(classes)[0]``.

        Returns:
            The head.

        Raises:
            InvalidArgumentError: no numbers of classes, one of them twice, means of another shape, or a mean
                from which there is no shortest path: zero, or opposite to its vertex.
            NonFiniteError: NaN or infinity in the means.
        """
        index = class_numbers(classes, self.num_classes).to(self.origins.device)
        require(len(set(index.tolist())) == len(index), f"classes must differ, got {index.tolist()}")
        require(
            isinstance(means, Tensor) and means.shape == (len(index), self.in_features),
            f"means must have shape (len(classes), in_features) = ({len(index)}, {self.in_features}), "
            f"got {_shape(means)}",
        )
        require_floating("means", means.dtype)
        require_finite(means.cpu(), "means must be finite: look for what has overflowed in the features")
        starts = directions(means.detach().to(self.origins))
        cosines = (starts * self.vertices[index]).sum(-1)
        lost = index[((starts == 0).all(-1)) | (1 + cosines < _OPPOSITE)].tolist()
        require(
            not lost,
            f"means must have a shortest path to their vertices; those of the classes {lost} are zero, or "
            "opposite to the vertex: let these classes start at their vertices",
        )
        self.origins[index] = starts
        self.progress[index] = 0
        return self

    @torch.no_grad()
    def transit(self, t: float) -> Self:
        """Move all classes that are under way to the share t of their paths; those at 1 have arrived.

        Args:
            t: in [0, 1].

        Returns:
            The head.

        Raises:
            InvalidArgumentError: a t out of range.
        """
        require_number("t", t)
        require(t <= 1, f"t must be in [0, 1], the share of the path, got {t}")
        self.progress.copy_(torch.where(self.progress < 1, float(t), self.progress))
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """All classes are at their vertices, and here.

        Under ``torch.distributed`` all ranks call it.
        """
        super().reset_parameters()
        overwrite(self.vertices, self._given.dense(dtype=self.vertices.dtype).to(self.vertices.device))
        self.origins.copy_(self.vertices)
        self.progress.fill_(1)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
