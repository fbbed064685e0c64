"""Targets for a head inside a model whose own code hands on features only."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from etflayers.checks import require
from etflayers.nn.base import CodeHead

__all__ = ["TargetCapture", "capture_targets", "provide_targets"]

# Which thread has given targets to the head with this id, while they are there.
_GIVERS: dict[int, int] = {}
_LOCK = threading.Lock()


@contextmanager
def provide_targets(model: nn.Module, targets: Tensor) -> Iterator[None]:
    """Give targets to every head that needs them, in a model whose forward pass hands on features only.

    These are the heads whose ``accepts_targets`` is true: :class:`NearestETFHead`, :class:`ClassMeanHead`,
    and any :class:`~etflayers.nn.CodeHead` of your own that says so. The targets hold for the forward passes
    inside the ``with`` block, also if it is left by an exception. Targets given to a head directly win. They
    are no part of state_dict, copies or pickles.

    ``torch.optim.swa_utils.update_bn`` calls a model without labels: give it a generator that yields inputs
    from inside of such a block (``docs/howto/heads.md``). ``nn.DataParallel`` trains on copies of a head that
    are thrown away, and threads would share its class means: train a copy of the model in each, or under
    ``DistributedDataParallel``.

    Args:
        model: contains at least one such head, or is one; also inside ``DistributedDataParallel`` or
            ``torch.compile``.
        targets: for the features that the head receives, ``(...)``: see :meth:`NearestETFHead.forward`.

    Raises:
        InvalidArgumentError: the model has no such head, targets is no tensor, or another thread is inside
            of such a block for the same head.

    >>> import torch
    >>> from etflayers.nn import NearestETFHead
    >>> model = nn.Sequential(nn.Flatten(), NearestETFHead(4, 3))
    >>> with provide_targets(model, torch.arange(3)):
    ...     logits = model(torch.eye(3, 4))
    """
    heads = _heads_of(model)
    before = _exchange(heads, targets)
    try:
        yield
    finally:
        _restore(heads, before)


def capture_targets(model: nn.Module, targets: str | Callable[..., Tensor] = "labels") -> TargetCapture:
    """Give targets to every head that needs them, from an argument of the model's own forward pass.

    For training loops that are not yours and call ``model(..., labels=labels)``, such as the ``Trainer`` of
    transformers and many loops of Accelerate and Lightning: after this call they train a
    :class:`NearestETFHead` as they train a linear layer. The argument goes on to the forward pass of the
    model. A pass in eval mode needs none, and a training pass without it raises
    :class:`~etflayers.errors.MissingTargetsError`.

    Two hooks on the model do it. They are part of copies and pickles of the model, and work inside
    ``DistributedDataParallel``, FSDP and ``torch.compile``: capture the targets of the inner model, then wrap
    it. What :func:`provide_targets` says about threads and ``update_bn`` holds here, too.

    Args:
        model: contains at least one head that accepts targets; its ``forward`` receives them.
        targets: name of the argument of ``forward`` that holds the targets; or a function that is called with
            the arguments of each training pass and returns targets, where they have to be made first.

    Returns:
        A handle: ``remove()`` ends it, and so does the end of a ``with`` block.

    Raises:
        InvalidArgumentError: the model has no such head, or its ``forward`` no such argument.

    >>> import torch
    >>> from etflayers.nn import NearestETFHead
    >>> class Classifier(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.head = NearestETFHead(4, 3)
    ...
    ...     def forward(self, x, labels=None):
    ...         logits = self.head(x)
    ...         return logits if labels is None else nn.functional.cross_entropy(logits, labels)
    >>> model = Classifier()
    >>> with capture_targets(model):
    ...     loss = model(torch.eye(3, 4), labels=torch.arange(3))
    >>> model.head.averages.counts
    tensor([1, 1, 1])
    """
    _heads_of(model)
    return TargetCapture(model, targets)


class TargetCapture:
    """What :func:`capture_targets` returns, and does."""

    def __init__(self, model: nn.Module, targets: str | Callable[..., Tensor]) -> None:
        take = targets if callable(targets) else _Argument(model, targets)
        hooks = _Hooks(take)
        self._handles = (
            model.register_forward_pre_hook(hooks.before, with_kwargs=True),
            model.register_forward_hook(hooks.after, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> TargetCapture:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Argument:
    """The argument of ``model.forward`` with a given name; ``None`` where a call has none."""

    def __init__(self, model: nn.Module, name: str) -> None:
        parameters = inspect.signature(model.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        require(
            name in parameters or inspect.Parameter.VAR_KEYWORD in kinds,
            f"targets must name an argument of the forward pass of {type(model).__name__}, one of "
            f"{list(parameters)}, got {name!r}: where the labels are no argument, wrap the forward pass in "
            "provide_targets(model, labels)",
        )
        self.name = name
        self.position = list(parameters).index(name) if name in parameters else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.position is not None and self.position < len(args):
            return args[self.position]
        return kwargs.get(self.name)


class _Hooks:
    """Give targets before a training pass, and take them back after it."""

    def __init__(self, take: Callable[..., Tensor | None]) -> None:
        self.take = take
        # By thread, innermost pass last: one that is refused must not end the pass of another.
        self.given: dict[int, list[tuple[list[CodeHead], list[Tensor | None]]]] = {}

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heads = [head for head in _heads_of(model) if head.training]
        targets = self.take(*args, **kwargs) if heads else None
        if targets is not None:
            self.given.setdefault(_thread(), []).append((heads, _exchange(heads, targets)))

    def after(self, *_: object) -> None:
        passes = self.given.get(_thread())
        if passes:
            _restore(*passes.pop())


def _heads_of(model: nn.Module) -> list[CodeHead]:
    heads = [m for m in model.modules() if isinstance(m, CodeHead) and m.accepts_targets]
    require(
        len(heads) > 0,
        "model has no head that accepts targets, such as NearestETFHead: put one in with "
        "replace_classifier(model, head)",
    )
    return heads


def _exchange(heads: list[CodeHead], targets: Tensor) -> list[Tensor | None]:
    """Give targets to the heads, and return what they had before."""
    require(
        isinstance(targets, Tensor),
        f"targets must be a tensor of class indices, got {type(targets).__name__}",
    )
    if not torch.compiler.is_compiling():
        with _LOCK:
            givers = {_GIVERS.get(id(head), _thread()) for head in heads}
            require(
                givers == {_thread()},
                "another thread is training this head: its class means belong to one training, and targets "
                "would be mixed up. Give each thread a copy of the model, or train under "
                "DistributedDataParallel",
            )
            _GIVERS.update((id(head), _thread()) for head in heads)
    before = [head.provided_targets for head in heads]
    for head in heads:
        head.provided_targets = targets
    return before


def _restore(heads: list[CodeHead], before: list[Tensor | None]) -> None:
    for head, targets in zip(heads, before, strict=True):
        head.provided_targets = targets
        if targets is None and not torch.compiler.is_compiling():
            _GIVERS.pop(id(head), None)


def _thread() -> int:
    # A compiled pass belongs to one thread: there is nothing to tell apart.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
