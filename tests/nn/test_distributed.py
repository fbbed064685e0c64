"""Two gloo ranks with unequal batches equal one process on the whole batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers.collectives import all_reduce_sum, world_size
from etflayers.errors import EtfLayersError
from etflayers.nn import (
    ClassMeanHead,
    EntropyRegularizer,
    FeatureMemory,
    FeatureMovingAverage,
    FixedETFHead,
    NearestETFHead,
    capture_targets,
    etf,
    expand_classes,
    provide_targets,
)
from tests.nn.test_targets import IMAGES, TARGETS, classifier, given_directly
from tests.ranks import run_ranks

WORLD = 2
STEPS = 3


@dataclass(frozen=True)
class Case:
    """Samples of rank 0 come first; the ranks hold different numbers of samples and of classes."""

    dtype: torch.dtype
    targets: tuple[int, ...]
    split: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        features = torch.randn(len(self.targets), 5, generator=generator, dtype=self.dtype)
        return features, torch.tensor(self.targets).roll(step // 2)

    def share(self, rank: int) -> slice:
        return slice(0, self.split) if rank == 0 else slice(self.split, None)


CASES = {
    "float32": Case(torch.float32, (0, 0, 1, 1, 0, 1, 2, 3, 3, 2, 3), split=4),
    "never-seen": Case(torch.float64, (0, 0, 1, -100, 0, 1, 2, 2), split=5),
}


HEADS: dict[str, Any] = {
    "nearest": lambda **o: NearestETFHead(6, 4, momentum=0.3, scale=2.0, proximity=0.1, **o),
    "class means": lambda **o: ClassMeanHead(6, 4, momentum=0.3, scale=2.0, **o),
    "class means, differentiated": lambda **o: ClassMeanHead(6, 4, momentum=0.3, detach=False, **o),
}


def make_model(dtype: torch.dtype, seed: int, head: str = "nearest") -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6, dtype=dtype), nn.Tanh(), HEADS[head](dtype=dtype))


def train(model: nn.Module, case: Case, rank: int | None) -> dict[str, Any]:
    """A few SGD steps on the whole batch (rank None) or the share of a rank; all that they produce."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    record: dict[str, Any] = {"logits": [], "grads": [], "states": []}
    for step in range(STEPS):
        features, targets = case.batch(step)
        valid = int((targets >= 0).sum())
        if rank is not None:
            features, targets = features[case.share(rank)], targets[case.share(rank)]
        with provide_targets(model, targets):
            logits: Tensor = model(features)
        # The mean over the whole batch: DDP averages gradients over ranks, so each sum counts WORLD times.
        factor = (1 if rank is None else WORLD) / valid
        loss = factor * F.cross_entropy(logits, targets, reduction="sum")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        record["logits"].append(logits.detach())
        record["grads"].append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        state = {name.removeprefix("module."): t.clone() for name, t in model.state_dict().items()}
        record["states"].append(state)
    return record


def averages(rank: int | None, **options: Any) -> list[Tensor]:
    """Means and their gradient for each momentum, with one scalar of the means for each rank as loss."""
    case = CASES["never-seen"]
    result = []
    for momentum in (0.3, None, "2/(t+1)"):
        average: Any = FeatureMovingAverage(5, 4, momentum=momentum, dtype=torch.float64, **options)
        for step in range(STEPS):
            features, targets = case.batch(step)
            if rank is not None:
                features, targets = features[case.share(rank)], targets[case.share(rank)]
            features.requires_grad_()
            means = average(features, targets)
        losses = [(means * (1 + r)).square().sum() for r in range(WORLD)]
        loss = losses[0] + losses[1] if rank is None else losses[rank]
        (grad,) = torch.autograd.grad(loss, features)
        result += [means.detach(), average.counts, average.updates, grad]
    return result


def soft_averages(rank: int | None) -> list[Tensor]:
    """The same with soft targets: a class has shares of samples on one rank, on both, or on none."""
    case = CASES["float32"]
    average = FeatureMovingAverage(5, 5, momentum=0.3, dtype=torch.float64)
    for step in range(STEPS):
        features, targets = case.batch(step)
        shares = F.one_hot(torch.stack((targets, targets.roll(3))), 5).double()
        shares = 0.875 * shares[0] + 0.125 * shares[1]
        if rank is not None:
            features, shares = features[case.share(rank)], shares[case.share(rank)]
        means = average(features.double(), shares)
    return [means, average.counts, average.updates]


ENTROPY_SPLITS = (7, 12, 13)  # of 13 samples: both ranks have some, the second has one, or none


