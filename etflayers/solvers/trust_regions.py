"""Riemannian trust regions by pymanopt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from etflayers.checks import require_module
from etflayers.precision import default_tolerance
from etflayers.solvers.stiefel import (
    LocalModel,
    Objective,
    StiefelSolution,
    StiefelSolver,
    assess,
    local_model,
)

__all__ = ["TrustRegions"]


@dataclass(frozen=True)
class TrustRegions(StiefelSolver):
    r"""pymanopt's trust regions on the product of the manifolds of the batch, in NumPy on the CPU.

    The reference implementation, for checks: all members share one ball and one stopping rule. Value and
    derivatives come from PyTorch, in the precision of the start.

    Args:
        tolerance: converged where \|grad f\| <= tolerance (1 + \|G\|), G the Euclidean gradient; ``None``:
            eps^(3/4). pymanopt stops at a gradient norm of ``tolerance`` over the whole batch.
        max_iterations: trust-region steps.

    Raises:
        MissingDependencyError: pymanopt is not installed.

    Reference:
        Townsend, Koep, Weichwald (2016), arXiv 1603.03236.

    >>> target = torch.eye(4, 2).expand(1, 4, 2)
    >>> start = torch.eye(4).roll(1, 0)[None, :, :2]
    >>> solution = TrustRegions().minimize(lambda q: -(q * target).sum((-2, -1)), start)
    >>> torch.allclose(solution.point, target, atol=1e-4)
    True
    """

    tolerance: float | None = None
    max_iterations: int = 100

    def minimize(self, objective: Objective, start: Tensor) -> StiefelSolution:
        """Minimize ``objective`` from ``start``, ``(B, d, n)`` with orthonormal columns."""
        pymanopt = require_module("pymanopt", extra="solvers")
        manifolds = require_module("pymanopt.manifolds", extra="solvers")
        optimizers = require_module("pymanopt.optimizers", extra="solvers")
        tolerance = default_tolerance(start.dtype) if self.tolerance is None else self.tolerance
        batch, dim, num_frames = start.shape
        manifold = manifolds.Stiefel(dim, num_frames, k=batch, retraction="polar")
        about = _Models(objective, start)
        problem = pymanopt.Problem(
            manifold,
            pymanopt.function.numpy(manifold)(about.cost),
            riemannian_gradient=pymanopt.function.numpy(manifold)(about.gradient),
            riemannian_hessian=pymanopt.function.numpy(manifold)(about.hessian),
        )
        # pymanopt expects values that are exact to float64; ours are exact to the precision of the start.
        coarser = torch.finfo(start.dtype).eps / torch.finfo(torch.float64).eps
        optimizer = optimizers.TrustRegions(
            miniter=0,
            rho_regularization=1e3 * coarser,
            verbosity=0,
            min_gradient_norm=tolerance,
            max_iterations=self.max_iterations,
        )
        first = about.to_numpy(start)
        if not bool(about.at(first).finite().all()):
            return assess(about.at(first), start, 0, tolerance)
        # By default both loops go on from an exact solution, and divide zero by zero.
        result = optimizer.run(problem, initial_point=first, mininner=0)
        return assess(about.at(result.point), about.to_torch(result.point), int(result.iterations), tolerance)


class _Models:
    """The objective's local models as pymanopt asks for them: NumPy arrays, ``(d, n)`` for a batch of one."""

    def __init__(self, objective: Objective, like: Tensor) -> None:
        self.objective = objective
        self.like = like
        self.last: tuple[bytes, LocalModel] | None = None

    def to_torch(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.like).reshape(self.like.shape)

    def to_numpy(self, tensor: Tensor) -> np.ndarray:
        tensor = tensor.detach().double().cpu()
        array: np.ndarray = (tensor[0] if len(tensor) == 1 else tensor).numpy()
        return array

    def at(self, point: np.ndarray) -> LocalModel:
        # Cost, gradient and many Hessian products are asked for at one point: its graph is built once.
        key = point.tobytes()
        if self.last is None or self.last[0] != key:
            self.last = (key, local_model(self.objective, self.to_torch(point)))
        return self.last[1]

    def cost(self, point: np.ndarray) -> float:
        return float(self.at(point).value.double().sum())

    def gradient(self, point: np.ndarray) -> np.ndarray:
        return self.to_numpy(self.at(point).gradient)

    def hessian(self, point: np.ndarray, tangent: np.ndarray) -> np.ndarray:
        return self.to_numpy(self.at(point).hessian(self.to_torch(tangent)))
