r"""Which linear layers of a model make its logits.

Registration order does not say it: a headless network ends with a layer of its body, and nothing keeps a
model from registering its classifier first. Two sources do say it.

**What the model declares**: a method ``get_classifier`` (timm), an attribute with one of the names in use
(torchvision, transformers), the end of an ``nn.Sequential``, or the number of classes.

**What a batch shows.** The output of every linear layer is cut out of the graph and made a variable of its
own. A layer is a classifier if an output y of the model depends on such variables z and on no parameter past
them, and if their influence is ``dy = a dz + b 1``: a factor, a shift that all classes share, a mean or a
choice among the rows. That leaves the order of the classes alone; an activation does not. One gradient tells
them apart: sent back from y, a direction v that sums to zero arrives at z as a multiple of itself. Several
layers may share in y, but if another linear layer works on the output of one, it is a residual branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etflayers._torch import tree_iter
from etflayers.checks import require
from etflayers.nn.base import CodeHead

__all__ = ["find_classifiers", "places_of"]

# Attributes that hold classifiers in torchvision, timm, transformers and the code of many others. Two of them
# together are those of a model that is distilled by a token of its own.
_NAMES = (
    "classifier",
    "cls_classifier",
    "classifier_distill",
    "distillation_classifier",
    "classification_head",
    "head",
    "head_dist",
    "heads",
    "fc",
    "score",
    "logits_proj",
)
# What may follow the classifier in an nn.Sequential.
_AFTER = (nn.Identity, nn.Dropout, nn.Flatten, nn.Unflatten, nn.Softmax, nn.LogSoftmax)


def find_classifiers(
    model: nn.Module,
    *,
    name: str | Iterable[str] | None = None,
    num_classes: int | None = None,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
) -> dict[str, nn.Linear]:
    """The linear layers that make the logits of a model, by name: what ``replace_classifier`` replaces.

    Most models have one. Distilled ones have two, with as many classes each. The first of these that is there
    answers:

    1. ``name``;
    2. ``example_inputs``: the model is run on them once, in eval mode, and the layers are found whose outputs
       are the output of the model (up to what leaves the order of the classes alone);
    3. the method ``model.get_classifier()``;
    4. attributes named ``classifier``, ``head``, ``fc``, ``score`` and the like; of a small network found
       there, its last linear layer;
    5. the last layer of an ``nn.Sequential``, or the answer of the only part of a wrapper that has
       parameters;
    6. the only linear layer with ``num_classes`` outputs or, without that argument, with as many as
       ``model.config.num_labels`` or ``model.num_classes`` says or, where these say nothing, as a head has
       that is given to :func:`~etflayers.nn.replace_classifier`.

    Args:
        model: any module that contains an ``nn.Linear``.
        name: dotted name of the layer, or names of several, as in ``model.named_modules()``.
        num_classes: outputs that the layer must have; chooses where several are found.
        example_inputs: a batch: one tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        Dotted names and layers, in the order of registration.

    Raises:
        InvalidArgumentError: no layer is found, layers of several sizes, or none with ``num_classes``
            outputs.

    >>> class Net(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.out, self.body = nn.Linear(8, 3), nn.Linear(5, 8)
    ...
    ...     def forward(self, x):
    ...         return self.out(self.body(x).relu())
    >>> find_classifiers(Net(), example_inputs=torch.zeros(1, 5))
    {'out': Linear(in_features=8, out_features=3, bias=True)}
    """
    return find_for(None, model, name=name, num_classes=num_classes, example_inputs=example_inputs)


def find_for(
    head: object,
    model: nn.Module,
    *,
    name: str | Iterable[str] | None,
    num_classes: int | None,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None,
) -> dict[str, nn.Linear]:
    """``find_classifiers`` for ``head``, whose ``num_classes`` is the last resort, not a condition."""
    require(
        not isinstance(model, nn.Linear),
        "model is itself an nn.Linear, which cannot be replaced inside itself: use the head in its place",
    )
    linears = {place: layer for place, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    require(
        bool(linears), "model has no nn.Linear to replace: put the head in where the model makes its logits"
    )
    if name is not None:
        found = [_named(model, each) for each in ([name] if isinstance(name, str) else name)]
    elif example_inputs is not None:
        found = _from_a_batch(model, list(linears.values()), example_inputs)
    else:
        # A part such as fc=nn.Identity() says that there is no classifier.
        silent = isinstance(head, nn.Module) and not _named_parts(model)
        offered = getattr(head, "num_classes", None) if silent else None
        found = _declared(model) or _by_count(model, list(linears.values()), num_classes, offered)
    answer = {place: layer for place, layer in linears.items() if any(layer is other for other in found)}
    sizes = {place: (layer.in_features, layer.out_features) for place, layer in answer.items()}
    if num_classes is not None:
        answer = {place: layer for place, layer in answer.items() if layer.out_features == num_classes}
        require(
            bool(answer) or not sizes,
            f"num_classes={num_classes}, but what makes the logits of the model has other (in_features, "
            f"out_features): {sizes}",
        )
    require(
        len({layer.out_features for layer in answer.values()}) <= 1,
        f"model has several layers that may make its logits, with (in_features, out_features) {sizes}: "
        "choose by name=, num_classes= or example_inputs=",
    )
    require(bool(answer), _not_found(model, example_inputs is not None))
    return answer


def places_of(model: nn.Module, module: nn.Module) -> list[str]:
    """All names under which ``module`` is registered in the model."""
    return [place for place, other in model.named_modules(remove_duplicate=False) if other is module]


def _named(model: nn.Module, name: str) -> nn.Linear:
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = {place: module for place, module in modules.items() if isinstance(module, nn.Linear)}
    found = type(modules[name]).__name__ if name in modules else "nothing"
    require(
        name in linears,
        f"name must be that of an nn.Linear in the model, one of {list(linears)}: {name!r} is {found}",
    )
    return linears[name]


def _declared(model: nn.Module) -> list[nn.Linear]:
    """The classifiers by the model's own account; none if it does not say, or says that it has none."""
    if callable(getattr(model, "get_classifier", None)):
        answer = model.get_classifier()  # type: ignore[operator]
        return _linears_of(answer if isinstance(answer, (tuple, list)) else [answer])
    if _named_parts(model):
        return _linears_of([model])
    if isinstance(model, nn.Sequential):
        parts = [part for part in model if not isinstance(part, _AFTER)][-1:]
    else:
        parts = [part for part in model.children() if next(part.parameters(), None) is not None]
    if len(parts) != 1:
        return []
    return [parts[0]] if isinstance(parts[0], nn.Linear) else _declared(parts[0])


def _named_parts(module: nn.Module) -> list[nn.Module]:
    return [part for name in _NAMES if isinstance(part := getattr(module, name, None), nn.Module)]


def _linears_of(parts: Iterable[object]) -> list[nn.Linear]:
    """Of each part those that bear one of the names, or else the last one.

    In a head of a few layers registration order is the order of calls.
    """
    found: list[nn.Linear] = []
    for part in parts:
        if isinstance(part, nn.Module) and (named := _named_parts(part)):
            found += _linears_of(named)
        elif isinstance(part, nn.Module):
            found += [module for module in part.modules() if isinstance(module, nn.Linear)][-1:]
    return found


def _by_count(
    model: nn.Module, linears: list[nn.Linear], num_classes: int | None, offered: int | None
) -> list[nn.Linear]:
    if num_classes is None:
        config = getattr(model, "config", None)
        num_classes = getattr(config, "num_labels", None) or getattr(model, "num_classes", None) or offered
    if callable(getattr(model, "get_classifier", None)):
        return []  # it has answered that it has none
    layers = [layer for layer in linears if layer.out_features == num_classes]
    return layers if len(layers) == 1 else []


def _from_a_batch(model: nn.Module, linears: list[nn.Linear], example_inputs: object) -> list[nn.Linear]:
    """The layers whose outputs become the model's output: see the head of this module."""
    args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (args, {})
    cuts: list[_Cut] = []

    def cut(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        cuts.append(_Cut(layer, args, output.detach().requires_grad_()))
        return cuts[-1].output.clone()  # what follows may write into it

    # The same memory under new variables: frozen parameters count, and no gradient is left behind.
    parameters = {
        name: parameter.detach().requires_grad_()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    modes = [(module, module.training) for module in model.modules()]
    hooks = [layer.register_forward_hook(cut) for layer in linears]
    try:
        model.eval()
        with torch.enable_grad():
            output = torch.func.functional_call(model, parameters, args, kwargs)
        found: list[nn.Linear] = []
        for logits in tree_iter(output):
            if not isinstance(logits, Tensor) or not logits.requires_grad or logits.shape[-1:].numel() < 2:
                continue
            direction = torch.linspace(-1, 1, logits.shape[-1], device=logits.device).to(logits.dtype)
            gradients = torch.autograd.grad(
                logits,
                (*(cut.output for cut in cuts), *parameters.values()),
                direction.expand_as(logits),
                retain_graph=True,
                allow_unused=True,
            )
            reached = [(cut.layer, g) for cut, g in zip(cuts, gradients, strict=False) if g is not None]
            layers = [layer for layer, _ in reached]
            past = any(g is not None for g in gradients[len(cuts) :])
            if not past and all(_is_multiple(g, direction) for _, g in reached) and not _feed(layers, cuts):
                found += layers
        return found
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode


class _Cut(NamedTuple):
    """A call of a linear layer, with its output as a variable of its own."""

    layer: nn.Linear
    args: tuple[Tensor, ...]
    output: Tensor


def _feed(layers: list[nn.Linear], cuts: list[_Cut]) -> bool:
    """Whether any linear layer works on the output of one of these."""
    outputs = [cut.output for cut in cuts if cut.layer in layers]
    inputs = [arg for cut in cuts for arg in cut.args if arg.requires_grad]
    if not outputs or not inputs:
        return False
    ones = [torch.ones_like(each) for each in inputs]
    reached = torch.autograd.grad(inputs, outputs, ones, retain_graph=True, allow_unused=True)
    return any(gradient is not None for gradient in reached)


def _is_multiple(rows: Tensor, direction: Tensor) -> bool:
    """Whether each row is a multiple of the direction."""
    if rows.shape[-1:] != direction.shape:
        return False
    rest = rows - (rows @ direction / (direction @ direction)).unsqueeze(-1) * direction
    return bool(rest.norm() <= 8 * torch.finfo(rows.dtype).eps * rows.norm())


def _not_found(model: nn.Module, ran: bool) -> str:
    heads = {place: type(m).__name__ for place, m in model.named_modules() if isinstance(m, CodeHead)}
    if heads:
        return f"model has the heads {heads} already: restore_linear(model) makes linear layers of them again"
    if ran:
        return (
            "no nn.Linear of the model makes its output: the model ends without a classifier, or with one of "
            "another kind; if it applies an activation to its logits, give name="
        )
    return (
        "model does not say which linear layer makes its logits, and may have none that does: give name=, "
        "one of model.named_modules(), or example_inputs=, a batch on which to see it"
    )
