"""Four gloo ranks that share the classes, all of them or two and two, equal one process with all classes.

What needs no ranks is in ``tests/functional/test_class_parallel.py``.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from etflayers.errors import EtfLayersError
from etflayers.functional import (
    ClassShard,
    class_parallel_cross_entropy,
    class_parallel_etf_cross_entropy,
)
from etflayers.geometry import is_simplex_etf, simplex_etf
from etflayers.nn import (
    ClassMeanHead,
    ClassParallel,
    CodeHead,
    ETFCrossEntropy,
    FeatureMovingAverage,
    FixedCodeHead,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    UnitRowHead,
)
from tests.functional.test_class_parallel import CASES, Case, problem
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

WORLD = 4
FSDP_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp = pytest.mark.skipif(not FSDP_ON_CPU, reason="FSDP2 of this PyTorch does not run on a CPU")
Pairs = dict[str, tuple[Any, Any]]  # what was got and what was expected


# --- The loss as a function ---


def reference(case: Case) -> tuple[Tensor, ...]:
    """Loss and gradients of one process, in float64, by PyTorch."""
    features, weight, bias, targets = problem(case)
    options = {"ignore_index": -100, "reduction": "mean", **(case.options or {})}
    options.pop("chunk_size", None)
    scale = options.pop("scale", 1.0)
    leaves = [t.double().requires_grad_() for t in (features, weight, bias) if t is not None]
    if case.canonical:
        frame = simplex_etf(case.num_classes, case.canonical, dtype=torch.float64)
        logits = F.linear(leaves[0], frame)
    else:
        logits = F.linear(*leaves)
    logits = scale * logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)
    if (targets == options["ignore_index"]).all():
        loss = 0 * logits.sum()  # where F.cross_entropy is NaN
    if options["reduction"] == "none":
        loss = loss.view(targets.shape)
    used = leaves[:1] if case.canonical else leaves
    return loss.detach(), *torch.autograd.grad((loss * cotangent(loss)).sum(), used)


def cotangent(loss: Tensor) -> Tensor:
    return torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape) / loss.numel()


def losses(case: Case, group: dist.ProcessGroup, rank: int) -> Pairs:
    features, weight, bias, targets = problem(case)
    shard = ClassShard.chunk(case.num_classes, group)
    if case.edges:
        if dist.get_world_size(group) != WORLD:
            return {}
        shard = ClassShard(case.num_classes, case.edges[rank], case.edges[rank + 1], group)
    leaves = [features.requires_grad_()]
    if case.canonical:
        loss = class_parallel_etf_cross_entropy(features, targets, shard, **(case.options or {}))
    else:
        leaves += [t[shard.rows].clone().requires_grad_() for t in (weight, bias) if t is not None]
        loss = class_parallel_cross_entropy(
            leaves[0],
            leaves[1],
            targets,
            shard,
            local_bias=None if bias is None else leaves[2],
            **(case.options or {}),
        )
    grads = torch.autograd.grad((loss * cotangent(loss)).sum(), leaves)
    expected_loss, *expected = reference(case)
    expected[1:] = [grad[shard.rows] for grad in expected[1:]]
    names = ("features", "weight", "bias")
    return {"loss": (loss.detach(), expected_loss)} | dict(
        zip(names, zip(grads, expected, strict=True), strict=False)
    )


def of_dtensors(mesh: Any) -> Pairs:
    """The weight and bias of PyTorch's linear layer, as they are once their rows are divided."""
    case = CASES["bias"]
    features, weight, bias, targets = problem(case)
    assert bias is not None
    leaves = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias)]
    loss = class_parallel_cross_entropy(features, leaves[0], targets, local_bias=leaves[1])
    loss.backward()
    expected, _, *grads = reference(case)
    found: Pairs = {"loss": (loss.detach(), expected)}
    for name, leaf, grad in zip(("weight", "bias"), leaves, grads, strict=True):
        assert leaf.grad is not None
        found[name] = (leaf.grad.full_tensor(), grad)  # type: ignore[attr-defined]
    return found


