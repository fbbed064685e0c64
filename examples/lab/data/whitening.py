"""Whitening of pixels: what makes the directions in which images differ little count as much as others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lab.data.images import ImageData, Split


@dataclass(frozen=True)
class Whitening:
    """The linear map ``z = (S + r I)^(-1/2) (x - m)`` of p pixels and colors of mean m and covariance S.

    ZCA: of all maps that make the covariance the identity (at r = 0) the one that moves images least.
    ``r = ridge tr S / p`` keeps noise in directions without variance from growing (Lee et al. 2020, arXiv
    2007.15801; Nguyen et al. 2021, arXiv 2107.13034, with ridge 0.1).

    Attributes:
        mean: m, ``(p,)``, float64.
        matrix: ``(S + r I)^(-1/2)``, ``(p, p)``.
        inverse: of the matrix.
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, images: Tensor, ridge: float) -> Whitening:
        """The map of these images ``(N, C, H, W)``, which are those that are learned from."""
        rows = images.flatten(1).double()
        mean = rows.mean(0)
        rows = rows - mean
        covariance = rows.mT @ rows / len(rows)
        values, vectors = torch.linalg.eigh(covariance)
        roots = (values.clamp(min=0) + ridge * values.mean()).sqrt()
        return cls(mean, (vectors / roots) @ vectors.mT, (vectors * roots) @ vectors.mT)

    def __call__(self, images: Tensor) -> Tensor:
        """Whitened, in the shape and precision of the images."""
        rows = (images.flatten(1).double() - self.mean) @ self.matrix
        return rows.view(images.shape).to(images.dtype)

    def undone(self, images: Tensor) -> Tensor:
        """The images of whitened ones."""
        rows = images.flatten(1).double() @ self.inverse + self.mean
        return rows.view(images.shape).to(images.dtype)

    def of_data(self, data: ImageData) -> ImageData:
        """All splits whitened; what they are normalized by is left to :meth:`undone`: mean 0, deviation 1."""
        neutral = {"mean": torch.zeros_like(data.mean), "deviation": torch.full_like(data.deviation, 255)}
        return data.mapped(lambda split: Split(self(split.images), split.targets), **neutral)
