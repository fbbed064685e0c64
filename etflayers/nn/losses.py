"""Losses as modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from etflayers.checks import require, require_flag
from etflayers.codes import SphericalCode
from etflayers.functional.cross_entropy import (
    code_cross_entropy,
    etf_cross_entropy,
    require_loss_options,
)
from etflayers.functional.losses import (
    code_mse_loss,
    dot_regression_loss,
    positive_lengths,
    require_codes,
)
from etflayers.functional.parallel_cross_entropy import (
    class_parallel_cross_entropy,
    class_parallel_etf_cross_entropy,
)
from etflayers.functional.priors import features_with_prior, log_prior, require_prior
from etflayers.functional.reduction import Reduction, require_reduction
from etflayers.functional.sampled_cross_entropy import require_rate, sampled_cross_entropy
from etflayers.kernels import Impl
from etflayers.nn.base import CodeHead
from etflayers.nn.distributed import gathered
from etflayers.nn.fixed import FixedETFHead
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.nn.sharded import ShardedCanonical, ShardedHead
from etflayers.precision import working_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CodeCrossEntropy", "CodeMSELoss", "DotRegressionLoss", "ETFCrossEntropy", "SampledCrossEntropy"]


class CodeMSELoss(nn.Module):
    r"""Half the squared distance of an output to the code of its class, ``|z - c_y|^2 / 2``, averaged.

    :func:`etflayers.functional.code_mse_loss` as a module: by default the loss of logits that are regressed
    to one-hot targets.

    Args:
        codes: C, ``(K, d)``, one row for each class, which becomes a buffer; ``None``: unit vectors.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Raises:
        InvalidArgumentError: codes of another shape or dtype, an unknown reduction.

    Reference:
        Zhou, Li, Ding, You, Qu, Zhu (2022), arXiv 2203.01238.

    >>> logits, targets = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([1, 0])
    >>> CodeMSELoss()(logits, targets)
    tensor(0.7500)
    >>> vertices = FixedETFHead(in_features=2, num_classes=3).frame
    >>> CodeMSELoss(vertices)(vertices, torch.arange(3))
    tensor(0.)
    """

    codes: Tensor | None

    def __init__(
        self, codes: Tensor | None = None, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        require_reduction(reduction)
        if codes is not None:
            require_codes(codes)
            codes = codes.detach().clone()
        self.register_buffer("codes", codes)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``outputs`` ``(..., K)``, or ``(..., d)``, for class indices ``targets`` ``(...)``."""
        return code_mse_loss(
            outputs, targets, self.codes, ignore_index=self.ignore_index, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """The arguments."""
        codes = "one-hot" if self.codes is None else f"({len(self.codes)}, {self.codes.shape[1]})"
        return f"codes={codes}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class DotRegressionLoss(nn.Module):
    r"""Dot-regression loss ``(<w_y, h> - l_y)^2 / (2 l_y)`` with target lengths ``l_y``, averaged.

    :func:`etflayers.functional.dot_regression_loss` as a module. The setting of the paper is a fixed head
    with ``normalize=True``, ``scale=1`` and ``lengths=1``; with another scale s multiply the lengths by s.

    Args:
        lengths: l > 0, a number or one for each class, ``(K,)``, which becomes a buffer;
            :func:`~etflayers.functional.lengths_from_counts` has some for imbalanced classes.
        divide_by_length: the form of the paper; ``False``: that of its code, without 1 / l_y.
        ignore_index: target of the samples to leave out.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Raises:
        InvalidArgumentError: lengths that are not positive and finite, an unknown reduction.

    Reference:
        Yang, Chen, Li, Xie, Lin, Tao (2022), arXiv 2203.09081.

    >>> loss = DotRegressionLoss(lengths=torch.tensor([1.0, 2.0]))
    >>> loss(torch.tensor([[0.5, -0.5], [-2.0, 2.0]]), torch.tensor([0, 1]))
    tensor(0.0625)
    """

    def __init__(
        self,
        lengths: float | Tensor = 1.0,
        *,
        divide_by_length: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        require_reduction(reduction)
        require_flag("divide_by_length", divide_by_length)
        self.lengths: float | Tensor
        if isinstance(lengths, Tensor):
            require(
                lengths.ndim == 1, f"lengths must be a number or have shape (K,), got {tuple(lengths.shape)}"
            )
            self.register_buffer("lengths", lengths.detach().clone())
        else:
            self.lengths = lengths
        positive_lengths(lengths)
        self.divide_by_length = divide_by_length
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``logits`` ``(..., K)`` for class indices ``(...)`` or soft targets ``(..., K)``."""
        return dot_regression_loss(
            logits,
            targets,
            lengths=self.lengths,
            divide_by_length=self.divide_by_length,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The arguments."""
        lengths = "per class" if isinstance(self.lengths, torch.Tensor) else self.lengths
        form = "" if self.divide_by_length else ", divide_by_length=False"
        return f"lengths={lengths}{form}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class _HeadLoss(nn.Module):
    """A loss that takes features and asks a head for what its logits are made of.

    The head belongs to the model; the loss refers to it, without being a second owner.
    """

    head: CodeHead

    def __init__(
        self, head: CodeHead, label_smoothing: float, ignore_index: int, reduction: Reduction
    ) -> None:
        super().__init__()
        require(isinstance(head, CodeHead), f"head must be a CodeHead, got {type(head).__name__}")
        require_loss_options(1.0, label_smoothing, reduction)
        object.__setattr__(self, "head", head)  # nn.Module would register it
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def linear_terms(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
        """Inputs, weight and a number whose product is the logits; in training the head learns."""
        inputs, frame, center = self.head.logit_terms(features, targets)
        # Before the product, as in the head.
        inputs, scale = _scaled(inputs if center is None else inputs - center, self.head.scale)
        return inputs, frame, scale

    @property
    def classes(self) -> Tensor | None:
        """Numbers of the classes that are here, ``(A,)``; ``None`` for all of the head."""
        return None if self.head.active is None else self.head.active_classes

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the head."""
        return self.head.named_parameters(prefix, recurse, remove_duplicate)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the loss and of the head."""
        self.head.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        """The arguments."""
        return (
            f"label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


class CodeCrossEntropy(KeepsPrecision, _HeadLoss):
    r"""Cross-entropy of a head, from features: ``F.cross_entropy(head(f, y), y)`` with less memory.

    Logits and probabilities ``(B, K)`` never exist as a whole, forward or backward. The canonical frame of
    :class:`~etflayers.nn.FixedETFHead` takes one pass over the features
    (:func:`~etflayers.functional.etf_cross_entropy`), a spherical code with a formula a few of its classes at
    a time and no matrix at all, any other frame a few rows of logits at a time (both by
    :func:`~etflayers.functional.code_cross_entropy`). It pays where B K is large. If
    :class:`~etflayers.nn.ClassParallel` has divided the classes among ranks, each rank makes the logits of
    its own, a few classes at a time (:func:`~etflayers.functional.class_parallel_cross_entropy`).

    In training the loss takes the place of the head, whose state it updates; where logits are wanted, call
    the head. Hooks of the head do not run.

    Of a head that knows classes to come (:meth:`~etflayers.nn.CodeHead.deactivate`) only the classes that are
    here have logits, and label smoothing is over these.

    The head belongs to the model, and the loss refers to it without being a second owner: it is no submodule
    of the loss, so that a model with both saves it once, under one name (safetensors asks for that). Moving
    and saving it is up to the model. What is asked of the loss itself still reaches it: ``loss.train()`` and
    ``loss.eval()``, and ``loss.parameters()`` for an optimizer. A module that holds the loss alone and not
    the head does not train, move or save the head: give it the head, too.

    Args:
        head: any :class:`~etflayers.nn.CodeHead`, yours too.
        label_smoothing: e in [0, 1], the share of the target that is spread over all classes.
        ignore_index: target of the samples to leave out of the loss; give the head the same.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.
        prior: pi, ``(K,)``, how often each class occurs, counts or probabilities: the loss is that of the
            logits plus tau log pi (:func:`~etflayers.functional.logit_adjustment`). It becomes a buffer of
            the loss; the head, and what it answers, do not know of it.
        tau: how much of the prior to add.
        chunk_size: samples whose logits exist at a time, where there are logits; where the classes are
            divided among ranks, classes.
        impl: which path to take: see :func:`etflayers.kernels.describe`.

    Raises:
        InvalidArgumentError: a head that is no ``CodeHead``, or an option out of its range.

    >>> head = FixedETFHead(in_features=4, num_classes=3, rotation="canonical")
    >>> features, targets = torch.tensor([[3.0, 0.0, 0.0, 7.0]]), torch.tensor([0])
    >>> CodeCrossEntropy(head)(features, targets)
    tensor(0.0495)
    >>> CodeCrossEntropy(head, prior=torch.tensor([2, 49, 49]))(features, targets)  # class 0 is rare
    tensor(0.8078)
    """

    prior: Tensor | None

    def __init__(
        self,
        head: CodeHead,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        prior: Tensor | None = None,
        tau: float = 1.0,
        chunk_size: int | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(head, label_smoothing, ignore_index, reduction)
        require_loss_options(1.0, label_smoothing, reduction, chunk_size)
        if prior is not None:
            require_prior(prior, head.num_classes, tau)
            prior = prior.detach().clone()
        self.register_buffer("prior", prior)
        self.tau = tau
        self.chunk_size = chunk_size
        self.impl: Impl = impl

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """The loss of features ``(..., d)`` for ``targets``; in training the head learns.

        Targets are class indices ``(...)`` or soft targets ``(..., K)``, which make all logits.
        """
        head = self.head
        if isinstance(head, ShardedHead):
            return self._over_ranks(head, gathered(features), targets)
        if isinstance(head, FixedETFHead) and head.canonical:
            inputs, scale = _scaled(head.inputs(features), head.scale)
            return etf_cross_entropy(
                inputs,
                targets,
                head.num_classes,
                scale=scale,
                label_smoothing=self.label_smoothing,
                ignore_index=self.ignore_index,
                reduction=self.reduction,
                prior=self.prior,
                tau=self.tau,
                classes=self.classes,
                impl=self.impl,
            )
        frame: Tensor | SphericalCode
        if head.code is not None:
            frame = head.code
            inputs, scale = _scaled(head.inputs(features), head.scale)
        else:
            inputs, frame, scale = self.linear_terms(features, targets)
        return code_cross_entropy(
            inputs,
            frame,
            targets,
            scale=scale,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            prior=self.prior,
            tau=self.tau,
            classes=self.classes,
            chunk_size=self.chunk_size,
            impl=self.impl,
        )

    def _over_ranks(self, head: ShardedHead, features: Tensor, targets: Tensor) -> Tensor:
        require(
            self.impl != "triton",
            "impl must not be 'triton' where the classes are divided: that has no kernel",
        )
        options: dict[str, Any] = {
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "chunk_size": self.chunk_size,
            "classes": self.classes,
        }
        shard, added = head.class_shard, None
        if self.prior is not None:
            added = log_prior(self.prior, head.num_classes, self.tau, like=features)
        if isinstance(head, ShardedCanonical):
            inputs, scale = _scaled(head.inputs(features), head.scale)
            if added is not None:
                inputs = features_with_prior(inputs, head.num_classes, added, scale)
            return class_parallel_etf_cross_entropy(inputs, targets, shard, scale=scale, **options)
        inputs, rows, center = head.local_terms(features, targets)
        inputs, scale = _scaled(inputs if center is None else inputs - center, head.scale)
        bias = None if added is None else added[shard.rows] / scale
        return class_parallel_cross_entropy(
            inputs, rows, targets, shard, local_bias=bias, scale=scale, **options
        )

    def extra_repr(self) -> str:
        """The arguments."""
        prior = "" if self.prior is None else f", prior=({len(self.prior)},), tau={self.tau}"
        return super().extra_repr() + prior


ETFCrossEntropy = CodeCrossEntropy
"""The name from the time when every code here was a simplex ETF."""


class SampledCrossEntropy(_HeadLoss):
    r"""Cross-entropy from features over the classes of a batch and a random share of the others.

    For a head of many classes. In training it is :func:`~etflayers.functional.sampled_cross_entropy`, which
    is too small on average, the more so the smaller the rate. In eval mode it is the loss
    of all classes, a few samples at a time, that of :class:`CodeCrossEntropy`.

    In training it takes the place of the head, whose state it updates, and refers to it without owning it, as
    :class:`CodeCrossEntropy` does. Under ``DistributedDataParallel`` each rank draws by itself.

    Args:
        head: any :class:`~etflayers.nn.CodeHead`. Its whole frame is made in each training step: a head whose
            frame takes long for many classes is not faster for this loss.
        rate: in (0, 1], share of the classes to draw beside those of the batch.
        label_smoothing: e in [0, 1], the share of the target that is spread over all classes.
        ignore_index: target of the samples to leave out of the loss; give the head the same.
        reduction: ``"mean"`` over the samples that are not ignored, ``"sum"`` or ``"none"``.

    Raises:
        InvalidArgumentError: a head that is no ``CodeHead``, or an option out of its range.

    Reference:
        An, Deng, Guo, Feng, Zhu, Yang, Liu (2022), arXiv 2203.15565.

    >>> head = FixedETFHead(in_features=1000, num_classes=1000, scale=5.0)
    >>> loss = SampledCrossEntropy(head, rate=0.1)
    >>> features, targets = 2 * torch.eye(1000)[:1], torch.tensor([0])
    >>> loss(features, targets), loss.eval()(features, targets)  # all wrong classes are equally far
    (tensor(0.0441), tensor(0.0441))
    """

    def __init__(
        self,
        head: CodeHead,
        rate: float,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(head, label_smoothing, ignore_index, reduction)
        require_rate(rate)
        self.rate = rate

    def forward(
        self, features: Tensor, targets: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The loss of features ``(..., d)`` for class indices ``(...)``; in training the head learns.

        ``generator`` has the random numbers of the draw, on the device of ``features``; default: PyTorch's.
        """
        options: Any = {
            "label_smoothing": self.label_smoothing,
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
        }
        if not self.training:
            whole: Tensor = CodeCrossEntropy(self.head, **options)(features, targets)
            return whole
        inputs, frame, scale = self.linear_terms(features, targets)
        options |= {"scale": scale, "classes": self.classes}
        return sampled_cross_entropy(inputs, frame, targets, rate=self.rate, generator=generator, **options)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"rate={self.rate}, {super().extra_repr()}"


def _scaled(inputs: Tensor, scale: float | Tensor) -> tuple[Tensor, float]:
    """Inputs and a number with the same product; a scale that is a tensor gets its gradient by the inputs."""
    if not isinstance(scale, Tensor):
        return inputs, scale
    return inputs.to(working_dtype(inputs.dtype)) * scale, 1.0