def refusals(group: dist.ProcessGroup, rank: int) -> list[str]:
    """What each rank raises; were one to go on alone, the others would wait for it."""
    features, weight, _, targets = problem(CASES["plain"])
    shard = ClassShard.chunk(11, group)
    calls: list[Callable[[], object]] = [
        lambda: class_parallel_cross_entropy(features, weight[shard.rows], targets + 1, shard),
        lambda: class_parallel_cross_entropy(features, weight[shard.rows], targets - 200, shard),
        # A sampler that divides the data over the ranks that share the classes.
        lambda: class_parallel_cross_entropy(
            features, weight[shard.rows], targets.flatten().roll(rank).view(2, 4), shard
        ),
        # Every rank takes itself for the first.
        lambda: class_parallel_cross_entropy(features, weight[:3], targets, ClassShard(11, 0, 3, group)),
    ]
    raised = [kind_of_error(call) for call in calls]
    dist.set_debug_level(dist.DebugLevel.INFO)
    different = features + (rank == 1) * torch.eye(4, 5)
    raised.append(
        kind_of_error(lambda: class_parallel_cross_entropy(different, weight[shard.rows], targets, shard))
    )
    shorter = features[: 2 - (rank == 1)]
    raised.append(
        kind_of_error(
            lambda: class_parallel_cross_entropy(shorter, weight[shard.rows], targets[: len(shorter)], shard)
        )
    )
    raised.append(
        kind_of_error(lambda: class_parallel_cross_entropy(features, weight[shard.rows], targets, shard))
    )
    dist.set_debug_level(dist.DebugLevel.OFF)
    return raised


def kind_of_error(call: Callable[[], object]) -> str:
    try:
        call()
    except EtfLayersError as error:
        return type(error).__name__
    return "none"


# --- Heads ---


class AxesHead(CodeHead):
    """A head of a user's own: classes 2i and 2i + 1 are the two directions of axis i, turned by an angle."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.angle = nn.Parameter(torch.tensor(0.3))

    @property
    def frame(self) -> Tensor:
        axes = torch.eye(self.in_features)
        turned = self.angle.cos() * axes + self.angle.sin() * axes.roll(1, 0)
        return torch.stack((turned, -turned), 1).flatten(0, 1)[: self.num_classes]


class OwnForward(UnitRowHead):
    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(features, targets) ** 3


HEADS: dict[str, Callable[[], nn.Module]] = {
    "unit_rows": lambda: UnitRowHead(6, 5, scale=nn.Parameter(torch.tensor(2.0)), normalize=True),
    "haar": lambda: FixedETFHead(6, 5, rotation="haar", scale=nn.Parameter(torch.tensor(2.0))),
    "canonical": lambda: FixedETFHead(6, 5, rotation="canonical", scale=nn.Parameter(torch.tensor(2.0))),
    "reflected": lambda: FixedETFHead(4, 5, scale=3.0),
    "nearest": lambda: NearestETFHead(6, 5, scale=2.0, normalize=True),
    "learned": lambda: LearnedETFHead(6, 5, scale=2.0),
    "orthoplex": lambda: FixedCodeHead(4, 5, code="orthoplex", scale=nn.Parameter(torch.tensor(2.0))),
    "kerdock": lambda: FixedCodeHead(4, 5, code="kerdock", scale=2.0, normalize=True),
    "stored code": lambda: FixedCodeHead(2, 5, code="optimized", scale=2.0),
    "class means": lambda: ClassMeanHead(3, 5, scale=2.0),
    "own": lambda: AxesHead(6, 5),
    "linear": lambda: nn.Linear(6, 5),
}


def batch(width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, width, generator=generator), torch.tensor([0, 1, 2, 3, 4, 1, 4, 0])


HERE = [0, 2, 3]  # of two or four ranks the last has no class that is here


def passes(head: nn.Module, world: int) -> dict[str, Any]:
    """Logits, and loss and gradients by way of the logits and without them."""
    parallel = world > 1
    found: dict[str, Any] = {}
    features, targets = batch(head.in_features)  # type: ignore[arg-type]
    some = isinstance(head, CodeHead) and head.active is not None
    if some:
        targets = torch.tensor(HERE)[targets % len(HERE)]
    for way in ("logits", "features", "prior"):
        head.zero_grad()
        leaf = features.clone().requires_grad_()
        if way != "logits" and isinstance(head, CodeHead):
            prior = torch.arange(1, 6) if way == "prior" else None
            loss: Any = ETFCrossEntropy(head, label_smoothing=0.1, prior=prior)(leaf, targets)
            loss.backward()
        elif way != "logits":
            assert isinstance(head, nn.Linear)
            if parallel:
                loss = class_parallel_cross_entropy(leaf, head.weight, targets, local_bias=head.bias)
            else:
                loss = F.cross_entropy(head(leaf), targets)
            loss.backward()
        else:
            logits = head(leaf, targets) if isinstance(head, CodeHead) else head(leaf)
            found["logits"] = whole(logits.detach())
            if some:  # the others are 1000 lower, which has fewer digits behind the point
                found["masked"] = found["logits"][:, [1, 4]] / 1000
                found["logits"] = found["logits"][:, HERE]
            if parallel and world == 2:
                with loss_parallel():
                    loss = F.cross_entropy(logits, targets)
                    loss.backward()
            else:
                # 5 classes leave one of 4 ranks without any, which loss_parallel of PyTorch cannot do.
                loss = F.cross_entropy(whole(logits), targets)
                loss.backward()
        found[f"{way}: loss"] = whole(loss.detach())
        found[f"{way}: features"] = leaf.grad
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None
            found[f"{way}: {name}"] = whole(parameter.grad)
    head.eval()
    found["eval"] = whole(head(features).detach())
    if some:
        found["eval"] = found["eval"][:, HERE]
    if isinstance(head, CodeHead):
        found["frame"] = head.frame.detach()
    return found


def from_meta(mesh: Any, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Frames of heads that were divided before they had values, and the logits with these."""
    torch.manual_seed(rank)
    found = {}
    for name in ("unit_rows", "haar", "canonical", "learned"):
        with torch.device("meta"):
            model = nn.ModuleDict({"head": HEADS[name]()})
        parallelize_module(model, mesh, {"head": ClassParallel()})
        model.to_empty(device="cpu")
        head: Any = model["head"]
        if isinstance(head.scale, Tensor):
            torch.nn.init.constant_(head.scale, 2.0)
        head.reset_parameters()
        found[name] = (head.frame.detach(), whole(head(batch(6)[0])).detach())
    return found


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return HEADS[name]()


