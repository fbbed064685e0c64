"""What a step reads beside its arguments: tensors that loss, model or update rule close over.

A step that is re-derived starts from new leaves. Its graph ends in them, and in whatever else was there
before it: in leaves, such as a learned temperature, and in tensors that were made from leaves earlier, with
the graph behind them. Where that begins is found by running the step twice. The nodes of the step itself are
new each time, those that both graphs share were there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from etflayers._torch import is_concrete, tree_iter
from etflayers.errors import InvalidArgumentError

__all__ = ["captured_tensors", "depends_on_others"]

_INSTEAD = "use adjoint=KeptGraph(), which carries every gradient"

# Runs a computation anew: the ends of its graph, and the leaves that it started from.
Run = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
Edge = tuple[Node, int]


def depends_on_others(ends: Iterable[Tensor], known: Iterable[Tensor]) -> bool:
    """Whether a graph, followed from its ends, reaches a leaf without passing a tensor in ``known``."""
    return any(_leaf(node) is not None for node in _nodes(ends, stop=known))


def captured_tensors(run: Run) -> tuple[Tensor, ...]:
    """The tensors that a computation reads, differentiably, and does not start from.

    Args:
        run: does the same at each call.

    Raises:
        InvalidArgumentError: one that a gradient cannot be carried to.
    """
    ends, starts = run()
    if not depends_on_others(ends, starts):
        return ()
    with _Arguments() as arguments:
        ends_again, _ = run()
    before, now = _nodes(ends), _nodes(ends_again)
    edges = {edge for node in now - before for edge in _behind(node) if edge[0] in before}
    return tuple(_tensor_at(edge, edges, arguments.seen) for edge in edges)


def _tensor_at(edge: Edge, edges: set[Edge], seen: dict[Edge, Tensor]) -> Tensor:
    leaf = _leaf(edge[0])
    tensor = seen.get(edge) if leaf is None else leaf
    if tensor is None:
        raise InvalidArgumentError(
            f"loss or model read a tensor (made by {edge[0].name()}) that StepAdjoint cannot find: {_INSTEAD}"
        )
    # Its gradient would contain that of the tensors made from it, which flows back to it once more.
    others = {node for node, _ in edges} - {edge[0]}
    if edge[0] in _reached(after for node in others for after in _behind(node)):
        raise InvalidArgumentError(
            f"loss or model read a tensor of shape {tuple(tensor.shape)} that requires a gradient, and also "
            f"one that was made from it before: make it within the loss, or {_INSTEAD}"
        )
    return tensor


class _Arguments(TorchFunctionMode):
    """Keeps the tensors that functions are called with, by where their gradients go."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Edge, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function."""
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor) and is_concrete(value) and value.requires_grad:
                self.seen.setdefault(_edge(value), value)
        return func(*args, **kwargs)


def _edge(tensor: Tensor) -> Edge:
    node, place, *_ = get_gradient_edge(tensor)
    return node, place


def _leaf(node: Node) -> Tensor | None:
    """The tensor that a node accumulates gradients for, if that is what it does."""
    return None if node.next_functions else getattr(node, "variable", None)


def _nodes(ends: Iterable[Tensor], stop: Iterable[Tensor] = ()) -> set[Node]:
    """The nodes of a graph from its ends to its leaves, without the graph behind the tensors in ``stop``."""
    closed = {_edge(value) for value in stop if value.requires_grad}
    return _reached((_edge(value) for value in ends if value.requires_grad), closed)


def _reached(edges: Iterable[Edge], closed: Iterable[Edge] = ()) -> set[Node]:
    found: set[Node] = set()
    waiting = list(edges)
    while waiting:
        edge = waiting.pop()
        if edge[0] not in found and edge not in closed:
            found.add(edge[0])
            waiting.extend(_behind(edge[0]))
    return found


def _behind(node: Node) -> list[Edge]:
    return [(behind, place) for behind, place in node.next_functions if behind is not None]
