"""The private names of PyTorch that the library cannot do without.

They stand here and nowhere else, each with the reason for it and the public name that is missing, so that a
new version of PyTorch has one module to be checked against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._compile import _disable_dynamo
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# The only way to see every operator that runs; PyTorch documents it, in a module without a public name.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# What PyTorch itself walks through nested arguments with; torch.utils has no public name for it.
from torch.utils._pytree import tree_iter

from etflayers._imports import AfterImport

__all__ = [
    "TorchDispatchMode",
    "allow_in_graph",
    "apply_function",
    "assert_async",
    "assume_constant_result",
    "compile_graph",
    "forward_mode",
    "inside_backward",
    "inside_transform",
    "is_batched",
    "is_concrete",
    "is_operator",
    "is_replica",
    "is_symbolic",
    "leave_to_eager",
    "stamp",
    "tree_iter",
    "version",
    "without_modes",
]

Function = TypeVar("Function", bound=Callable[..., Any])

# The public decorators of torch.compiler import Dynamo, the tracer of torch.compile, and with it sympy: more
# than a second for those who compile nothing. They are applied once somebody else imports it, as
# torch.compile and torch.export do before they trace anything.
_DYNAMO = AfterImport("torch._dynamo")


def allow_in_graph(function: Function) -> Function:
    """``torch.compiler.allow_in_graph``, applied when Dynamo is imported: see there what it does."""
    _DYNAMO.run(lambda: torch.compiler.allow_in_graph(function))  # type: ignore[no-untyped-call]
    return function


def assume_constant_result(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, applied when Dynamo is imported: see there what it does."""
    _DYNAMO.run(lambda: torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]
    return function


def leave_to_eager(function: Function) -> Function:
    """``torch.compiler.disable``, which wraps the function, applied when the function is first called.

    This is what PyTorch decorates its own optimizers with, so that ``import torch`` does without Dynamo. The
    public decorator cannot wait: it has to return what it wraps.
    """
    return cast(Function, _disable_dynamo(function))


def apply_function(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``function.apply(*inputs)`` without binding the inputs to the signature of ``forward``.

    The introspection takes a fifth of the time of a small problem. ``apply`` itself goes on as here;
    ``torch.func`` transforms need all of it.
    """
    if inside_transform():
        return function.apply(*inputs)  # type: ignore[no-untyped-call]
    return super(torch.autograd.Function, function).apply(*inputs)  # type: ignore[misc]


def is_concrete(tensor: Tensor) -> bool:
    """Whether the tensor has values now, and is not a stand-in for some that are traced or batched.

    ``torch.compiler.is_compiling`` is public and false while AOTAutograd traces a function that Dynamo left
    alone, where the tensor is a ``FakeTensor`` or, before PyTorch 2.13, a ``FunctionalTensor``. There is no
    public question for these, nor for tensors inside a ``torch.func`` transform.
    """
    return not (
        tensor.is_meta
        or torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        or isinstance(tensor, (FakeTensor, FunctionalTensor))
    )


def inside_transform() -> bool:
    """Whether any ``torch.func`` transform is running; there is no public question for it."""
    return torch._C._are_functorch_transforms_active()


def is_batched(tensor: Tensor) -> bool:
    """Whether the tensor may stand for several, under ``torch.func`` or ``grad(is_grads_batched=True)``.

    The second is an older mechanism that ``torch.func`` does not report.
    """
    return inside_transform() or torch._C._functorch.is_legacy_batchedtensor(tensor)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on: tangents have to flow even where no graph is recorded.

    ``torch.is_grad_enabled`` speaks of reverse mode only, and the public ``torch.autograd.forward_ad`` can
    enter a level and not ask for it.
    """
    return torch.autograd.forward_ad._current_level >= 0


def version(tensor: Tensor) -> int:
    """How often the tensor has been changed in place; public is only the error that autograd makes of it."""
    return tensor._version


def stamp(tensor: Tensor) -> tuple[int, int]:
    """Where the values are and how often they were written in place: not the same after a change.

    A tensor made in inference mode has no counter. PyTorch's fused optimizers do not advance it.
    """
    return tensor.data_ptr(), 0 if tensor.is_inference() else version(tensor)


def assert_async(condition: Tensor, message: str) -> None:
    """Have the device check ``condition`` when it gets there, which the host does not wait for.

    ``assert`` and ``torch.testing`` wait for the value.
    """
    torch._assert_async(condition, message)


def inside_backward() -> bool:
    """Whether this runs inside a backward pass, as the second forward pass of gradient checkpointing does.

    ``torch.utils.checkpoint`` itself asks so; there is no public question for it.
    """
    return torch._C._current_graph_task_id() != -1


def without_modes() -> AbstractContextManager[object]:
    """Run operators as if no ``TorchDispatchMode`` were entered, which only who entered it can leave."""
    return _disable_current_modes()


def is_operator(target: object) -> bool:
    """Whether the target of a node in a graph is an operator; the class of operators has no public name."""
    return isinstance(target, torch._ops.OpOverload)


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` has made the module for one pass; it marks its copies for PyTorch alone."""
    return bool(getattr(module, "_is_replica", False))


def is_symbolic(value: object) -> bool:
    """Whether the value is a symbol of ``torch.fx.symbolic_trace``, which has neither dtype nor values."""
    return isinstance(value, fx.Proxy)


def compile_graph(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Have Inductor compile a graph of operators; ``torch.compile`` takes it only by way of Dynamo."""
    from torch import _inductor  # not with the library: it takes a second

    compiled: Callable[..., Sequence[Tensor]] = _inductor.compile(graph, list(examples))
    return compiled