def heads(name: str, mesh: Any, rank: int, *, some: bool = False) -> Pairs:
    """A divided head and one of one process; ``some``: of the classes HERE only."""
    model = nn.ModuleDict({"head": made(name, seed=rank)})  # the ranks draw different numbers
    others = sorted({*range(5)} - {*HERE})
    if some and mesh.size() == 2:
        model["head"].deactivate(others)
    if isinstance(model["head"], NearestETFHead | ClassMeanHead) and mesh.size() < WORLD:
        model["head"].averages.synchronize = False
    parallelize_module(model, mesh, {"head": ClassParallel()})
    if some and mesh.size() == WORLD:
        model["head"].deactivate(range(1, 5)).activate(HERE)
    start = {key: whole(tensor).clone() for key, tensor in model["head"].state_dict().items()}
    alone = made(name, seed=0)
    alone.load_state_dict(start)
    if name == "haar":
        model["head"].load_state_dict(start)  # of all classes, of which a rank takes its own
    got = passes(model["head"], mesh.size())
    for averages in (m for m in alone.modules() if isinstance(m, FeatureMovingAverage)):
        averages.synchronize = False
    expected = passes(alone, 1)
    return {key: (got[key], expected[key]) for key in expected}


def refused_heads(mesh: Any, both: Any) -> dict[str, str]:
    def refusal(call: Callable[[], object]) -> str:
        with pytest.raises(EtfLayersError) as caught:
            call()
        return str(caught.value)

    style = ClassParallel()
    divided = parallelize_module(UnitRowHead(6, 5), mesh, style)
    overwritten = parallelize_module(FixedETFHead(6, 4), mesh, style)
    overwritten.vertices.add_(0.1)
    mine = NearestETFHead(6, 5, process_group=both["classes"].get_group())
    return {
        "own forward": refusal(lambda: parallelize_module(OwnForward(6, 5), mesh, style)),
        "no head": refusal(lambda: parallelize_module(nn.Conv2d(3, 3, 1), mesh, style)),
        "twice": refusal(lambda: parallelize_module(divided, mesh, style)),
        "two dimensions": refusal(lambda: style._apply(UnitRowHead(6, 5), both)),
        "copy": refusal(lambda: copy.deepcopy(divided)),
        "pickle": refusal(lambda: pickle.dumps(divided)),
        "overwritten": refusal(lambda: overwritten(torch.ones(1, 6))),
        "default group": refusal(lambda: parallelize_module(NearestETFHead(6, 5), both["classes"], style)),
        "same samples": refusal(lambda: parallelize_module(mine, both["classes"], style)),
        "target that is not here": refusal(
            lambda: parallelize_module(UnitRowHead(6, 5).deactivate([1]), mesh, style)(*batch(6))
        ),
        "triton": refusal(lambda: ETFCrossEntropy(divided, impl="triton")(*batch(6))),
    }


