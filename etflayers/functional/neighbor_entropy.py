r"""Entropy of features on the sphere, from the distances of nearest neighbors.

Symbols: z <-> rows, rho_i <-> distances, N <-> samples of all ranks, eps <-> epsilon.

The Kozachenko-Leonenko estimate of a differential entropy is, up to constants, the mean of the logarithm of
the distance rho_i of each sample from its nearest neighbor. Its negative as a loss pushes neighbors apart:
classes do not collapse, because within a collapsed class every rho_i is zero.

**Over ranks** the batch is that of all of them, and a neighbor may be elsewhere. Each rank looks for the
neighbors of its own samples, and all get the mean over all samples. Rows and the sum of logarithms travel
through ``all_reduce_sum``, whose backward pass is the same sum: averaged over the ranks, as
``DistributedDataParallel`` does, the gradient is that of the mean over the whole batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.checks import require, require_floating, require_number, require_size
from etflayers.collectives import all_reduce_sum, sum_over_ranks, world_size
from etflayers.errors import InvalidArgumentError
from etflayers.functional.logits import directions
from etflayers.precision import full_precision

__all__ = ["neighbor_entropy_loss"]


def neighbor_entropy_loss(
    features: Tensor,
    *,
    epsilon: float = 1e-8,
    block_size: int = 1024,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""``-mean_i log max(|z_i - z_nn(i)|, eps)`` of the directions z = f / |f| of a batch.

    Each ``z_nn(i)`` is the nearest of the other samples of the batch, exactly, over all ranks: an estimate of
    the entropy of the features, negated, without its constants. A gradient flows into both ends of a
    distance. Two equal samples contribute ``-log eps`` and no gradient, which has no direction there.

    With more than one rank the sizes of their batches, which may differ, are exchanged first: on an
    accelerator the host waits for that once in a call.

    Args:
        features: f, ``(B, d)``, those of this rank; two samples or more on all ranks together.
        epsilon: eps > 0, the shortest distance that counts.
        block_size: how many rows of the matrix of distances exist at a time.
        process_group: the ranks that share the batch; default: all.

    Returns:
        A scalar, the same on all ranks, computed in float32 or better, also under autocast.

    Raises:
        InvalidArgumentError: features that are no ``(B, d)`` matrix of floating-point numbers, a batch of one
            sample, epsilon <= 0.

    Reference:
        Harun, Gallardo, Kanan (2025), arXiv 2502.10691; Kozachenko, Leonenko (1987); Sablayrolles, Douze,
        Schmid, Jégou (2019), arXiv 1806.03198.

    >>> neighbor_entropy_loss(torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0]]))  # distances sqrt 2
    tensor(-0.3466)
    """
    require_floating("features", features.dtype)
    if features.ndim != 2:
        raise InvalidArgumentError(f"features must have shape (B, d), got {tuple(features.shape)}")
    require_number("epsilon", epsilon, positive=True)
    require_size("block_size", block_size)
    with full_precision(features):
        rows = directions(features)
        everyone, start = _gathered(rows, process_group)
        require(
            len(everyone) >= 2,
            f"features must hold two samples or more to have neighbors, got {len(everyone)}: leave the last "
            "batch out (drop_last=True) or the loss",
        )
        nearest = _nearest(rows.detach(), everyone.detach(), start, block_size)
        distances = torch.linalg.vector_norm(rows - everyone[nearest], dim=-1)
        total = distances.clamp(min=epsilon).log().sum()
        if world_size(process_group) > 1:
            total = all_reduce_sum(total, process_group)
        loss: Tensor = -total / len(everyone)
        return loss


def _gathered(rows: Tensor, process_group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """The rows of all ranks, differentiable, and where those of this one begin."""
    ranks = world_size(process_group)
    if ranks == 1:
        return rows, 0
    rank = dist.get_rank(process_group)
    sizes = torch.zeros(ranks, dtype=torch.int64, device=rows.device)
    sizes[rank] = len(rows)
    before = [0, *sum_over_ranks(sizes, process_group).cumsum(0).tolist()]
    # Everyone adds zeros to the places of the others: a sum whose gradient is known is a gather, too.
    padding = (0, 0, before[rank], before[-1] - before[rank + 1])
    return all_reduce_sum(torch.nn.functional.pad(rows, padding), process_group), before[rank]


@torch.no_grad()
def _nearest(rows: Tensor, everyone: Tensor, start: int, block_size: int) -> Tensor:
    """The nearest of the others for each row, which is row ``start + i`` of everyone."""
    found = []
    for first in range(0, len(rows), block_size):
        block = rows[first : first + block_size]
        # Of differences, not of a product: 2 - 2<z, z'> has lost half of the digits of a short distance.
        distances = torch.cdist(block, everyone, compute_mode="donot_use_mm_for_euclid_dist")
        itself = torch.arange(start + first, start + first + len(block), device=rows.device)
        found.append(distances.scatter_(1, itself.unsqueeze(1), torch.inf).argmin(1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=rows.device)