def entropy(rows: slice) -> list[Tensor]:
    """The entropy of neighbors over all ranks and its gradient, with these rows on this one."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(13, 3, generator=generator, dtype=torch.float64)[rows].requires_grad_()
    loss = EntropyRegularizer(block_size=2)(features)
    return [loss.detach(), *torch.autograd.grad(loss, features)]


def looks() -> int:
    """How often three training passes look at the values of a frame."""
    model = nn.parallel.DistributedDataParallel(make_model(torch.float32, seed=0))
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(etf, "is_simplex_etf", lambda *_, **__: counted.append(1) or True)
        for step in range(STEPS):
            features, targets = CASES["float32"].batch(step)
            with provide_targets(model, targets):
                model(features)
    return len(counted)


def refusals(rank: int, head: NearestETFHead | ClassMeanHead) -> list[str]:
    """What rank 0 and the others raise for batches that only rank 0 cannot take."""
    bad: dict[str, tuple[Tensor, Tensor | None]] = {
        "width": (torch.ones(4, 5), torch.arange(4)),
        "dtype": (torch.ones(4, 6).long(), torch.arange(4)),
        "no targets": (torch.ones(4, 6), None),
        "range": (torch.ones(4, 6), torch.arange(4) + 1),
        "NaN": (torch.full((4, 6), torch.nan), torch.arange(4)),
    }
    head(torch.randn(8, 6), torch.arange(8) % 4)
    raised = []
    for features, targets in bad.values():
        before = copy.deepcopy(head.state_dict())
        try:
            head(features, targets) if rank == 0 else head(torch.randn(4, 6), torch.arange(4))
        except EtfLayersError as error:
            raised.append(type(error).__name__)
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    head(torch.randn(4, 6), torch.arange(4))  # and the run can go on
    return raised


def sessions(rank: int | None) -> dict[str, Any]:
    """Two sessions of a head that knows classes to come, with its memory, as one process or a rank."""
    case, results = CASES["float32"], {}
    model: nn.Module = make_model(torch.float64, seed=rank or 0)
    head: Any = model[2]  # type: ignore[index]
    head.deactivate([2, 3])  # before the model is wrapped
    if rank is not None:
        model = nn.parallel.DistributedDataParallel(model)
    memory = FeatureMemory(5, 4, capacity=3)
    for session, known in enumerate((2, 4)):
        head.activate(range(known))
        for step in range(STEPS):
            features, targets = case.batch(step)
            targets = targets % known
            if rank is not None:
                features, targets = features[case.share(rank)], targets[case.share(rank)]
            with provide_targets(model, targets):
                logits = model(features.double())
            memory.update(features, targets)
        results[f"logits {session}"] = logits.detach()
        results[f"head {session}"] = copy.deepcopy(head.state_dict())
    results["memory"] = memory.merged_over_ranks().state_dict()
    head.deactivate([3])
    bad = torch.tensor([3 if rank in (None, 0) else 0])
    before = copy.deepcopy(head.state_dict())
    try:
        head.train()(torch.ones(1, 6, dtype=torch.float64), bad)
    except EtfLayersError as error:
        results["refusal"] = type(error).__name__
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    torch.manual_seed(rank or 0)
    results["grown"] = expand_classes(ClassMeanHead(6, 4), 7)[0].initial_rows[4:]
    return results


def captured() -> tuple[Tensor, Tensor]:
    """Logits and a gradient under DDP in a loop that knows nothing of targets; each rank has all samples."""
    model = classifier()
    capture_targets(model)
    output = nn.parallel.DistributedDataParallel(model)(IMAGES, labels=TARGETS)
    output["loss"].backward()
    return output["logits"].detach(), model.body.weight.grad


def of_one_rank(rank: int, _: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for (name, case), head in product(CASES.items(), HEADS):
        # A seed of its own for each rank: DDP makes the start the same.
        model = nn.parallel.DistributedDataParallel(make_model(case.dtype, seed=rank, head=head))
        results[f"{head} {name}"] = train(model, case, rank)
    group = dist.new_group([0, 1])
    results["averages"] = averages(rank, process_group=group)
    results["soft"] = soft_averages(rank)
    results["local"] = averages(rank, synchronize=False)
    results["copy"] = copy.deepcopy(NearestETFHead(6, 4, process_group=group)).averages.process_group
    for split in ENTROPY_SPLITS:
        results[f"entropy {split}"] = entropy(slice(0, split) if rank == 0 else slice(split, None))
    results["looks"] = looks()
    results["sessions"] = sessions(rank)
    fixed = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(5, 6), FixedETFHead(6, 4)))
    results["fixed"] = fixed(torch.ones(1, 5)).detach()
    results["refusals"] = refusals(rank, NearestETFHead(6, 4))
    results["refusals of class means"] = refusals(rank, ClassMeanHead(6, 4))
    x = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(all_reduce_sum(x).pow(3), x, create_graph=True)
    results["reduce"] = (world_size(), first.detach(), torch.autograd.grad(first, x)[0])
    results["captured"] = captured()
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(of_one_rank, WORLD, tmp_path_factory.mktemp("ranks"))


def test_targets_are_captured_under_ddp(ranks: list[dict[str, Any]]) -> None:
    model = classifier()
    expected = given_directly(model)
    capture_targets(model)
    model(IMAGES, labels=TARGETS)["loss"].backward()
    for results in ranks:
        torch.testing.assert_close(results["captured"], (expected, model.body.weight.grad))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process(ranks: list[dict[str, Any]], name: str, head: str) -> None:
    case = CASES[name]
    expected = train(make_model(case.dtype, seed=0, head=head), case, rank=None)
    for rank, results in enumerate(ranks):
        got = results[f"{head} {name}"]
        for step in range(STEPS):
            share = case.share(rank)
            torch.testing.assert_close(
                got["logits"][step], expected["logits"][step][share], rtol=0, atol=1e-6
            )
            torch.testing.assert_close(got["grads"][step], expected["grads"][step], rtol=0, atol=1e-6)
            torch.testing.assert_close(got["states"][step], expected["states"][step], rtol=0, atol=1e-6)
    own = {"2.vertices", "2.global_mean"} if head == "nearest" else {"2.initial_rows"}
    assert own | {"2.averages.means", "2.averages.counts"} <= expected["states"][0].keys()


def test_averages_and_their_gradients_are_those_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    expected = averages(rank=None)
    case = CASES["never-seen"]
    for rank, results in enumerate(ranks):
        for index, (got, whole) in enumerate(zip(results["averages"], expected, strict=True)):
            is_gradient = index % 4 == 3
            torch.testing.assert_close(
                got, whole[case.share(rank)] if is_gradient else whole, rtol=0, atol=1e-12
            )


def test_averages_of_soft_targets_are_those_of_the_whole_batch(ranks: list[dict[str, Any]]) -> None:
    expected = soft_averages(rank=None)
    assert expected[1][-1] == 0  # a class without a share
    for results in ranks:
        for got, whole in zip(results["soft"], expected, strict=True):
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


def test_sessions_on_two_ranks_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """Logits, the head with its active classes, means and counts of the merged memory, and refusals."""
    expected, case = sessions(rank=None), CASES["float32"]
    for rank, results in enumerate(ranks):
        got = results["sessions"]
        for session in range(2):
            share = expected[f"logits {session}"][case.share(rank)]
            torch.testing.assert_close(got[f"logits {session}"], share, rtol=0, atol=1e-9)
            state = expected[f"head {session}"]
            torch.testing.assert_close(dict(got[f"head {session}"]), dict(state), rtol=0, atol=1e-9)
        for name in ("means", "counts"):
            torch.testing.assert_close(got["memory"][name], expected["memory"][name])
        assert torch.equal(got["memory"]["keys"], ranks[0]["sessions"]["memory"]["keys"])
        assert torch.equal(got["memory"]["features"], ranks[0]["sessions"]["memory"]["features"])
        assert torch.equal(got["grown"], ranks[0]["sessions"]["grown"])
    assert expected["head 0"]["active"].tolist() == [True, True, False, False]
    assert expected["head 1"]["active"].all()
    refused = [results["sessions"]["refusal"] for results in ranks]
    assert refused == ["InvalidArgumentError", "RanksDisagreeError"]


@pytest.mark.parametrize("split", ENTROPY_SPLITS)
def test_entropy_and_its_gradient_are_those_of_the_whole_batch(
    ranks: list[dict[str, Any]], split: int
) -> None:
    loss, gradient = entropy(slice(None))
    found = [results[f"entropy {split}"] for results in ranks]
    for value, _ in found:
        torch.testing.assert_close(value, loss, rtol=1e-13, atol=0)
    # DDP averages over the ranks.
    parts = torch.cat([part for _, part in found]) / WORLD
    torch.testing.assert_close(parts, gradient, rtol=1e-11, atol=1e-14)


def test_without_synchronize_each_rank_keeps_to_itself(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        torch.testing.assert_close(results["local"][1], averages(rank)[1])
    assert not torch.equal(ranks[0]["local"][1], ranks[1]["local"][1])


def test_a_process_group_does_not_stop_a_copy(ranks: list[dict[str, Any]]) -> None:
    assert [results["copy"] for results in ranks] == [None, None]


@pytest.mark.parametrize("of", ["refusals", "refusals of class means"])
def test_every_rank_raises_where_one_refuses_its_batch(ranks: list[dict[str, Any]], of: str) -> None:
    """The others would wait in the sum over ranks, until the whole run is aborted."""
    assert ranks[0][of] == [
        "InvalidArgumentError",
        "InvalidArgumentError",
        "MissingTargetsError",
        "InvalidArgumentError",
        "NonFiniteError",
    ]
    assert ranks[1][of] == ["RanksDisagreeError"] * 5


def test_training_does_not_look_at_buffers_that_ddp_writes(ranks: list[dict[str, Any]]) -> None:
    """It writes them before every pass; on an accelerator each look would wait for the device."""
    assert [results["looks"] for results in ranks] == [0, 0]


def test_the_fixed_head_works_inside_ddp(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["fixed"], ranks[1]["fixed"])


def test_the_sum_over_ranks_is_twice_differentiable(ranks: list[dict[str, Any]]) -> None:
    # s = 1 + 2 on both ranks. The sum over ranks of s^3 has derivative 2 * 3 s^2 = 54 in either term, and the
    # sum over ranks of that derivative has 2 * 2 * 6 s = 72.
    for size, first, second in (results["reduce"] for results in ranks):
        assert size == WORLD
        assert first.item() == 54
        assert second.item() == 72


def test_without_a_process_group_the_world_is_one() -> None:
    assert world_size() == 1
