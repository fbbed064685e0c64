r"""The head whose frame is the directions of the class means of the features.

Symbols: M <-> averages.means, U <-> initial_rows, W <-> frame.

At generalized neural collapse each classifier row has the direction of the mean of its class, for any
number of classes and dimensions. So the row need not be learned: it can be read off the features. A mean
that is zero, as that of a class not seen yet is, has no direction. A row of zeros would give the logit 0,
more than most wrong classes get from a trained network, and to all such classes the same one. Until there is
a mean the row is therefore a random direction, which no feature prefers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.checks import require_flag, require_floating, require_values
from etflayers.errors import EtfLayersError, ManifoldError
from etflayers.functional.logits import directions
from etflayers.nn.averages import FeatureMovingAverage, Momentum
from etflayers.nn.base import CodeHead, LogitTerms
from etflayers.nn.distributed import overwrite
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import full_precision, working_dtype

__all__ = ["ClassMeanHead"]


class ClassMeanHead(KeepsPrecision, CodeHead):
    r"""Classifier by the directions of class means: ``logits = s z W'``, ``w_k = m_k / |m_k|``.

    It has no parameters: a training pass, with features and targets, updates the running class means M
    (:class:`~etflayers.nn.FeatureMovingAverage` of the inputs z) and then decides by the directions of their
    rows. K and d are any numbers, also K > d + 1, where there is no simplex ETF. In the paper features and
    weights have length 1, which ``normalize=True`` and a scale say.

    A class not seen yet, or with a mean shorter than 1e-12, has a random direction, which is drawn at the
    start and kept in a buffer.

    With ``detach=True``, the default, W is a constant in the backward pass, as the weight is that the paper
    assigns from step to step. Little is lost: only a share of ``momentum`` of each mean comes from the batch.
    A gradient through W (``detach=False``) costs a second matrix of size K x d and, with several ranks, a
    second sum of one over them in each step.

    In eval mode everything comes from buffers: no targets, a batch of one is fine. A training pass changes
    them, under ``torch.no_grad`` too, as in BatchNorm. Gradient checkpointing, which would run it twice, is
    refused: keep the head outside. Averages of models (EMA or SWA with their buffers) average class means,
    and the average is a valid head.

    Args:
        in_features: d >= 1.
        num_classes: K >= 1.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length: M are then means of directions.
        momentum: of the class means: see :class:`~etflayers.nn.FeatureMovingAverage`. It is the step towards
            the batch, 1 - beta in the paper's ``W <- beta W + (1 - beta) (means of the batch)``.
        detach: whether to treat W as a constant in the backward pass.
        ignore_index: target of the samples that do not enter the means (they still get logits).
        synchronize: whether to form the means over all ranks when ``torch.distributed`` is initialized.
        process_group: the ranks; default all. Copies and pickles start with the default group.
        generator: random numbers of the rows of classes not seen, which are uniform on the sphere.
        device: of the buffers.
        dtype: of the buffers: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        averages: the :class:`~etflayers.nn.FeatureMovingAverage`.
        initial_rows: U, ``(K, d)``, the rows of classes without a direction of their own.

    Raises:
        InvalidArgumentError: an argument out of its range.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> head = ClassMeanHead(in_features=2, num_classes=3, generator=torch.Generator().manual_seed(0))
    >>> head(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), targets=torch.tensor([0, 1]))[:, :2]
    tensor([[5.0000, 4.0000],
            [1.6000, 2.0000]])
    >>> head.frame.norm(dim=1)
    tensor([1., 1., 1.])
    """

    accepts_targets = True

    averages: FeatureMovingAverage
    initial_rows: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        momentum: Momentum = 0.1,
        detach: bool = True,
        ignore_index: int = -100,
        synchronize: bool = True,
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        require_flag("detach", detach)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        self.detach = detach
        self.averages = FeatureMovingAverage(
            in_features,
            num_classes,
            momentum=momentum,
            ignore_index=ignore_index,
            synchronize=synchronize,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        empty = torch.empty(num_classes, in_features, device=device, dtype=working_dtype(dtype))
        self.register_buffer("initial_rows", _random_directions(empty, generator))

    @property
    def frame(self) -> Tensor:
        """W after the latest training pass, ``(K, d)``, unit rows.

        Raises:
            ManifoldError: a row has no direction, because the buffers hold what no training has written.
        """
        return self._frame_of(self.averages.means)

    def logit_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """z and W of the logits ``s z W'``; in training W follows the batch first.

        Args:
            features: ``(..., d)``; finite in training.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``, or soft targets ``(..., K)``, floating
                point, with rows that sum to 1; in training needed, here or from
                :func:`~etflayers.nn.provide_targets` (these win); not used in eval mode.

        Raises:
            MissingTargetsError: training without targets.
            InvalidArgumentError: shapes or dtypes that do not fit, or targets out of range.
            NonFiniteError: NaN or infinity in the features.
            ManifoldError: as :attr:`frame`.
            RecomputationError: this is the second forward pass of gradient checkpointing.
            RanksDisagreeError: another rank has refused its batch.
        """
        if not self.training:
            return LogitTerms(self.inputs(features), self.frame)
        try:
            inputs, targets = self.inputs(features), self.require_targets(targets, self.averages.ignore_index)
        except EtfLayersError as error:
            self.averages.refuse(error)
        # Not torch.no_grad, which leaves the derivative of forward mode.
        seen, classes = (inputs.detach(), targets.detach()) if self.detach else (inputs, targets)
        with full_precision(inputs):
            state = self.averages.propose(seen, classes)
            frame = self._frame_of(state.means)
        # Nothing is stored before everything has been checked and computed.
        self.averages.commit(state)
        return LogitTerms(inputs, frame)

    def _frame_of(self, means: Tensor) -> Tensor:
        """The directions of the means, and U where they have none."""
        # Of zero and of NaN this is no direction; the latter has to stay NaN until the check.
        dead = (directions(means.detach()) == 0).all(-1, keepdim=True)
        frame = directions(torch.where(dead, self.initial_rows, means))
        require_values(
            (torch.linalg.vector_norm(frame.detach(), dim=-1) > 0.5).all(),
            f"a row of {type(self).__name__} has no direction: its buffers hold what no training has written "
            "(after to_empty() whatever was in memory): call head.reset_parameters(), or load a state dict",
            ManifoldError,
        )
        return frame

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all class means, and draw the rows of classes not seen from PyTorch's global generator.

        Under ``torch.distributed`` all ranks call it, and get the rows that the first one draws.
        """
        super().reset_parameters()
        self.averages.reset_parameters()
        overwrite(self.initial_rows, _random_directions(torch.empty_like(self.initial_rows)))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, detach={self.detach}"


def _random_directions(empty: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor with rows that are uniform on the unit sphere."""
    return directions(empty.normal_(generator=generator))
