r"""Kernel ridge regression on a distilled set: the inner loop that needs no steps.

**Predictions.** Among functions of the form ``f(x) = sum_j K(x, s_j) w_j`` on the support samples s_j, the
ridge regression on labels y minimizes ``|f(S) - y|^2 + r w'K(S, S)w`` and so

    f(X) = K(X, S) (K(S, S) + r I)^{-1} y,      r = ridge * tr K(S, S) / n.

With the tangent kernel of a network this is the limit of training it to convergence (Nguyen, Chen, Lee 2020,
arXiv 2011.00050): f is differentiable in S and y, which are learned. A ridge relative to the mean of the
diagonal means the same for every scale of the kernel, and bounds the condition number by n / ridge + 1.

**Label solve.** f(X) = A y is linear in the labels, so those with the least error on targets T are ``A^+ T``.
Where only the support is then learned, its gradient needs none through them: at the best labels the loss does
not change with them to first order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_finite, require_floating, require_number, require_values
from etflayers.distill.kernels import FeatureKernel, Kernel
from etflayers.distill.labels import class_indices
from etflayers.precision import full_precision

__all__ = ["KernelRidgeInnerLoop", "centered_one_hot", "kernel_ridge", "solve_labels"]


def kernel_ridge(
    inputs: Tensor,
    support: Tensor,
    labels: Tensor,
    *,
    kernel: Kernel,
    ridge: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Predict ``K(X, S) (K(S, S) + ridge tr(K(S, S))/n I)^{-1} y``.

    Differentiable to second order in ``inputs``, ``support`` and ``labels``.

    Args:
        inputs: X, ``(m, ...)``, the samples to predict on.
        support: S, ``(n, ...)``, samples of the same shape.
        labels: y, ``(n, K)``, floating-point: for class indices see :func:`centered_one_hot`.
        kernel: K.
        ridge: >= 0, relative to the mean of the diagonal of K(S, S).
        dtype: to compute in, float32 or float64. The condition number may reach n / ridge, so float32 is
            enough only for a ridge well above 1e-7 n.

    Returns:
        ``(m, K)``, in the dtype of ``labels``.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit, a negative ridge, or one too small for the
            system to be positive definite in ``dtype``. Inside ``torch.func`` transforms, where values are
            not checked, the latter gives NaN.
        NonFiniteError: NaN or infinity in an input, or in a kernel of it.

    Reference:
        Nguyen, Chen, Lee (2020), arXiv 2011.00050.

    >>> from etflayers.distill import LinearKernel
    >>> support = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> labels = torch.tensor([[2.0], [4.0]])
    >>> kernel_ridge(torch.tensor([[1.0, 1.0]]), support, labels, kernel=LinearKernel(), ridge=1.0)
    tensor([[3.]])
    """
    _check_labels("labels", labels, len(support), "support")
    cross, factor = _factorized(inputs, support, kernel, ridge, dtype)
    with full_precision(cross):
        predictions = cross @ torch.cholesky_solve(labels.to(dtype), factor)
    return predictions.to(labels.dtype)


