r"""Which classes are here: the one rule for logits and targets of a head that knows classes to come.

A head for all K classes that will ever come has a row for each of them, and today chooses among the A that
are here, the *active* ones. Two forms of the same softmax over these A follow.

**Among A.** Whoever makes logits himself, as a loss from features does, makes those of the active classes
alone and counts targets among them: memory and time for A classes, not for K. Label smoothing then spreads
its share over these A.

**Masked.** Logits that leave a head keep their K columns. An active one keeps its logit, and all others get

    z_k = mean_{j active} z_j - D.

D is so large that exp(-D) is 0 in every precision: the softmax is that of the active classes to the last
bit, and no other class is the largest. The number is finite, because -inf becomes NaN in much that is done
with logits (0 times it, differences of two models, moments). And it is the *mean* that D is subtracted from,
because of the label smoothing of ``F.cross_entropy``, which spreads its share e over all K columns,

    l = lse - (1 - e) z_y - (e / K) sum_k z_k = lse - (1 - e) z_y - e mean_{active} z + e D (K - A) / K:

that is the loss with smoothing over the active classes and a constant, so that every gradient is the right
one. Only the printed number is too large by the constant. No masked logit depends on the row of its own
class, which therefore gets no gradient at all.

Symbols: K <-> num_classes, A <-> len(classes), z <-> logits, D <-> DROP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from etflayers.checks import reads_values, require_values
from etflayers.functional.class_means import ignored_targets
from etflayers.functional.soft_targets import are_soft, require_soft_shape
from etflayers.precision import working_dtype

__all__ = ["DROP", "among_active", "masked_logits", "require_active"]

# exp(-746) is 0 in float64; half precision holds it exactly enough and far from its largest number.
DROP = 1000.0
_IGNORED = -100


def masked_logits(logits: Tensor, active: Tensor, *, drop: float = DROP) -> Tensor:
    """Logits of which only the active classes take part in a softmax, an argmax or a top k.

    Args:
        logits: z, ``(..., K)``.
        active: ``(K,)`` bool, at least one of them true.
        drop: D, how far the other classes are below the mean of the active ones.

    Returns:
        ``(..., K)``, in the dtype of the logits.

    >>> masked_logits(torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True]))
    tensor([   1., -998.,    3.])
    """
    total = torch.where(active, logits, 0).sum(-1, keepdim=True, dtype=working_dtype(logits.dtype))
    return torch.where(active, logits, (total / active.sum() - drop).to(logits.dtype))


def require_active(targets: Tensor, active: Tensor, ignore_index: int = -100) -> None:
    """Raise if a target is a class that is not active; what is no class at all is left to other checks.

    Args:
        targets: class indices of any shape, or soft targets ``(..., K)``.
        active: ``(K,)`` bool.
        ignore_index: target of the samples to leave out.

    Raises:
        InvalidArgumentError: an inactive class is the target of a sample, or has a share of a soft one.

    >>> require_active(torch.tensor([0, -100]), torch.tensor([True, False]))
    """
    if not isinstance(targets, Tensor) or targets.dtype.is_complex or targets.numel() == 0:
        return
    if are_soft(targets):
        if targets.shape[-1:] == active.shape:
            _refuse_where((targets.detach() > 0).reshape(-1, len(active)).any(0) & ~active)
        return
    labels = targets.long().reshape(-1)
    a_class = (labels >= 0) & (labels < len(active)) & (labels != ignore_index)
    missed = a_class & ~active[torch.where(a_class, labels, 0)]
    _refuse_where(torch.zeros_like(active).index_put((torch.where(a_class, labels, 0),), missed, False))


def among_active(targets: Tensor, classes: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, int]:
    """Targets counted among the active classes, and the ignored target beside them.

    Args:
        targets: integers in [0, K) or ``ignore_index``, of any shape; or soft targets ``(..., K)``.
        classes: numbers of the active classes, ``(A,)``, ascending.
        num_classes: K.
        ignore_index: target of the samples to leave out.

    Returns:
        Integers in [0, A) or -100, of the same shape, or soft targets ``(..., A)``; and -100.

    Raises:
        InvalidArgumentError: targets out of range or of an inactive class.

    >>> among_active(torch.tensor([5, 2, 0]), torch.tensor([2, 5]), num_classes=9, ignore_index=0)
    (tensor([   1,    0, -100]), -100)
    """
    active = torch.zeros(num_classes, dtype=torch.bool, device=classes.device).index_fill(0, classes, True)
    if are_soft(targets):
        require_soft_shape(targets, targets.shape[:-1], num_classes)
        require_active(targets, active)
        return targets.index_select(-1, classes), _IGNORED
    ignored = ignored_targets(targets, num_classes, ignore_index)
    require_active(targets, active, ignore_index)
    places = active.cumsum(0) - 1
    return torch.where(ignored, _IGNORED, places[torch.where(ignored, 0, targets.long())]), _IGNORED


def _refuse_where(missed: Tensor) -> None:
    """Raise if any of K flags is set, and name the classes where that costs nothing."""
    fine = ~missed.any()
    names = ""
    if reads_values(fine) and not bool(fine):
        found = missed.nonzero().flatten().tolist()
        names = f", got class {found[0]}" if len(found) == 1 else f", got classes {found[:8]}"
    require_values(
        fine,
        f"targets must be active classes of the head{names}, not here yet: call head.activate(classes) when "
        "their data come",
    )
