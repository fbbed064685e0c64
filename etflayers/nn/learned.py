"""The head whose rotation is learned on the Stiefel manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from etflayers._torch import is_concrete, version
from etflayers.checks import require, require_floating, require_module, require_values
from etflayers.errors import ManifoldError
from etflayers.geometry import centered_basis_adjoint, etf_radius, random_stiefel, require_rotation
from etflayers.geometry.tolerance import default_atol
from etflayers.nn.averages import keep_precision
from etflayers.nn.heads import ETFHead
from etflayers.precision import full_precision, working_dtype

__all__ = ["LearnedETFHead"]


class LearnedETFHead(ETFHead):
    r"""Classifier whose weight is a learned simplex ETF: ``logits = s z W'``, ``W = c E'Q'``, Q'Q = I.

    The parameter ``rotation`` is Q, a geoopt ``ManifoldParameter`` with the Euclidean metric. A Riemannian
    optimizer keeps it on the manifold (and treats all other parameters of the model like the ordinary
    optimizer of that name); a step of an ordinary optimizer leaves it, which the next forward pass notices.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        scale: s > 0, multiplies the logits (inverse temperature).
        normalize: whether to divide each feature vector by its length.
        rotation: where Q starts: ``"haar"`` (uniformly random) or a matrix ``(d, K-1)`` with orthonormal
            columns.
        generator: random numbers of the Haar rotation.
        device: of the parameter.
        dtype: of the parameter: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1, a scale that is not positive, a rotation that is not in St(d,
            K-1).
        MissingDependencyError: geoopt is not installed.

    >>> import geoopt
    >>> head = LearnedETFHead(in_features=8, num_classes=3)
    >>> optimizer = geoopt.optim.RiemannianAdam(head.parameters(), lr=1e-2)
    >>> loss = nn.functional.cross_entropy(head(torch.ones(1, 8)), torch.tensor([0]))
    >>> loss.backward()
    >>> optimizer.step()
    >>> bool(nn.functional.cross_entropy(head(torch.ones(1, 8)), torch.tensor([0])) < loss)
    True
    """

    rotation: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 1.0,
        normalize: bool = False,
        rotation: Literal["haar"] | Tensor = "haar",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        geoopt = require_module("geoopt", extra="solvers")
        rank = num_classes - 1
        if isinstance(rotation, Tensor):
            require_floating("rotation", rotation.dtype)
            dtype = working_dtype(rotation.dtype if dtype is None else dtype)
            start = rotation.detach().to(device, dtype, copy=True)
            require_rotation(start, num_classes, in_features)  # as precisely as training will hold it
        else:
            require(rotation == "haar", f"rotation must be 'haar' or a tensor, got {rotation!r}")
            dtype = torch.get_default_dtype() if dtype is None else dtype
            require_floating("dtype", dtype)
            start = random_stiefel(
                in_features, rank, generator=generator, device=device, dtype=working_dtype(dtype)
            )
        # The QR retraction of the Euclidean metric returns to the manifold at every step; the Cayley
        # transform of the canonical metric would let rounding errors add up.
        self.rotation = geoopt.ManifoldParameter(start, manifold=geoopt.EuclideanStiefel())
        self._checked: tuple[int, int] | None = None

    @property
    def weight(self) -> Tensor:
        """The frame W = c E'Q', ``(K, d)``, differentiable in ``rotation``."""
        return etf_radius(self.num_classes) * centered_basis_adjoint(self.rotation.mT)

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch.

        Args:
            features: ``(..., d)``.
            targets: not used; accepted so that heads can be exchanged.

        Returns:
            ``(..., K)``.

        Raises:
            InvalidArgumentError: features of another width or dtype.
            ManifoldError: ``rotation`` has left the Stiefel manifold.
        """
        return super().forward(features)

    def _linear_form(self, features: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs = self._inputs(features)
        self._require_on_manifold()
        return inputs, self.weight, None

    def _require_on_manifold(self) -> None:
        rotation = self.rotation
        if not is_concrete(rotation):
            # Nothing outside the graph can be remembered here. A compiled or exported eval pass stays free of
            # the check: what it is given went through training.
            if self.training:
                self._assert_orthonormal(rotation)
            return
        # Every in-place change of a tensor raises its version: one check after each optimizer step.
        state = (rotation.data_ptr(), version(rotation))
        if state != self._checked:
            self._assert_orthonormal(rotation)
            self._checked = state

    @torch.no_grad()
    def _assert_orthonormal(self, rotation: Tensor) -> None:
        with full_precision(rotation):
            identity = torch.eye(self.num_classes - 1, dtype=rotation.dtype, device=rotation.device)
            gap = (rotation.mT @ rotation - identity).abs().amax()
        require_values(
            # Ten times the rounding that is_stiefel allows a fresh point: room for the factorization of a
            # step.
            gap <= 10 * default_atol(rotation.dtype),
            "rotation has left the Stiefel manifold, its columns are not orthonormal any more (a step of an "
            "ordinary optimizer does that): train with geoopt.optim.RiemannianSGD or RiemannianAdam, and "
            "repair it with torch.no_grad(): head.rotation.proj_()",
            ManifoldError,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedETFHead:
        super()._apply(keep_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None}
