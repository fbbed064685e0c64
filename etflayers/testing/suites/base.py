"""What every suite checks: derivatives, transforms, precisions and copies of one function of one tensor.

Whatever is under test, a head, a solver or a loss, serves to compute a tensor y = f(x). A suite says what f
and x are (``function``, ``point``); the checks here hold for any such f, the suites add what only they know.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from etflayers.checks import require
from etflayers.testing.oracles import adjoint_identity_error

__all__ = ["Function", "Suite", "assert_close", "assert_gradients", "assert_refused", "state_of_module"]

Function = Callable[[Tensor], Tensor]


class Suite:
    """Base of the suites; a subclass of one of them, named ``Test...``, is collected by pytest.

    Attributes:
        unsupported: name of a check to the reason why this class cannot pass it. Such a check still runs, and
            has to fail: a reason that no longer holds is an error.
        rtol: how far two ways to the same float64 value may be apart, relatively.
        half_rtol: how far a result from half precision may be from that in float64, relative to its norm:
            the default is 4 units in the last place of bfloat16.
    """

    unsupported: ClassVar[Mapping[str, str]] = {}
    rtol: ClassVar[float] = 1e-7
    half_rtol: ClassVar[float] = 4 * 2**-8

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, reason in cls.__dict__.get("unsupported", {}).items():
            check: Any = getattr(cls, name, None)
            require(
                name.startswith("test_") and callable(check),
                f"unsupported names {name!r}, which is no check of {cls.__name__}",
            )
            require(bool(reason), f"unsupported gives no reason why {cls.__name__} cannot pass {name}")
            setattr(cls, name, pytest.mark.xfail(reason=reason, strict=True)(_again(check)))

    # --- hooks ----------------------------------------------------------------------------------------------

    def make(self) -> Any:
        """The object under test, made anew, in the default dtype where it has one."""
        raise NotImplementedError

    def function(self, made: Any) -> Function:
        """What the object serves to compute, f; calling it leaves the object as it was."""
        raise NotImplementedError

    def point(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """An argument x at which f is smooth."""
        raise NotImplementedError

    # --- helpers --------------------------------------------------------------------------------------------

    def made(self, dtype: torch.dtype | None = torch.float64, seed: int = 0) -> Any:
        """The object, made with a seed; one that is a module is brought to ``dtype``."""
        torch.manual_seed(seed)
        made = self.make()
        return made.to(dtype) if isinstance(made, nn.Module) and dtype is not None else made

    # --- derivatives ----------------------------------------------------------------------------------------

    def test_gradcheck(self) -> None:
        """The gradient is that of finite differences."""
        assert_gradients(torch.autograd.gradcheck, self.function(self.made()), self.point())

    def test_gradcheck_of_parameters(self) -> None:
        """So is that of every parameter, for an object that is a module."""
        made = self.made()
        if not isinstance(made, nn.Module):
            return
        function, point = self.function(made), self.point()
        for name, parameter in made.named_parameters():
            assert_gradients(torch.autograd.gradcheck, _of_parameter(self, made, name, point), parameter)
        assert torch.isfinite(function(point)).all(), "the value is not finite"

    def test_gradgradcheck(self) -> None:
        """The gradient of the gradient is that of finite differences."""
        assert_gradients(torch.autograd.gradgradcheck, self.function(self.made()), self.point())

    def test_forward_mode(self) -> None:
        """The directional derivative of forward mode is that of finite differences."""
        check = functools.partial(
            torch.autograd.gradcheck,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=False,
        )
        assert_gradients(check, self.function(self.made()), self.point())

    def test_adjoint_identity(self) -> None:
        """<J'g, v> = <g, Jv>: reverse and forward mode differentiate the same map."""
        error = adjoint_identity_error(self.function(self.made()), self.point())
        assert error < self.rtol, f"<J'g, v> and <g, Jv> differ by {error:.1e} of their size"

    # --- transforms -----------------------------------------------------------------------------------------

    def test_vmap(self) -> None:
        """``torch.func.vmap`` gives what a loop gives."""
        function = self.function(self.made())
        points = torch.stack([self.point(seed=seed) for seed in range(3)])
        expected = torch.stack([function(point) for point in points])
        assert_close(torch.func.vmap(function)(points), expected, self.rtol)

    def test_compile(self) -> None:
        """``torch.compile`` takes it as one graph, with the same value and gradient."""
        function = self.function(self.made())
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for mine, expected in zip(
            _value_and_gradient(compiled, self.point()),
            _value_and_gradient(function, self.point()),
            strict=True,
        ):
            assert_close(mine, expected, self.rtol)

    # --- precisions -----------------------------------------------------------------------------------------

    def test_float32(self) -> None:
        """In float32 the value is that of float64, to its rounding."""
        self._compare_precision(self.function(self.made(torch.float32)), torch.float32, 1e-4)

    def test_half_precision(self) -> None:
        """An argument in bfloat16 gives a finite value near to that in float64."""
        self._compare_precision(self.function(self.made(torch.float32)), torch.bfloat16, self.half_rtol)

    def test_autocast(self) -> None:
        """Under autocast the value is finite and near to that in float64."""
        with torch.autocast("cpu", torch.bfloat16):
            self._compare_precision(self.function(self.made(torch.float32)), torch.float32, self.half_rtol)

    def _compare_precision(self, function: Function, dtype: torch.dtype, rtol: float) -> None:
        point = self.point(dtype).requires_grad_()
        value = function(point)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.float().sum(), point, allow_unused=True)
            assert gradient is None or torch.isfinite(gradient).all(), (
                f"the gradient in {dtype} is not finite"
            )
        with torch.autocast("cpu", enabled=False):
            expected = self.function(self.made())(point.detach().double())
        assert_close(value, expected, rtol)

    # --- copies ---------------------------------------------------------------------------------------------

    def test_deepcopy(self) -> None:
        """A deep copy computes the same."""
        made = self.made()
        self._compare(copy.deepcopy(made), made)

    def test_pickle(self) -> None:
        """So does what ``torch.save`` wrote and ``torch.load`` read."""
        made, file = self.made(), io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        self._compare(torch.load(file, weights_only=False), made)

    def test_state_dict(self) -> None:
        """A module made with another seed computes the same after loading the state dict."""
        made, twin = self.made(), self.made(seed=1)
        if isinstance(made, nn.Module):
            twin.load_state_dict(made.state_dict())
            self._compare(twin, made)

    def _compare(self, twin: Any, made: Any) -> None:
        # Not only the value there and now: without state of its own a second call must give it again.
        for _ in range(2):
            torch.manual_seed(0)
            expected = self.function(made)(self.point())
            torch.manual_seed(0)
            value = self.function(twin)(self.point())
            assert torch.equal(value, expected), f"the copy gives {value}, the original {expected}"

    # --- time -----------------------------------------------------------------------------------------------

    @pytest.mark.bench
    def test_time(self, request: pytest.FixtureRequest) -> None:
        """The time of a value with its gradient, by pytest-benchmark, once the gradient is right."""
        pytest.importorskip("pytest_benchmark", reason="pytest-benchmark measures the time")
        self.test_gradcheck()
        function, point = self.function(self.made(torch.float32)), self.point(torch.float32)
        benchmark = request.getfixturevalue("benchmark")
        benchmark.name = type(self).__name__
        benchmark(_value_and_gradient, function, point)


