"""The head whose frame is a constant."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from etflayers.checks import require, require_floating
from etflayers.functional.logits import canonical_etf_logits
from etflayers.geometry import simplex_etf
from etflayers.nn.distributed import overwrite
from etflayers.nn.etf import ETFHead
from etflayers.precision import full_precision, linear_dtype, working_dtype

__all__ = ["FixedETFHead"]


class FixedETFHead(ETFHead):
    r"""Classifier with a constant simplex-ETF weight: ``logits = s z W'``.

    It has no parameter: only the features learn. Which of all the equally good frames it takes is
    ``rotation``:

    - The **canonical** frame ``c (I - 11'/K)`` needs no weight matrix: a slice, a mean and a scale, O(K) a
      sample. It reads the first K features and no other. For d = K - 1 it is ``c E'``, a Householder
      reflection of the features. With d > K the features beyond the K-th have no influence on the logits and
      get no gradient from them: put a linear layer of width K in front, or take ``"haar"``.
    - A **Haar** frame, uniformly distributed over all rotations, is a buffer. Every feature takes part.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        rotation: ``"auto"``: canonical for d = K - 1 and d = K, where it uses every feature, otherwise Haar;
            ``"canonical"``; ``"haar"``; or Q in St(d, K-1), ``(d, K-1)``, for the frame ``c E'Q'``.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.
        generator: random numbers of the Haar rotation.
        device: of the frame.
        dtype: of the frame.

    Attributes:
        vertices: W, ``(K, d)``, a buffer; ``None`` for the canonical frame.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1, a scale that is not positive, an unknown rotation.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081; Pernici et al. (2019), arXiv 1902.10441.

    >>> head = FixedETFHead(in_features=4, num_classes=3, rotation="canonical", scale=2.0)
    >>> head(torch.tensor([[3.0, 0.0, 0.0, 7.0]]))
    tensor([[ 4.8990, -2.4495, -2.4495]])
    """

    vertices: Tensor | None
    # One number that remembers, for `frame`, where a module without a matrix is and in which precision.
    _like: Tensor | None
    renamed_state: ClassVar = {"frame": "vertices"}

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        rotation: Literal["auto", "canonical", "haar"] | Tensor = "auto",
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        if isinstance(rotation, str) and rotation == "auto":
            rotation = "canonical" if in_features <= num_classes else "haar"
        require(
            isinstance(rotation, Tensor) or rotation in ("canonical", "haar"),
            f"rotation must be 'auto', 'canonical', 'haar' or a tensor, got {rotation!r}",
        )
        self.rotation = rotation if isinstance(rotation, str) else "given"
        vertices = like = None
        if self.canonical:
            dtype = torch.get_default_dtype() if dtype is None else dtype
            require_floating("dtype", dtype)
            like = torch.ones((), device=device, dtype=dtype)
        else:
            vertices = simplex_etf(
                num_classes, in_features, rotation=rotation, generator=generator, device=device, dtype=dtype
            )
        self.register_buffer("vertices", vertices)
        self.register_buffer("_like", like, persistent=False)
        if vertices is not None:
            self.trust(vertices)

    @property
    def canonical(self) -> bool:
        """Whether W is the canonical frame, whose logits need no matrix."""
        return self.rotation == "canonical"

    @property
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows; the canonical one is made on demand."""
        if self.vertices is not None:
            return self.trusted(self.vertices)
        assert self._like is not None
        return simplex_etf(
            self.num_classes, self.in_features, device=self._like.device, dtype=self._like.dtype
        )

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch: see :meth:`CodeHead.forward`."""
        if not self.canonical:
            return super().forward(features, targets)
        inputs = self.inputs(features)
        with full_precision(inputs):
            inputs = inputs.to(working_dtype(inputs.dtype))
            if isinstance(self.scale, Tensor):
                logits = self.scale * canonical_etf_logits(inputs, self.num_classes)
            else:
                logits = canonical_etf_logits(inputs, self.num_classes, scale=self.scale)
        return self.of_active(logits, targets).to(linear_dtype(features))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a Haar frame anew from PyTorch's global generator; keep any other.

        Under ``torch.distributed`` all ranks call it, and get the frame that the first one draws.

        Raises:
            ManifoldError: the frame of a rotation that was given has been lost (by ``to_empty``).
        """
        super().reset_parameters()
        if self.vertices is None:
            return
        if self.rotation == "given":
            self._trusted = None
            self.trusted(self.vertices)
            return
        frame = simplex_etf(
            self.num_classes,
            self.in_features,
            rotation="haar",
            device=self.vertices.device,
            dtype=self.vertices.dtype,
        )
        overwrite(self.vertices, frame)
        self.trust(self.vertices)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, rotation={self.rotation!r}"
