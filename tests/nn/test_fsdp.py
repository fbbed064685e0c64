"""FSDP2 on two gloo ranks: from the meta device, and trained as one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from etflayers.geometry import is_simplex_etf
from etflayers.nn import (
    ClassMeanHead,
    CodeHead,
    FixedETFHead,
    LearnedETFHead,
    NearestETFHead,
    UnitRowHead,
    provide_targets,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this PyTorch does not run on a CPU"
)

WORLD, STEPS = 2, 4
HEADS = {
    "canonical": lambda: FixedETFHead(6, 6),
    "haar": lambda: FixedETFHead(6, 4),
    "nearest": lambda: NearestETFHead(6, 4, momentum=0.3),
    "learned": lambda: LearnedETFHead(6, 4, scale=2.0),
    "class_means": lambda: ClassMeanHead(6, 4, scale=2.0, momentum=0.3),
    "unit_rows": lambda: UnitRowHead(6, 4, scale=2.0),
}


def model_with(head: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), HEADS[head]())


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 5, generator=generator), torch.tensor([0, 1, 2, 3, 3, 1, 0, 2])


def train(model: nn.Module, share: slice) -> list[Tensor]:
    """Logits of some steps of the default optimizer of large trainers, on a share of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    logits = []
    for step in range(STEPS):
        features, targets = (tensor[share] for tensor in batch(step))
        head: Any = model[2]  # type: ignore[index]
        if head.accepts_targets:
            with provide_targets(model, targets):
                out = model(features)
        else:
            out = model(features)
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(out, targets))
        optimizer.step()
        logits.append(out.detach())
    return logits


def of_one_rank(rank: int, _: Path) -> dict[str, dict[str, Any]]:
    return {name: one_head(rank, name) for name in HEADS}


def one_head(rank: int, name: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(100 + rank)  # ranks draw different numbers
    with torch.device("meta"):
        model = model_with(name)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    head = model[2]
    assert isinstance(head, CodeHead)
    full = StateDictOptions(full_state_dict=True)
    start = {k: v.clone() for k, v in get_model_state_dict(model, options=full).items()}
    first = head.frame.detach().clone()
    logits = train(model, slice(4 * rank, 4 * rank + 4))
    return {"start": start, "first": first, "frame": head.frame.detach().clone(), "logits": logits}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(of_one_rank, WORLD, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_ranks_from_meta_hold_one_frame_and_train_as_one_process(
    ranks: list[dict[str, Any]], name: str
) -> None:
    mine, theirs = ranks[0][name], ranks[1][name]
    assert torch.equal(mine["first"], theirs["first"])
    for frame in (mine["first"], mine["frame"]):
        torch.testing.assert_close(frame.norm(dim=1), torch.ones(len(frame)))
        assert is_simplex_etf(frame) or name in ("unit_rows", "class_means")
    torch.testing.assert_close(mine["frame"], theirs["frame"], rtol=0, atol=1e-6)

    model = model_with(name)
    model.load_state_dict(mine["start"] if mine["start"] else theirs["start"])
    logits = train(model, slice(None))
    for step in range(STEPS):
        both = torch.cat((mine["logits"][step], theirs["logits"][step]))
        torch.testing.assert_close(both, logits[step], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine["frame"], model[2].frame.detach(), rtol=1e-4, atol=1e-5)