def _again(check: Callable[..., None]) -> Callable[..., None]:
    """A function of its own with the same signature, so that a mark on it does not reach the base class."""

    @functools.wraps(check)
    def again(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)

    return again


def _of_parameter(suite: Suite, made: nn.Module, name: str, point: Tensor) -> Function:
    """The value at ``point`` as a function of one parameter."""

    def function(parameter: Tensor) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = made.get_submodule(owner)
        held = module._parameters[leaf]
        module._parameters[leaf] = parameter  # type: ignore[assignment]
        try:
            return suite.function(made)(point)
        finally:
            module._parameters[leaf] = held

    return function


def _value_and_gradient(function: Function, point: Tensor) -> tuple[Tensor, Tensor]:
    point = point.detach().requires_grad_()
    value = function(point)
    (gradient,) = torch.autograd.grad(value.sin().sum(), point)
    return value.detach(), gradient


def assert_gradients(check: Callable[..., bool], function: Function, point: Tensor) -> None:
    """``torch.autograd.gradcheck`` or ``gradgradcheck``, which fails as an assertion does."""
    try:
        check(function, (point.detach().requires_grad_(),))
    except (GradcheckError, ValueError) as error:
        raise AssertionError(str(error)) from error


def assert_close(value: Tensor, expected: Tensor, rtol: float) -> None:
    """|value - expected| <= rtol (1 + |expected|) in Frobenius norms, the value being finite."""
    assert value.shape == expected.shape, f"shape {tuple(value.shape)} instead of {tuple(expected.shape)}"
    assert torch.isfinite(value).all(), "the value is not finite"
    gap = float((value.detach().double() - expected.detach().double()).norm())
    bound = rtol * (1 + float(expected.detach().double().norm()))
    assert gap <= bound, f"off by {gap:.1e}, allowed are {bound:.1e}"


def assert_refused(call: Callable[[], Any], error: type[Exception], named: str) -> None:
    """The call raises ``error`` with a message that names ``named``."""
    try:
        call()
    except error as refusal:
        message = str(refusal)
    else:
        raise AssertionError(f"bad input was accepted; it must raise {error.__name__} naming {named!r}")
    assert named in message, f"the message does not name {named!r}: {message}"


def state_of_module(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
