r"""The head whose frame is first the class means, and then the spherical code nearest to them.

Symbols: X <-> directions of the centered class means, V <-> words of the code, W <-> frame.

With more classes than dimensions the words of a code are not equally far from each other, so it matters which
class has which word. The class means know which classes are alike. So W follows them until it is told to
settle (:meth:`NearestCodeHead.refit`): then it is the code, turned and dealt out so that it is near to them
(``functional.assignment``), and constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etflayers._torch import is_concrete
from etflayers.codes import SphericalCode
from etflayers.codes.catalog import Kind
from etflayers.functional.assignment import arrange_code
from etflayers.nn.averages import Momentum
from etflayers.nn.base import CodeHead
from etflayers.nn.class_means import ClassMeanHead
from etflayers.nn.distributed import overwrite
from etflayers.nn.fixed_code import as_code

__all__ = ["NearestCodeHead"]


class NearestCodeHead(ClassMeanHead):
    r"""Classifier with a spherical code that is arranged by the class means: ``logits = s z W'``.

    At first W is that of :class:`~etflayers.nn.ClassMeanHead`, the directions of the running class means,
    from which a network learns fast. :meth:`refit` makes it the nearest arrangement of the code, which is
    constant from there on, and may be called again:

    .. code-block:: python

        for epoch in range(epochs):
            train_one_epoch(model)
            if epoch == 3:
                model.fc.refit()

    A training pass needs targets, for the class means. :meth:`refit` takes O(K^3) at worst: seconds for 2,000
    classes, minutes for 10,000.

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
        words: the code, ``(K, d)``, as it was arranged last; at first in its own order, in which it serves
            classes that have not been seen.
        arrangements: how often it was arranged, an int64 scalar.

    Raises:
        InvalidArgumentError: as :class:`~etflayers.nn.FixedCodeHead`, or an unknown momentum.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> head = NearestCodeHead(in_features=2, num_classes=4, momentum=1.0)
    >>> features = torch.tensor([[-2.0, 2.0], [2.0, 2.1], [-3.0, -2.9], [1.0, -1.0]])
    >>> _ = head(features, torch.arange(4))
    >>> round(head.refit(), 3)
    1.0
    >>> (head.frame @ head.frame.T).round(decimals=4).abs()
    tensor([[1., 0., 0., 1.],
            [0., 1., 1., 0.],
            [0., 1., 1., 0.],
            [1., 0., 0., 1.]])
    """

    words: Tensor
    arrangements: Tensor

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
        super().__init__(
            in_features,
            num_classes,
            scale=scale,
            normalize=normalize,
            momentum=momentum,
            ignore_index=ignore_index,
            synchronize=synchronize,
            process_group=process_group,
            device=device,
            dtype=dtype,
        )
        self._given = as_code(code, num_classes, in_features, generator)
        words = self._given.dense(device=device, dtype=self.initial_rows.dtype)
        self.initial_rows.copy_(words)
        self.register_buffer("words", words)
        self.register_buffer("arrangements", torch.zeros((), dtype=torch.int64, device=device))
        # What `arrangements` says, without waiting for the device; unknown where others have written it.
        self._arranged: bool | None = False

    @property
    def arranged(self) -> bool:
        """Whether W is the code."""
        if self._arranged is None and is_concrete(self.arrangements):
            self._arranged = bool(self.arrangements > 0)
        return bool(self._arranged)

    def describe(self) -> str:
        """One sentence: which code, its largest cosine, the bound that no code is below, what it is for."""
        return self._given.describe()

    def _frame_of(self, means: Tensor) -> Tensor:
        """The code once it is arranged, and the directions of the means before."""
        if not self.arranged:
            return super()._frame_of(means)
        # A graph keeps W, and a refit writes it.
        return self.words.clone() if torch.is_grad_enabled() else self.words

    @torch.no_grad()
    def refit(self, *, max_turns: int = 20) -> float:
        """Turn the code and deal out its words so that they are near to the class means of now.

        Classes not seen yet get words that are left over. Under ``torch.distributed`` all ranks call it, and
        get the arrangement of the first one. It waits for the device.

        Args:
            max_turns: as in :func:`etflayers.functional.arrange_code`.

        Returns:
            The mean cosine between the directions of the class means, less their common mean, and their new
            rows, over the classes seen.

        Raises:
            MissingDependencyError: scipy is not installed (extra ``solvers``).
        """
        seen, means = self.averages.seen.unsqueeze(-1), self.averages.means.double()
        common = (means * seen).sum(0) / seen.sum().clamp(min=1)
        words = self._given.dense(device=means.device, dtype=means.dtype)
        found = arrange_code(torch.where(seen, means - common, 0), words, max_turns=max_turns)
        overwrite(self.words, found.words.to(self.words.dtype))
        self.arrangements += 1
        self._arranged = True
        return float(found.cosine)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all class means and all arrangements.

        Under ``torch.distributed`` all ranks call it, and get the words of the first one.
        """
        CodeHead.reset_parameters(self)
        self.averages.reset_parameters()
        words = self._given.dense(dtype=self.words.dtype).to(self.words.device)
        overwrite(self.words, words)
        overwrite(self.initial_rows, words)
        self.arrangements.zero_()
        self._arranged = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._arranged = None

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, code={self._given.kind!r}"
