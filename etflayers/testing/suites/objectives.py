"""The suite of objectives on the Stiefel manifold, for the node that minimizes them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from etflayers.errors import NonFiniteError
from etflayers.functional import solve_stiefel, stiefel_argmin
from etflayers.geometry import project_stiefel, random_stiefel
from etflayers.status import Status
from etflayers.testing.suites.base import Function, Suite, assert_close, assert_gradients, assert_refused

__all__ = ["ObjectiveSuite"]


class ObjectiveSuite(Suite):
    """Checks of an objective ``(Q, x)`` to ``(B,)``; f is its value in Q, off the manifold, too.

    ``make`` returns the objective, a function or a module; ``inputs`` the x that it reads, a tensor that
    leads with B; ``start`` where a solver starts.
    """

    def make(self) -> Callable[..., Tensor]:
        """The objective."""
        raise NotImplementedError

    def inputs(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """What the objective reads besides Q, ``(B, ...)``, B >= 2."""
        raise NotImplementedError

    def start(self) -> Tensor:
        """A point Q, ``(B, d, n)``, from which a minimizer is reached."""
        raise NotImplementedError

    def function(self, made: Callable[..., Tensor]) -> Function:
        """The values at a point."""
        inputs = {dtype: self.inputs(dtype) for dtype in (torch.float32, torch.float64)}
        return lambda point: made(point, inputs[torch.promote_types(point.dtype, torch.float32)])

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """A point on the manifold."""
        generator = torch.Generator().manual_seed(seed)
        batch, dim, num_frames = self.start().shape
        return random_stiefel(dim, num_frames, batch=(batch,), generator=generator, dtype=torch.float64).to(
            dtype
        )

    def minimizer(self, inputs: Tensor) -> Tensor:
        """The minimizer, as a differentiable function of the inputs."""
        return stiefel_argmin(self.made(), inputs, start=self.start().to(inputs.dtype))

    def test_one_value_for_each_member(self) -> None:
        """Which depends on this member of the batch alone, and is the same each time."""
        made, point, inputs = self.made(), self.point(), self.inputs()
        values = made(point, inputs)
        assert values.shape == point.shape[:1], f"{tuple(values.shape)} values for {len(point)} members"
        assert torch.equal(made(point, inputs), values), "a second evaluation gives another value"
        each = torch.cat([made(point[i : i + 1], inputs[i : i + 1]) for i in range(len(point))])
        assert_close(values, each, self.rtol)

    def test_has_an_isolated_minimizer(self) -> None:
        """The default solver ends at one, and no neighbor is lower."""
        found = solve_stiefel(self.made(), self.inputs(), start=self.start())
        assert found.status is Status.CONVERGED, found.message
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            step = torch.randn(found.point.shape, generator=generator, dtype=torch.float64)
            neighbor = project_stiefel(found.point.detach() + 1e-3 * step)
            assert (self.made()(neighbor, self.inputs()) > found.value).all(), "a neighbor is lower"

    def test_gradcheck_of_the_minimizer(self) -> None:
        """The gradient of the minimizer in the inputs is that of finite differences."""
        assert_gradients(torch.autograd.gradcheck, self.minimizer, self.inputs())

    def test_gradgradcheck_of_the_minimizer(self) -> None:
        """So is the gradient of that gradient."""
        assert_gradients(torch.autograd.gradgradcheck, self.minimizer, self.inputs())

    def test_minimizer_in_half_precision(self) -> None:
        """Inputs in bfloat16 give a minimizer in bfloat16, near to that in float64."""
        inputs = self.inputs().bfloat16()
        point = stiefel_argmin(self.made(torch.bfloat16), inputs, start=self.start().float())
        assert point.dtype == torch.bfloat16, f"a minimizer of dtype {point.dtype}"
        assert_close(point, self.minimizer(inputs.double()), self.half_rtol)

    def test_leaves_no_trace(self) -> None:
        """The node evaluates copies: solving changes no state."""
        made = self.made()
        before = copy.deepcopy(made)
        stiefel_argmin(made, self.inputs(), start=self.start())
        self._compare(made, before)

    def test_bad_input(self) -> None:
        """Inputs that are not finite are refused."""
        inputs = torch.full_like(self.inputs(), torch.nan)
        assert_refused(lambda: self.minimizer(inputs), NonFiniteError, "objective")
