r"""The head whose frame is learned.

Symbols: P <-> prototypes, Q <-> rotation, W <-> frame, E <-> centered_basis.

**Free coordinates.** The frames form a manifold, and an optimizer that takes steps in a vector space leaves
it. So the parameter is a matrix P without any constraint, and W(P) is the simplex ETF nearest to it: the node
of ``functional.nearest`` serves as the parametrization. Whatever is written into P, by an optimizer, an
average of models or a checkpoint, W is an ETF. At P = W the derivative of W is the projection onto the
tangent space of the frames, so that a gradient step in P is a Riemannian one with the polar retraction. The
length of P has no influence on W, and so gets no gradient.

PyTorch's ``parametrizations.orthogonal`` would do the same with Householder products. These take 12 to 24
times as long, forward and backward (``benchmarks/bench_learned.py``), because their derivative visits one
reflection after the other, and a module with a registered parametrization cannot be pickled.

**On the manifold.** With geoopt the parameter is Q of W = c E'Q' itself, and a Riemannian optimizer moves it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from etflayers._torch import is_concrete
from etflayers.checks import require, require_floating, require_module, require_values
from etflayers.errors import ManifoldError
from etflayers.functional.nearest import nearest_etf
from etflayers.geometry import (
    etf_from_coordinates,
    random_stiefel,
    require_rotation,
)
from etflayers.geometry.tolerance import default_atol
from etflayers.nn.base import LogitTerms
from etflayers.nn.distributed import gathered, overwrite
from etflayers.nn.etf import ETFHead
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import full_precision, working_dtype

__all__ = ["LearnedETFHead", "on_manifold"]


class LearnedETFHead(KeepsPrecision, ETFHead):
    r"""Classifier whose weight is a learned simplex ETF: ``logits = s z W'``, W the ETF nearest to P.

    The parameter ``prototypes`` is P, a matrix without constraints: any optimizer trains it, and averages of
    it (EMA, SWA) are as good as itself. With ``manifold="geoopt"`` the parameter is ``rotation``, Q of
    ``W = c E'Q'``, a geoopt ``ManifoldParameter`` with the Euclidean metric, for geoopt's Riemannian
    optimizers (which treat all other parameters of the model like the ordinary optimizer of that name); a
    step of any other optimizer makes it leave the manifold, which the next forward pass refuses.

    Args:
        in_features: d >= K - 1.
        num_classes: K >= 2.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.
        manifold: ``None``: P, in free coordinates; ``"geoopt"``: Q, on the Stiefel manifold.
        rotation: where W starts: ``"haar"`` (uniformly random) or Q in St(d, K-1), ``(d, K-1)``.
        generator: random numbers of the Haar rotation.
        device: of the parameter.
        dtype: of the parameter: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        prototypes: P, ``(K, d)``; with ``manifold=None``.
        rotation: Q, ``(d, K-1)``; with ``manifold="geoopt"``.

    Raises:
        InvalidArgumentError: K < 2, d < K - 1, a scale that is not positive, a rotation that is not in St(d,
            K-1), an unknown manifold.
        MissingDependencyError: ``manifold="geoopt"``, and geoopt is not installed.

    Reference:
        Markou, Ajanthan, Gould (2024), arXiv 2411.01248.

    >>> head = LearnedETFHead(in_features=8, num_classes=3)
    >>> optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    >>> loss = nn.functional.cross_entropy(head(torch.ones(1, 8)), torch.tensor([0]))
    >>> loss.backward()
    >>> optimizer.step()
    >>> bool(nn.functional.cross_entropy(head(torch.ones(1, 8)), torch.tensor([0])) < loss)
    True
    """

    prototypes: nn.Parameter
    rotation: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        manifold: Literal["geoopt"] | None = None,
        rotation: Literal["haar"] | Tensor = "haar",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        require(manifold in (None, "geoopt"), f"manifold must be None or 'geoopt', got {manifold!r}")
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
                in_features, num_classes - 1, generator=generator, device=device, dtype=working_dtype(dtype)
            )
        start = start.contiguous()  # as sharding and safetensors want a parameter; QR leaves it transposed
        self.manifold = manifold
        if manifold is None:
            self.prototypes = nn.Parameter(etf_from_coordinates(start.mT))
        else:
            self.rotation = on_manifold(start)

    @property
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows, differentiable in the parameter."""
        if self.manifold is None:
            return nearest_etf(gathered(self.prototypes))
        return etf_from_coordinates(gathered(self.rotation).mT)

    def logit_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """See :meth:`CodeHead.logit_terms`.

        Raises:
            InvalidArgumentError: features of another width or dtype.
            ManifoldError: ``rotation`` has left the Stiefel manifold, with ``manifold="geoopt"``.
        """
        inputs = self.inputs(features)
        if self.manifold is not None:
            self._require_on_manifold()
        return LogitTerms(inputs, self.frame)

    def _require_on_manifold(self) -> None:
        # A compiled or exported eval pass stays free of the check: what it is given went through training.
        # Elsewhere it is made in every pass: fused optimizers leave no trace that a parameter has changed.
        if not self.training and not is_concrete(self.rotation):
            return
        with torch.no_grad(), full_precision(self.rotation):
            rotation = gathered(self.rotation)
            identity = torch.eye(self.num_classes - 1, dtype=rotation.dtype, device=rotation.device)
            gap = (rotation.mT @ rotation - identity).abs().amax()
        require_values(
            # Ten times the rounding that is_stiefel allows a fresh point: room for the factorization of a
            # step.
            gap <= 10 * default_atol(rotation.dtype),
            "rotation has left the Stiefel manifold, its columns are not orthonormal any more (a step of an "
            "ordinary optimizer does that, and so does an average of models): train with "
            "geoopt.optim.RiemannianSGD or RiemannianAdam, and repair it with torch.no_grad(): "
            "head.rotation.proj_(); or use manifold=None, which needs neither",
            ManifoldError,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a Haar frame anew from PyTorch's global generator.

        Under ``torch.distributed`` all ranks call it, and get the frame that the first one draws.
        """
        super().reset_parameters()
        parameter = self.prototypes if self.manifold is None else self.rotation
        rotation = random_stiefel(
            self.in_features, self.num_classes - 1, device=parameter.device, dtype=parameter.dtype
        )
        overwrite(parameter, etf_from_coordinates(rotation.mT) if self.manifold is None else rotation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rotation = state_dict.get(prefix + "rotation")
        if self.manifold is None and rotation is not None:
            # A checkpoint of a head on the manifold, which was the only kind before version 0.2.
            require_rotation(rotation, self.num_classes, self.in_features)
            state_dict[prefix + "prototypes"] = etf_from_coordinates(state_dict.pop(prefix + "rotation").mT)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.manifold is not None and not hasattr(self.rotation, "manifold"):
            # assign=True has put an ordinary parameter here, which an optimizer would not keep orthonormal.
            self.rotation = on_manifold(self.rotation.detach(), requires_grad=self.rotation.requires_grad)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, manifold={self.manifold!r}"


def on_manifold(rotation: Tensor, *, requires_grad: bool = True) -> nn.Parameter:
    """A parameter that the optimizers of geoopt keep on the Stiefel manifold."""
    geoopt = require_module("geoopt", extra="solvers")
    # The QR retraction of the Euclidean metric returns to the manifold at every step; the Cayley transform of
    # the canonical metric would let rounding errors add up.
    parameter: nn.Parameter = geoopt.ManifoldParameter(
        rotation, manifold=geoopt.EuclideanStiefel(), requires_grad=requires_grad
    )
    return parameter