def solve_labels(
    inputs: Tensor,
    targets: Tensor,
    support: Tensor,
    *,
    kernel: Kernel,
    ridge: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Minimize ``|T - f(X)|^2`` over the labels of the support: ``y = (K(X, S) (K(S, S) + r I)^{-1})^+ T``.

    Where many labels are equally good, those of least norm. Differentiable in all tensors.

    Args:
        inputs: X, ``(m, ...)``, real samples.
        targets: T, ``(m, K)``, floating-point: for class indices see :func:`centered_one_hot`.
        support: S, ``(n, ...)``, samples of the same shape.
        kernel: as in :func:`kernel_ridge`.
        ridge: as in :func:`kernel_ridge`.
        dtype: as in :func:`kernel_ridge`.

    Returns:
        The labels, ``(n, K)``, in the dtype of ``targets``.

    Raises:
        InvalidArgumentError: as in :func:`kernel_ridge`.
        NonFiniteError: as in :func:`kernel_ridge`.

    Reference:
        Nguyen, Chen, Lee (2020), arXiv 2011.00050.

    >>> from etflayers.distill import LinearKernel
    >>> inputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [6.0]])
    >>> solve_labels(inputs, targets, torch.tensor([[0.5]]), kernel=LinearKernel(), ridge=0.0)
    tensor([[1.5000]])
    """
    _check_labels("targets", targets, len(inputs), "inputs")
    cross, factor = _factorized(inputs, support, kernel, ridge, dtype)
    with full_precision(cross):
        labels: Tensor = torch.linalg.pinv(torch.cholesky_solve(cross.mT, factor).mT) @ targets.to(dtype)
    return labels.to(targets.dtype)


def centered_one_hot(targets: Tensor, num_classes: int, *, dtype: torch.dtype | None = None) -> Tensor:
    r"""Class indices as vectors ``e_y - 1/K``, which sum to zero: what regression on classes is given.

    Args:
        targets: ``(...)``, integers in [0, K).
        num_classes: K.
        dtype: of the result; default the default dtype.

    Returns:
        ``(..., K)``.

    Raises:
        InvalidArgumentError: targets that are not integers in [0, K).

    >>> centered_one_hot(torch.tensor([0, 1]), 2)
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000]])
    """
    targets = class_indices("targets", targets)
    require(num_classes >= 1, f"num_classes must be at least 1, got {num_classes}")
    classes = torch.arange(num_classes, device=targets.device)
    hot = targets.unsqueeze(-1) == classes
    require_values(hot.any(-1).all(), f"targets must lie in [0, num_classes) = [0, {num_classes})")
    return hot.to(dtype or torch.get_default_dtype()) - 1 / num_classes


class KernelRidgeInnerLoop(nn.Module):
    r"""Predict with kernel ridge regression on a support set, ``K(X, S) (K(S, S) + r I)^{-1} y``.

    :func:`kernel_ridge` and :func:`solve_labels` as a module that holds the kernel: the closed-form inner
    loop of kernel inducing points. The loss of its predictions on real data is what a distilled set is
    learned by.

    Args:
        kernel: K. The network of a :class:`~etflayers.distill.FeatureKernel` becomes a submodule.
        ridge: >= 0; r is ``ridge * tr K(S, S) / n``.
        dtype: to compute in, float32 or float64.

    Raises:
        InvalidArgumentError: a negative ridge, another dtype, or no kernel.

    Reference:
        Nguyen, Chen, Lee (2020), arXiv 2011.00050.

    >>> from etflayers.distill import NTKKernel
    >>> inner_loop = KernelRidgeInnerLoop(NTKKernel(depth=2), ridge=1e-3)
    >>> inputs, targets = torch.eye(4), torch.eye(4)
    >>> labels = inner_loop.solve_labels(inputs, targets, support=torch.eye(4))
    >>> inner_loop(inputs, torch.eye(4), labels).diagonal()
    tensor([1.0000, 1.0000, 1.0000, 1.0000])
    """

    def __init__(self, kernel: Kernel, *, ridge: float = 1e-6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        require_number("ridge", ridge)
        _check_dtype(dtype)
        require(
            callable(kernel) and not isinstance(kernel, type),
            f"kernel must be a function of two sets of samples, such as NTKKernel(depth=1), got {kernel!r}",
        )
        self.kernel = kernel
        # A module inside a dataclass is out of sight: registered, it moves, saves and switches mode with this
        # one.
        self.features = kernel.module if isinstance(kernel, FeatureKernel) else None
        self.ridge = ridge
        self.dtype = dtype

    def forward(self, inputs: Tensor, support: Tensor, labels: Tensor) -> Tensor:
        """Predictions ``(m, K)`` on ``inputs`` ``(m, ...)`` from ``support`` ``(n, ...)`` and ``labels``."""
        return kernel_ridge(inputs, support, labels, kernel=self.kernel, ridge=self.ridge, dtype=self.dtype)

    @torch.no_grad()
    def predict(self, inputs: Tensor, support: Tensor, labels: Tensor, *, batch_size: int = 1000) -> Tensor:
        """The same without a graph, in parts of ``batch_size`` samples, whose kernels need little memory.

        >>> from etflayers.distill import LinearKernel
        >>> loop = KernelRidgeInnerLoop(LinearKernel(), ridge=1.0)
        >>> loop.predict(torch.ones(3, 2), torch.eye(2), torch.tensor([[2.0], [4.0]]), batch_size=2).mT
        tensor([[3., 3., 3.]])
        """
        parts = torch.split(inputs, batch_size)
        return torch.cat([self.forward(part, support, labels) for part in parts])

    def solve_labels(self, inputs: Tensor, targets: Tensor, support: Tensor) -> Tensor:
        """The labels ``(n, K)`` of ``support`` whose predictions on ``inputs`` are nearest to ``targets``."""
        return solve_labels(inputs, targets, support, kernel=self.kernel, ridge=self.ridge, dtype=self.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"kernel={self.kernel!r}, ridge={self.ridge}, dtype={self.dtype}"


def _factorized(
    inputs: Tensor, support: Tensor, kernel: Kernel, ridge: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K(X, S) and the Cholesky factor of K(S, S) + r I."""
    require_number("ridge", ridge)
    _check_dtype(dtype)
    require_floating("inputs", inputs.dtype)
    require_floating("support", support.dtype)
    require(
        inputs.shape[1:] == support.shape[1:],
        f"inputs and support must hold samples of one shape, (m, ...) and (n, ...), "
        f"got {tuple(inputs.shape)} and {tuple(support.shape)}",
    )
    count = len(support)
    require(count >= 1, f"support must hold at least one sample, got shape {tuple(support.shape)}")
    require_finite(inputs, "inputs must be finite, got NaN or infinity: look at what was loaded")
    require_finite(support, "support must be finite, got NaN or infinity: lower the rate it is learned with")
    support = support.to(dtype)
    cross, gram = kernel(inputs.to(dtype), support), kernel(support, support)
    require_finite(gram, "the kernel of the support must be finite, got NaN or infinity: look at the kernel")
    require_finite(cross, "the kernel of the inputs must be finite, got NaN or infinity: look at the kernel")
    with full_precision(gram):
        diagonal = gram.diagonal()
        system = gram + ridge * diagonal.mean() * torch.eye(count, dtype=dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(system)
    # A pivot is a difference that carries a rounding error of n eps times the diagonal: below that it is
    # noise, and a factorization that came through has no digit right.
    noise = count * torch.finfo(dtype).eps
    pivots = factor.detach().diagonal().square()
    definite = (info == 0) & (pivots > noise * diagonal.detach().max()).all()
    require_values(
        definite,
        f"ridge={ridge:g} leaves K(S, S) + ridge tr(K)/n I not positive definite in {dtype} (samples of the "
        f"support that coincide or vanish): take a ridge above n eps = {noise:.1g}"
        + (", or dtype=torch.float64" if dtype == torch.float32 else ""),
    )
    return cross, torch.where(definite, factor, math.nan)


def _check_labels(name: str, labels: Tensor, count: int, samples: str) -> None:
    require(
        labels.dtype.is_floating_point,
        f"{name} must be floating-point vectors, got {labels.dtype}: for class indices use centered_one_hot",
    )
    require(
        labels.ndim == 2 and len(labels) == count,
        f"{name} must have shape (n, K) with one row for each of the {count} samples of {samples}, "
        f"got {tuple(labels.shape)}",
    )
    require_finite(labels, f"{name} must be finite, got NaN or infinity")


def _check_dtype(dtype: torch.dtype) -> None:
    require(
        dtype in (torch.float32, torch.float64),
        f"dtype must be torch.float32 or torch.float64, got {dtype}: a factorization needs that precision",
    )
