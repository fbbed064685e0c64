r"""The losses and their gradient in plain PyTorch, a few rows at a time; see ``api`` for the derivation.

f <-> rows, y <-> targets, a <-> factor, e <-> smoothing, m <-> shifts, L <-> logs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers._torch import inside_transform
from etflayers.precision import working_dtype

__all__ = ["SAMPLES", "differentiable_gradient", "gradient", "losses", "parts"]

# Entries of a temporary, on a CPU and elsewhere: large enough to be efficient there.
_CPU_ENTRIES, _ENTRIES = 2**20, 2**25
# Samples of a product with all classes: fewer read the whole weight for little (15 of them took 2.5 times as
# long as 64 at 66,048 classes).
SAMPLES = 64


def losses(
    rows: Tensor, targets: Tensor, num_classes: int, factor: float, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """l, m and L, ``(B,)`` each."""
    pieces = [
        _losses_at_once(rows[part], targets[part], num_classes, factor, smoothing, ignore_index)
        for part in parts(rows, num_classes)
    ]
    if len(pieces) == 1:
        return pieces[0]
    found, shifts, logs = (torch.cat(part) for part in zip(*pieces, strict=True))
    return found, shifts, logs


def _losses_at_once(
    rows: Tensor, targets: Tensor, num_classes: int, factor: float, smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, ignored, own = _selected(rows, targets, num_classes, ignore_index)
    shifts = rows.amax(-1, keepdim=True)
    logits = (rows - shifts).mul_(factor)
    found = logits.gather(-1, own).squeeze(-1) * (smoothing - 1)
    if smoothing > 0:
        found = found - smoothing * logits.mean(-1)
    logs = logits.exp_().sum(-1).log()
    return torch.where(ignored, 0, found + logs), shifts.squeeze(-1), logs


def gradient(
    rows: Tensor,
    targets: Tensor,
    shifts: Tensor,
    logs: Tensor,
    grad: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient ``(B, d)`` for a cotangent ``(B,)`` of the losses, 0 in the columns from K on."""
    found = torch.zeros_like(rows) if rows.shape[-1] > num_classes else torch.empty_like(rows)
    for part in parts(rows, num_classes):
        taken, ignored, own = _selected(rows[part], targets[part], num_classes, ignore_index)
        change = (taken - shifts[part].unsqueeze(-1)).mul_(factor).sub_(logs[part].unsqueeze(-1)).exp_()
        if smoothing > 0:
            change -= smoothing / num_classes
        change.scatter_add_(-1, own, torch.full_like(change[:, :1], smoothing - 1))
        change *= (factor * grad[part]).unsqueeze(-1)
        found[part, :num_classes] = change.masked_fill_(ignored.unsqueeze(-1), 0)
    return found


def differentiable_gradient(
    rows: Tensor,
    targets: Tensor,
    grad: Tensor,
    num_classes: int,
    factor: float,
    smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient as a function of ``rows`` and ``grad`` that can itself be differentiated, to any order."""
    width = rows.shape[-1]
    rows, ignored, own = _selected(rows, targets, num_classes, ignore_index)
    change = torch.softmax(factor * (rows - rows.detach().amax(-1, keepdim=True)), -1)
    change = change - smoothing / num_classes
    change = change.scatter_add(-1, own, torch.full_like(change[..., :1], smoothing - 1))
    change = change * (factor * grad).unsqueeze(-1)
    change = torch.where(ignored.unsqueeze(-1), 0, change)
    return torch.nn.functional.pad(change, (0, width - num_classes))


def _selected(
    rows: Tensor, targets: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first K columns in the working dtype, which rows are ignored, and the own column ``(B, 1)``."""
    targets = targets.long()
    ignored = targets == ignore_index
    own = torch.where(ignored, 0, targets).unsqueeze(-1)
    return rows[..., :num_classes].to(working_dtype(rows.dtype)), ignored, own


def parts(rows: Tensor, num_classes: int, chunk_size: int | None = None, *, at_least: int = 1) -> list[slice]:
    """The batch in slices whose temporaries stay small; in one inside ``torch.func`` transforms."""
    if inside_transform():
        size = max(1, rows.shape[0])
    elif chunk_size is None:
        size = max(at_least, (_CPU_ENTRIES if rows.device.type == "cpu" else _ENTRIES) // num_classes)
    else:
        size = chunk_size
    return [slice(i, i + size) for i in range(0, rows.shape[0], size)] or [slice(0, 0)]