# --- Training, over two dimensions of a mesh ---


class Classifier(nn.Module):
    """A body with a head, and the loss in its forward pass, as data parallelism wants it."""

    def __init__(self, head: CodeHead) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh())
        self.head = head
        self.loss = ETFCrossEntropy(head)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.body(inputs), targets)
        return loss


def train(model: nn.Module, share: slice) -> Tensor:
    """Losses of a few steps on a share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    found = []
    for step in range(3):
        inputs, targets = batch(3, seed=step)
        loss = model(inputs[share], targets[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def two_dimensions(name: str, both: Any, fsdp: bool) -> Pairs:
    def classifier() -> Classifier:
        torch.manual_seed(0)
        head = HEADS[name]()
        assert isinstance(head, CodeHead)
        if fsdp and isinstance(head.scale, nn.Parameter):
            del head.scale  # it is a scalar, which FSDP2 does not take
            head.scale = 2.0
        return Classifier(head)

    model, alone = classifier(), classifier()
    if isinstance(model.head, NearestETFHead) and isinstance(alone.head, NearestETFHead):
        model.head.averages.process_group = both["data"].get_group()
        alone.head.averages.synchronize = False
    parallelize_module(model, both["classes"], {"head": ClassParallel()})
    data = both["data"].get_local_rank()
    parallel: nn.Module = model
    if fsdp:
        fully_shard(model, mesh=both["data"])
    else:
        parallel = nn.parallel.DistributedDataParallel(model, device_mesh=both["data"])
    got = train(parallel, slice(4 * data, 4 * data + 4))
    dist.all_reduce(got, group=both["data"].get_group())
    found = {"losses": (got / 2, train(alone, slice(None)))}
    for key, expected in alone.named_parameters():
        owner, _, last = key.rpartition(".")
        # PyTorch's DDP leaves a DTensor that is no nn.Parameter any more.
        found[key] = (whole(getattr(model.get_submodule(owner), last)).detach(), expected.detach())
    return found


# --- Averages ---


def averages(group: dist.ProcessGroup, momentum: Any, data: dist.ProcessGroup | None = None) -> Pairs:
    """Means of the classes of a rank; with a group for the data, on a share of the batch."""
    shard = ClassShard.chunk(5, group)
    options: dict[str, Any] = {"momentum": momentum, "dtype": torch.float64, "ignore_index": 2}
    rows = (shard.start, shard.stop)
    where: dict[str, Any] = {"synchronize": False} if data is None else {"process_group": data}
    mine = FeatureMovingAverage(6, 5, class_range=rows, **where, **options)
    alone = FeatureMovingAverage(6, 5, synchronize=False, **options)
    share = slice(None) if data is None else slice(4 * dist.get_rank(data), 4 * dist.get_rank(data) + 4)
    for step in range(3):
        features, targets = batch(6, seed=step)
        features = features.double()
        targets = targets.roll(step)
        ours, theirs = features[share].clone().requires_grad_(), features.clone().requires_grad_()
        got, expected = mine(ours, targets[share]), alone(theirs, targets)[shard.rows]
    got.square().sum().backward()
    expected.square().sum().backward()
    assert mine.class_range == rows
    assert theirs.grad is not None
    factor = 1 if data is None else 2  # each rank has the same loss, and their sum is differentiated
    return {
        "means": (got.detach(), expected.detach()),
        "counts": (mine.counts, alone.counts[shard.rows]),
        "updates": (mine.updates, alone.updates[shard.rows]),
        "features": (ours.grad, factor * theirs.grad[share]),
    }


# --- Checkpoints ---

SAVED = ("unit_rows", "haar", "canonical", "nearest", "learned", "linear")


def save(folder: str, mesh: Any, rank: int) -> dict[str, Tensor]:
    """Save heads of four ranks; their logits."""
    model = nn.ModuleDict({name: made(name, seed=rank) for name in SAVED})
    parallelize_module(model, mesh, {name: ClassParallel() for name in SAVED})
    model.eval()
    dcp.save(model.state_dict(), checkpoint_id=folder)
    return {name: whole(model[name](batch(6)[0]).detach()) for name in SAVED}


def load(folder: str, mesh: Any) -> dict[str, Tensor]:
    """Load them into other heads, of the ranks of a mesh or of one process; their logits."""
    model = nn.ModuleDict({name: made(name, seed=99) for name in SAVED})
    if mesh is not None:
        model["nearest"].averages.synchronize = False  # type: ignore[union-attr]
        parallelize_module(model, mesh, {name: ClassParallel() for name in SAVED})
    model.eval()
    state = model.state_dict()
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state)
    return {name: whole(model[name](batch(6)[0]).detach()) for name in SAVED}


# --- One run of four ranks, and what it has to have found ---

AVERAGED = (0.3, None, "2/(t+1)")
TRAINED = ("unit_rows", "haar", "canonical", "nearest", "learned")


def of_one_rank(rank: int, folder: Path) -> dict[Any, Any]:
    four = init_device_mesh("cpu", (WORLD,))
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    meshes = {4: four, 2: both["classes"]}
    results: dict[Any, Any] = {}
    for ranks, mesh in meshes.items():
        group = mesh.get_group()
        for name, case in CASES.items():
            results["loss", name, ranks] = losses(case, group, dist.get_rank(group))
        for name in HEADS:
            results["head", name, ranks] = heads(name, mesh, rank)
            if name != "linear":
                results["some", name, ranks] = heads(name, mesh, rank, some=True)
        for momentum in AVERAGED:
            results["average", momentum, ranks] = averages(group, momentum)
    for name in TRAINED:
        results["trained", name, "ddp"] = two_dimensions(name, both, fsdp=False)
        if FSDP_ON_CPU:
            results["trained", name, "fsdp"] = two_dimensions(name, both, fsdp=True)
    results["averages, samples divided"] = averages(meshes[2].get_group(), 0.3, both["data"].get_group())
    results["from meta"] = from_meta(four, rank)
    results["dtensors"] = of_dtensors(four)
    results["refusals"] = refusals(four.get_group(), rank)
    results["refused heads"] = refused_heads(four, both)
    results["saved"] = save(f"{folder}/checkpoint", four, rank)
    results["loaded"] = load(f"{folder}/checkpoint", meshes[2])
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    return run_ranks(of_one_rank, WORLD, folder)


def require_close(pairs: Pairs, atol: float) -> None:
    for what, (got, expected) in pairs.items():
        torch.testing.assert_close(
            got.to(expected.dtype), expected, rtol=0, atol=atol, msg=lambda m, what=what: f"{what}: {m}"
        )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(
    ranks: list[dict[Any, Any]], name: str, world: int
) -> None:
    found = [results["loss", name, world] for results in ranks]
    assert all(found) or (CASES[name].edges and world == 2)
    for pairs in found:
        require_close(pairs, CASES[name].atol)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", HEADS)
def test_a_divided_head_is_the_head_of_one_process(
    ranks: list[dict[Any, Any]], name: str, world: int
) -> None:
    for results in ranks:
        require_close(results["head", name, world], 2e-6)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "linear"])
def test_a_divided_head_whose_classes_come_later_is_that_of_one_process(
    ranks: list[dict[Any, Any]], name: str, world: int
) -> None:
    for results in ranks:
        pairs = results["some", name, world]
        require_close(pairs, 2e-6)
        assert (pairs["masked"][0] < -0.9).all()


def test_heads_that_were_divided_without_values_get_them(ranks: list[dict[Any, Any]]) -> None:
    for name, (frame, logits) in ranks[0]["from meta"].items():
        torch.testing.assert_close(frame.norm(dim=1), torch.ones(5))
        assert is_simplex_etf(frame) or name == "unit_rows"
        inputs = F.normalize(batch(6)[0]) if name == "unit_rows" else batch(6)[0]
        torch.testing.assert_close(logits, 2 * inputs @ frame.mT)
        for results in ranks:
            assert torch.equal(results["from meta"][name][0], frame)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
@pytest.mark.parametrize("name", TRAINED)
def test_two_by_two_ranks_train_as_one_process(ranks: list[dict[Any, Any]], name: str, how: str) -> None:
    for results in ranks:
        require_close(results["trained", name, how], 2e-6)
    assert {"losses", "body.0.weight"} <= ranks[0]["trained", name, how].keys()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("momentum", AVERAGED)
def test_averages_of_some_classes_are_rows_of_all(
    ranks: list[dict[Any, Any]], momentum: Any, world: int
) -> None:
    for results in ranks:
        require_close(results["average", momentum, world], 1e-12)


def test_averages_of_some_classes_are_summed_over_other_samples(
    ranks: list[dict[Any, Any]],
) -> None:
    for results in ranks:
        require_close(results["averages, samples divided"], 1e-12)


def test_a_linear_layer_of_dtensors_says_itself_how_it_is_divided(ranks: list[dict[Any, Any]]) -> None:
    for results in ranks:
        require_close(results["dtensors"], 1e-6)


def test_every_rank_refuses_what_one_would_refuse(ranks: list[dict[Any, Any]]) -> None:
    for results in ranks:
        assert results["refusals"] == [
            "InvalidArgumentError",
            "InvalidArgumentError",
            "RanksDisagreeError",
            "RanksDisagreeError",
            "RanksDisagreeError",
            "RanksDisagreeError",
            "none",
        ]


def test_heads_that_cannot_be_divided_say_why(ranks: list[dict[Any, Any]]) -> None:
    expected = {
        "own forward": "OwnForward has a forward of its own",
        "no head": "must be a CodeHead or nn.Linear, got Conv2d",
        "twice": "already been divided",
        "two dimensions": "must have one dimension",
        "copy": "neither copied nor pickled",
        "pickle": "neither copied nor pickled",
        "overwritten": "no part of a simplex ETF",
        "default group": "process_group of NearestETFHead must be",
        "same samples": "share the classes",
        "target that is not here": "not here yet",
        "triton": "impl must not be 'triton'",
    }
    for results in ranks:
        for name, message in expected.items():
            assert message in results["refused heads"][name], name


def test_checkpoints_of_four_ranks_load_into_two_and_into_one(
    ranks: list[dict[Any, Any]], folder: Path
) -> None:
    with pytest.warns(UserWarning, match="assuming.*single process"):
        alone = load(f"{folder}/checkpoint", None)
    for name in SAVED:
        for results in ranks:
            torch.testing.assert_close(results["saved"][name], ranks[0]["saved"][name], rtol=0, atol=0)
            torch.testing.assert_close(results["loaded"][name], ranks[0]["saved"][name], rtol=0, atol=1e-6)
        torch.testing.assert_close(alone[name], ranks[0]["saved"][name], rtol=0, atol=1e-6)


@needs_fsdp
def test_the_script_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "many-classes.md").read_text(encoding="utf-8")
    script, _, _ = text.partition("```py\n")[2].partition("```")
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    finished = subprocess.run(
        [*command, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    head = UnitRowHead(64, 1000)
    state = {"head.prototypes": torch.zeros(1000, 64)}
    with pytest.warns(UserWarning, match="assuming.*single process"):
        dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    head.load_state_dict({"prototypes": state["head.prototypes"]})
    assert head.frame.norm(dim=1).gt(0.99).all()  # every row has come from some rank
