r"""The head whose frame is a spherical code: a constant for any number of classes and dimensions.

Symbols: W <-> frame, z <-> inputs, s <-> scale.

A simplex ETF needs d >= K - 1. With more classes the largest cosine between two rows cannot be negative, and
it is known how small it can be (``codes.bounds``). A code with a formula is never stored: its logits are a
slice of the features or a fast transform of them, and only then is a constant classifier of a million
classes free. A code without one is a buffer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from etflayers.checks import describe_argument, require, require_floating, require_size
from etflayers.codes import DenseCode, SphericalCode, find_code
from etflayers.codes.catalog import Kind
from etflayers.codes.largest import largest, largest_k
from etflayers.errors import InvalidArgumentError
from etflayers.nn.base import CodeHead
from etflayers.nn.distributed import overwrite
from etflayers.precision import full_precision, linear_dtype, working_dtype

__all__ = ["FixedCodeHead", "as_code"]

# Classes whose logits exist at a time in a prediction.
_AT_A_TIME = 4096


class FixedCodeHead(CodeHead):
    r"""Classifier with a constant weight of K unit rows in R^d, for any K and d: ``logits = s z W'``.

    It has no parameter: only the features learn. A code with a formula (simplex, orthoplex, Kerdock, roots)
    is not stored either, and :class:`~etflayers.nn.CodeCrossEntropy` and :meth:`predict` take a few of its
    classes at a time. ``describe()`` says which code it is and why.

    Unlike the vertices of a simplex the words of a code are not equally far from each other, so it matters
    which class has which word. Here class k has word k. Where classes resemble each other, a code that is
    fitted to the class means is better: :class:`~etflayers.nn.NearestCodeHead`.

    Args:
        in_features: d >= 1.
        num_classes: K >= 2.
        code: ``"auto"``, the best that has a formula, or else an optimized one, or the name of a kind: see
            :func:`etflayers.codes.find_code`; a :class:`~etflayers.codes.SphericalCode`; or the unit rows W
            themselves, ``(K, d)``.
        scale: s > 0, multiplies the logits (inverse temperature); an ``nn.Parameter`` learns. Cosines of many
            classes are close to each other: 16 to 64 is usual with ``normalize=True``.
        normalize: whether to divide each feature vector by its length.
        generator: random numbers of an optimized code.
        device: of a code that is stored.
        dtype: of a code that is stored.

    Attributes:
        words: W, ``(K, d)``, a buffer; ``None`` for a code with a formula.

    Raises:
        InvalidArgumentError: a size or scale out of range, a code of other sizes, or a kind that does not
            exist for these.

    Reference:
        Jiang, Zhou, Wang, Qu, Mixon, You, Zhu (2023), arXiv 2310.05351.

    >>> head = FixedCodeHead(in_features=16, num_classes=288, scale=8.0)
    >>> head(torch.eye(16)[:2]).shape, sum(p.numel() for p in head.parameters())
    (torch.Size([2, 288]), 0)
    >>> head.describe()
    'kerdock: 288 unit vectors in R^16 with largest cosine 0.25, where none can have less than 0.2416; a
    fast Walsh-Hadamard transform for each 2 d classes, and no weight but signs.'
    """

    words: Tensor | None
    # One number that remembers, for `frame`, where a module without a matrix is and in which precision.
    _like: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        code: Kind | SphericalCode | Tensor = "auto",
        scale: float | Tensor = 1.0,
        normalize: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, scale=scale, normalize=normalize)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        require_floating("dtype", dtype)
        # What `to_empty` takes from the buffer and no random number can give back.
        self._given = as_code(code, num_classes, in_features, generator)
        stored = isinstance(self._given, DenseCode)
        self.register_buffer("words", self._given.dense(device=device, dtype=dtype) if stored else None)
        like = None if stored else torch.ones((), device=device, dtype=dtype)
        self.register_buffer("_like", like, persistent=False)

    @property
    def code(self) -> SphericalCode | None:
        """The code, if it has a formula."""
        return None if self.words is not None else self._given

    @property
    def frame(self) -> Tensor:
        """W, ``(K, d)``, unit rows; that of a code with a formula is made on demand."""
        if self.words is not None:
            return self.words
        assert self._like is not None
        return self._given.dense(device=self._like.device, dtype=self._like.dtype)

    def describe(self) -> str:
        """One sentence: which code, its largest cosine, the bound that no code is below, what it is for."""
        return self._given.describe()

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of a batch: see :meth:`CodeHead.forward`."""
        if self.code is None:
            return super().forward(features, targets)
        inputs = self.inputs(features)
        products = self.code.piece_logits(inputs, 0, self.code.pieces)
        return self.of_active(self.scale * products, targets).to(linear_dtype(features))

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """The class of the largest logit, ``(...)`` int64, without holding the logits of all classes.

        Args:
            features: ``(..., d)``.

        Raises:
            InvalidArgumentError: features of another width or dtype.
        """
        inputs = self.inputs(features)
        if self.active is not None:
            return self.active_classes[largest(self._blocks(inputs))]
        return largest(self._blocks(inputs)) if self.code is None else self.code.predict(inputs)

    @torch.no_grad()
    def topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits, descending, and their classes, ``(..., k)`` each, without holding all logits.

        Args:
            features: ``(..., d)``.
            k: from 1 to K, or to the number of classes that are here.

        Raises:
            InvalidArgumentError: features of another width or dtype, or a k out of range.
        """
        inputs = self.inputs(features)
        require_size("k", k)
        if self.active is not None:
            count = len(self.active_classes)
            require(k <= count, f"k must be at most the number of active classes, {count}, got {k}")
            products, places = largest_k(self._blocks(inputs), k)
            return self.scale * products, self.active_classes[places]
        require(k <= self.num_classes, f"k must be at most num_classes = {self.num_classes}, got {k}")
        products, places = (
            largest_k(self._blocks(inputs), k) if self.code is None else self.code.topk(inputs, k)
        )
        return self.scale * products, places

    def _blocks(self, inputs: Tensor) -> Iterator[Tensor]:
        """Products with the words as a matrix, of the classes that are here, some at a time."""
        if self.active is None:
            rows = self.frame
        elif self.words is None:
            rows = self._given.words(self.active_classes)
        else:
            rows = self.words.index_select(0, self.active_classes)
        inputs = inputs.to(working_dtype(inputs.dtype))
        for block in torch.split(rows.to(inputs.dtype), _AT_A_TIME):
            with full_precision(inputs):
                products = inputs @ block.mT
            yield products

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Write the words of the code that was chosen at the start.

        Under ``torch.distributed`` all ranks call it, and get those of the first one.
        """
        super().reset_parameters()
        if self.words is not None:
            words = self._given.dense(dtype=working_dtype(self.words.dtype))
            overwrite(self.words, words.to(self.words))

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, code={self._given.kind!r}"


def as_code(
    code: Kind | SphericalCode | Tensor,
    num_classes: int,
    in_features: int,
    generator: torch.Generator | None = None,
) -> SphericalCode:
    """The code that an argument names, is or holds.

    Raises:
        InvalidArgumentError: none of these, or a code of other sizes.
    """
    if isinstance(code, str):
        return find_code(num_classes, in_features, kind=code, generator=generator)
    if isinstance(code, Tensor):
        require(
            code.shape == (num_classes, in_features),
            f"code must have shape (num_classes, in_features) = ({num_classes}, {in_features}), "
            f"got {tuple(code.shape)}",
        )
        return DenseCode(code)
    if not isinstance(code, SphericalCode):
        raise InvalidArgumentError(
            f"code must be the name of a kind, a SphericalCode or a matrix, got {describe_argument(code)}: "
            "see etflayers.codes.find_code"
        )
    require(
        (code.num_classes, code.in_features) == (num_classes, in_features),
        f"code must have num_classes = {num_classes} and in_features = {in_features}, got a {code.kind} code "
        f"with {code.num_classes} and {code.in_features}",
    )
    return code
