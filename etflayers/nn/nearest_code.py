r"""The head whose frame is a spherical code, turned and dealt out to the classes as their means lie.

Symbols: X <-> directions of the centered class means, V <-> words of the code, sigma <-> assignment,
R <-> rotation, W <-> frame.

The words of a code are not equally far from each other, and classes are not equally alike: a code that is
dealt out blindly sets look-alikes anywhere, and the network has to tear them apart. The nearest arrangement
of the same code,

    maximize  sum_k <x_k, R v_sigma(k)>   over rotations R of R^d and one-to-one maps sigma,

is found by turns. For given sigma, R is the polar factor of X'V_sigma (orthogonal Procrustes); for given R,
sigma is an assignment problem. No turn lowers the sum, so they end, at an arrangement that neither improves.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers.checks import require_floating
from etflayers.codes import SphericalCode
from etflayers.codes.catalog import Kind
from etflayers.errors import EtfLayersError
from etflayers.functional.assignment import assign_labels
from etflayers.functional.logits import directions
from etflayers.nn.averages import FeatureMovingAverage, Momentum
from etflayers.nn.base import CodeHead, LogitTerms
from etflayers.nn.distributed import overwrite
from etflayers.nn.fixed_code import as_code
from etflayers.nn.keeps_precision import KeepsPrecision
from etflayers.precision import full_precision, working_dtype

__all__ = ["NearestCodeHead"]


class NearestCodeHead(KeepsPrecision, CodeHead):
    r"""Classifier with a spherical code that is arranged by the class means: ``logits = s z W'``.

    W has the words of a code as its rows: in the order of the code at first, and after each :meth:`refit`
    turned and dealt out so that they are near to the running class means. Between two calls W is a constant.
    Refit after the first epochs, when the features show which classes are alike, and then no more, so that
    the features can settle:

    .. code-block:: python

        for epoch in range(epochs):
            train_one_epoch(model)
            if epoch < 3:
                model.fc.refit()

    A training pass needs targets, for the class means; it takes O(B d) beside the logits. :meth:`refit` takes
    O(K^3) at worst: seconds for 2,000 classes, a minute for 10,000.

    Args:
        in_features: d >= 1.
        num_classes: K >= 2.
        code: as for :class:`~etflayers.nn.FixedCodeHead`.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns.
        normalize: whether to divide each feature vector by its length.
        momentum: of the class means: see :class:`~etflayers.nn.FeatureMovingAverage`.
        ignore_index: target of the samples that do not enter the means (they still get logits).
        synchronize: whether to form the means over all ranks when ``torch.distributed`` is initialized.
        process_group: the ranks; default all. Copies and pickles start with the default group.
        generator: random numbers of an optimized code.
        device: of the buffers.
        dtype: of the buffers: float32 (also where a half precision is asked for) or float64. ``half()`` and
            ``bfloat16()`` leave it.

    Attributes:
        averages: the :class:`~etflayers.nn.FeatureMovingAverage`.
        words: W, ``(K, d)``, a buffer.

    Raises:
        InvalidArgumentError: as :class:`~etflayers.nn.FixedCodeHead`, or an unknown momentum.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351; Schönemann (1966), A generalized
        solution of the orthogonal Procrustes problem.

    >>> head = NearestCodeHead(in_features=2, num_classes=4, momentum=1.0)
    >>> features = torch.tensor([[-2.0, 2.0], [2.0, 2.0], [-3.0, -3.0], [1.0, -1.0]])
    >>> _ = head(features, torch.arange(4))
    >>> round(head.refit(), 4)
    1.0
    >>> head(features).argmax(-1) if head.eval() else None
    tensor([0, 1, 2, 3])
    """

    accepts_targets = True

    averages: FeatureMovingAverage
    words: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        code: Kind | SphericalCode | Tensor = "auto",
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        momentum: Momentum = 0.1,
        ignore_index: int = -100,
        synchronize: bool = True,
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        dtype = working_dtype(dtype)
        self._given = as_code(code, num_classes, in_features, generator)
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
        self.register_buffer("words", self._given.dense(device=device, dtype=dtype))

    @property
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows."""
        return self.words

    def describe(self) -> str:
        """One sentence: which code, its largest cosine, the bound that no code is below, what it is for."""
        return self._given.describe()

    def logit_terms(self, features: Tensor, targets: Tensor | None = None) -> LogitTerms:
        """z and W of the logits ``s z W'``; in training the class means follow the batch first.

        Args:
            features: ``(..., d)``; finite in training.
            targets: ``(...)``, integers in [0, K) or ``ignore_index``, or soft targets ``(..., K)``; in
                training needed, here or from :func:`~etflayers.nn.provide_targets`; not used in eval mode.

        Raises:
            MissingTargetsError: training without targets.
            InvalidArgumentError: shapes or dtypes that do not fit, or targets out of range.
            NonFiniteError: NaN or infinity in the features.
            RecomputationError: this is the second forward pass of gradient checkpointing.
            RanksDisagreeError: another rank has refused its batch.
        """
        if not self.training:
            return LogitTerms(self.inputs(features), self.words)
        try:
            inputs, targets = self.inputs(features), self.require_targets(targets, self.averages.ignore_index)
        except EtfLayersError as error:
            self.averages.refuse(error)
        with full_precision(inputs):
            state = self.averages.propose(inputs.detach(), targets.detach())
        self.averages.commit(state)
        # A graph keeps W, and a refit writes it.
        keeps_graph = torch.is_grad_enabled() and inputs.requires_grad
        return LogitTerms(inputs, self.words.clone() if keeps_graph else self.words)

    @torch.no_grad()
    def refit(self, *, max_turns: int = 20) -> float:
        """Turn the code and deal out its words so that they are near to the class means of now.

        Classes not seen yet get words that are left over. Under ``torch.distributed`` all ranks call it, and
        get the arrangement of the first one. It waits for the device.

        Args:
            max_turns: rotations and assignments to compute, if they do not come to rest before.

        Returns:
            The mean cosine between the directions of the class means, less their common mean, and their new
            rows, over the classes seen.

        Raises:
            MissingDependencyError: scipy is not installed (extra ``solvers``).
        """
        seen = self.averages.seen
        means = self.averages.means.double()
        common = means[seen].mean(0) if bool(seen.any()) else means.sum(0)
        rows = directions(torch.where(seen.unsqueeze(-1), means - common, 0))
        words = self._given.dense(device=rows.device, dtype=rows.dtype)
        assignment = assign_labels(rows, words)
        for _ in range(max_turns):
            left, _values, right = torch.linalg.svd(rows.mT @ words[assignment])
            turned = words @ (left @ right).mT
            found = assign_labels(rows, turned)
            if torch.equal(found, assignment):
                break
            assignment = found
        chosen = turned[assignment]
        overwrite(self.words, chosen.to(self.words.dtype))
        return float((rows * chosen).sum(-1)[seen].mean()) if bool(seen.any()) else 0.0

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all class means, and take the words in the order of the code.

        Under ``torch.distributed`` all ranks call it, and get those of the first one.
        """
        super().reset_parameters()
        self.averages.reset_parameters()
        overwrite(self.words, self._given.dense(dtype=self.words.dtype).to(self.words.device))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, code={self._given.kind!r}"
