r"""Steps of the inner loop that are traced and compiled once, and then run for every t.

What a step costs beside its convolutions are passes over memory: normalization and activations, and many more
in their second derivatives. Dynamo cannot follow a double backward. So the step, with its gradient and its
second-derivative products, is traced while it runs on tensors without values (``make_fx``); that leaves one
straight list of operations, which Inductor fuses. The number of the step is an input like any other.

A trace has forgotten the Python that made it. So whatever may differ between two calls has to be an input, or
has to be noticed: parameters that are not trained, and other tensors that the loss reads, become inputs;
random numbers and branches on values are refused; modes and shapes are compared; and every call holds its
first loss against that of the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from etflayers._torch import compile_graph, is_operator, without_modes
from etflayers.checks import require, require_values
from etflayers.distill.objective import InnerObjective
from etflayers.distill.problem import InnerProblem, Mode, Pulled, State, Step, Taken, lacks_forward_mode
from etflayers.errors import EtfLayersError, InvalidArgumentError

__all__ = ["CompileCache", "CompiledProblem"]

_LARGEST = 16  # functions that a cache keeps; a loop needs two, for the step and for its derivative
_INSTEAD = "use StepAdjoint(compile=False) for it"

# What is traced: a step and the cotangents after it, to tensors, of which some may be missing.
Traceable = Callable[[Step, State], list[Tensor | None]]


@dataclass(frozen=True)
class _Signature:
    """What a compiled function holds for: the Python that was traced, and the tensors that it saw."""

    kind: str
    objective: InnerObjective
    names: tuple[tuple[str, ...], ...]
    optimizer: tuple[object, ...]
    needed: tuple[bool, ...]
    tensors: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
    surroundings: tuple[object, ...]

    @classmethod
    def of(cls, kind: str, problem: InnerProblem, step: Step, inputs: Sequence[Tensor]) -> _Signature:
        rule = problem.optimizer
        values = (getattr(rule, entry.name) for entry in fields(rule))  # type: ignore[arg-type]
        return cls(
            kind,
            problem.objective,
            # In their order, which decides where a tensor goes, and which equal dicts need not share.
            (tuple(problem.objective.layout.shapes), tuple(step.buffers), problem.names),
            (type(rule), *(None if isinstance(value, Tensor) else value for value in values)),
            step.needed,
            tuple((value.shape, value.dtype, value.device) for value in inputs),
            (
                torch.get_num_threads(),
                torch.get_default_dtype(),
                torch.are_deterministic_algorithms_enabled(),
            ),
        )


@dataclass(frozen=True)
class _Compiled:
    """Code, and what it is called with beside the inputs: the tensors that the trace met on its way."""

    code: Callable[..., Sequence[Tensor]]
    present: tuple[bool, ...]
    constants: tuple[str | Tensor, ...]

    def __call__(self, model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        known = dict(model.named_parameters())
        constants = [known[value].detach() if isinstance(value, str) else value for value in self.constants]
        found = iter(self.code(*inputs, *constants))
        return [next(found) if here else None for here in self.present]


class CompileCache:
    """The compiled functions of one adjoint, the one used last at the end; a copy starts empty."""

    def __init__(self) -> None:
        self._entries: list[tuple[_Signature, _Compiled]] = []

    def get(self, signature: _Signature, make: Callable[[], _Compiled]) -> _Compiled:
        """What was compiled for this signature, or what ``make`` compiles now."""
        # Compared one by one: a loss may be any object, so there may be no hash.
        place = next((i for i, (known, _) in enumerate(self._entries) if known == signature), None)
        entry = (signature, make()) if place is None else self._entries.pop(place)
        self._entries = [*self._entries, entry][-_LARGEST:]
        return entry[1]

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[type[CompileCache], tuple[()]]:
        return CompileCache, ()


@dataclass
class CompiledProblem:
    """Takes the steps of ``problem`` by compiled code: the same numbers up to rounding."""

    problem: InnerProblem
    cache: CompileCache
    _compared: bool = field(default=False, init=False)

    def advance(self, step: Step) -> Taken:
        """See :meth:`InnerProblem.advance`."""

        def taken(step: Step, _: State) -> list[Tensor | None]:
            loss, state, buffers = self.problem.advance(step)
            return [loss, *state, *buffers.values()]

        # Before anything is traced, so that an error of the model is told as its own.
        expected = None if self._compared else self.problem.loss(step)
        loss, *values = self._run("advance", taken, replace(step, needed=()), ())
        if expected is not None:
            self._require_same(loss, expected)
        state, rest = values[: len(step.state)], values[len(step.state) :]
        return Taken(loss, tuple(state), dict(zip(step.buffers, rest, strict=True)))

    def pull(self, step: Step, cotangents: State, mode: Mode) -> Pulled:
        """See :meth:`InnerProblem.pull`."""

        def pulled(step: Step, cotangents: State) -> list[Tensor | None]:
            loss, state, controls = self.problem.pull(step, cotangents, mode)
            return [loss, *state, *controls]

        loss, *values = self._run(f"pull in {mode} mode", pulled, step, cotangents)
        state, controls = values[: len(step.state)], values[len(step.state) :]
        return Pulled(loss, tuple(state), controls)

    def tolerance(self, loss: Tensor) -> float:
        """See :meth:`InnerProblem.tolerance`; under autocast fused operations skip roundings in between."""
        autocast = self.problem.objective.autocast
        return float(torch.finfo(loss.dtype if autocast is None else autocast).eps ** 0.5)

    def _run(self, kind: str, function: Traceable, step: Step, cotangents: State) -> list[Any]:
        inputs = _flat(step, cotangents)
        objective = self.problem.objective
        signature = _Signature.of(kind, self.problem, step, inputs)
        compiled = self.cache.get(
            signature, lambda: _compile(function, step, cotangents, inputs, objective.model)
        )
        with torch.no_grad():
            return compiled(objective.model, inputs)

    def _require_same(self, loss: Tensor, expected: Tensor) -> None:
        self._compared = True
        require_values(
            (loss - expected).abs() <= self.tolerance(loss) * (1 + expected.abs()),
            "compile=True: the compiled step gives another loss than the model gives now, so something that "
            "model or loss read has changed since the step was traced, or changes from call to call: keep it "
            f"in a buffer or in a tensor that is changed in place, or {_INSTEAD}",
        )


def _flat(step: Step, cotangents: State) -> list[Tensor]:
    """All tensors of a step in one list; contiguous, because compiled code holds for one layout."""
    # In float64 even for float32 parameters: a power of a decay rate close to 1 loses digits otherwise.
    number = torch.full((), float(step.t), dtype=torch.float64, device=step.state[0].device)
    values = (*step.state, *step.buffers.values(), *step.controls, *cotangents)
    return [number, *(value.detach().contiguous() for value in values)]


def _unflat(values: Sequence[Tensor], like: Step, cotangents: State) -> tuple[Step, State]:
    """The step and the cotangents again from the list of their tensors: undoes :func:`_flat`."""
    rest = iter(values)
    number = next(rest)
    state = tuple(next(rest) for _ in like.state)
    buffers = {name: next(rest) for name in like.buffers}
    controls = tuple(next(rest) for _ in like.controls)
    return Step(number, state, buffers, controls, like.needed), tuple(next(rest) for _ in cotangents)


def _compile(
    function: Traceable, step: Step, cotangents: State, inputs: Sequence[Tensor], model: nn.Module
) -> _Compiled:
    present: tuple[bool, ...] = ()

    def flat(*values: Tensor) -> list[Tensor]:
        nonlocal present
        found = function(*_unflat(values, step, cotangents))
        present = tuple(value is not None for value in found)
        return [value for value in found if value is not None]

    with without_modes():  # what counts or logs operators is not to see those of a trace
        graph = _traced(flat, inputs)
        constants = _lift_constants(graph)
        code = _inductor(graph, [*inputs, *(value.detach() for value in constants)])
    names = {id(value): name for name, value in model.named_parameters()}
    return _Compiled(code, present, tuple(names.get(id(value), value) for value in constants))


def _traced(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    try:
        graph: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except EtfLayersError:
        raise
    except Exception as error:
        if lacks_forward_mode(error):
            raise
        raise InvalidArgumentError(
            "compile=True: the inner step cannot be traced, as when model or loss branch on the values of "
            f"tensors; {_INSTEAD}: {_first_line(error)}"
        ) from error
    graph.graph.eliminate_dead_code()
    operators = {node.target for node in graph.graph.nodes if is_operator(node.target)}
    random = sorted(str(o) for o in operators if torch.Tag.nondeterministic_seeded in o.tags)
    require(
        not random,
        f"compile=True: model or loss draw random numbers ({', '.join(random)}), as for dropout or "
        f"augmentation, which a compiled step cannot replay; {_INSTEAD}",
    )
    require(
        torch.ops.aten._local_scalar_dense.default not in operators,
        "compile=True: model or loss convert a tensor to a number, as .item() and float() do, and a compiled "
        f"step has none: keep it a tensor, or {_INSTEAD}",
    )
    # Tangents that are known to be zero are tensors that may not be written to; to Inductor, plain zeros.
    for node in graph.graph.find_nodes(
        op="call_function", target=torch.ops.aten._efficientzerotensor.default
    ):
        node.target = torch.ops.aten.zeros.default
    return graph


def _lift_constants(graph: fx.GraphModule) -> list[Tensor]:
    """Make the tensors that a graph refers to its last inputs, to read what they hold when it runs."""
    constants: list[Tensor] = []
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in graph.graph.find_nodes(op="get_attr"):
        value = getattr(graph, node.target, None)
        if not isinstance(value, Tensor):
            continue
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"constant_{len(constants)}")
        node.replace_all_uses_with(last)
        graph.graph.erase_node(node)
        constants.append(value)
    graph.recompile()
    return constants


def _inductor(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    try:
        with torch.no_grad():
            return compile_graph(graph, examples)
    except Exception as error:
        raise InvalidArgumentError(
            "compile=True: the inner step was traced but could not be compiled (is there a C++ compiler, g++ "
            f"or the one that the variable CXX names?); {_INSTEAD}: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
