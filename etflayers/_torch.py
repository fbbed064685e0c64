"""The private names of PyTorch that the library cannot do without.

They stand here and nowhere else, each with the reason for it and the public name that is missing, so that a
new version of PyTorch has one module to be checked against.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

__all__ = ["assert_async", "forward_mode", "inside_transform", "is_batched", "is_concrete", "version"]


def is_concrete(tensor: Tensor) -> bool:
    """Whether the tensor has values now, and is not a stand-in for some that are traced or batched.

    ``torch.compiler.is_compiling`` is public and false while AOTAutograd traces a function that Dynamo left
    alone, where the tensor is a ``FakeTensor`` or, before PyTorch 2.13, a ``FunctionalTensor``. There is no
    public question for these, nor for tensors inside a ``torch.func`` transform.
    """
    return not (
        torch.compiler.is_compiling()
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


def assert_async(condition: Tensor, message: str) -> None:
    """Have the device check ``condition`` when it gets there, which the host does not wait for.

    ``assert`` and ``torch.testing`` wait for the value.
    """
    torch._assert_async(condition, message)


def version(tensor: Tensor) -> tuple[int, int]:
    """Where the values of the tensor are and how often they were written in place: a change changes it.

    There is no public counter. PyTorch's own fused optimizers do not advance it, other in-place operations
    do; for tensors made in inference mode, which have none, only the place counts.
    """
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
