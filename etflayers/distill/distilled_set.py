"""The learned data set as a module: inputs, labels, learning rates, and what it takes to see and keep them.

Learning rates have to stay positive, so their logarithms are the parameters. A step on a logarithm changes a
rate by a proportion: the same step suits rates of 1e-3 and of 1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from etflayers.checks import require, require_finite, require_floating, require_values
from etflayers.distill.image_grid import image_grid
from etflayers.distill.kernel_ridge import centered_one_hot
from etflayers.distill.labels import class_indices
from etflayers.distill.representatives import Representatives, random_samples
from etflayers.distill.representatives import per_class as images_per_class
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.storage import read_tensors, write_tensors

__all__ = ["DistilledSet", "LabelKind"]

LabelKind = Literal["hard", "one-hot", "centered"]


_NO_RATES = "this set was made without rates: give it rates= to learn them"
# Class indices beyond 32 bits are a damaged number, and would be the size of a table somewhere.
_MOST_CLASSES = 2**31 - 1


class NoRatesError(InvalidArgumentError, AttributeError):
    """The rates of a set that has none; to ``hasattr`` and ``getattr`` a missing attribute like any other."""


class DistilledSet(nn.Module):
    r"""Inputs, labels and learning rates, learned so that training on them serves for training on real data.

    Args:
        inputs: ``(n, ...)``, as the network sees them (normalized); they become a parameter.
        labels: class indices ``(n,)``, which become a buffer, or soft labels ``(n, K)``, which become a
            parameter.
        rates: learning rates > 0, one for each step, ``(T,)``, or a number; their logarithms become a
            parameter. ``None``: none are learned.
        num_classes: K; default the largest class index plus 1, or the length of a soft label.
        mean: of the normalization of the inputs, a number or one for each channel, ``(C,)``.
        std: of the normalization, > 0, likewise: real images are ``inputs * std + mean``.
        metadata: what else to keep in the file: anything that JSON can hold.

    Attributes:
        inputs: parameter ``(n, ...)``.
        labels: buffer ``(n,)`` int64 or parameter ``(n, K)``.
        log_rates: parameter ``(T,)`` or ``()``, or ``None``.
        mean: buffer ``(C,)`` or ``()``; so is ``std``.

    Raises:
        InvalidArgumentError: shapes, dtypes or values that do not fit.
        NonFiniteError: NaN or infinity in the inputs or the soft labels.

    Reference:
        Wang, Zhu, Torralba, Efros (2018), arXiv 1811.10959; soft labels: Sucholutsky, Schonlau (2019), arXiv
        1910.02551.

    >>> rates = torch.full((5,), 0.02)
    >>> distilled = DistilledSet.from_noise((1, 8, 8), num_classes=10, per_class=2, rates=rates)
    >>> distilled.inputs.shape, distilled.labels[:3], distilled.rates[0]
    (torch.Size([20, 1, 8, 8]), tensor([0, 1, 2]), tensor(0.0200, grad_fn=<SelectBackward0>))
    >>> len(distilled.dataset()), distilled.images().shape
    (20, torch.Size([1, 22, 102]))
    """

    labels: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        rates: Tensor | float | None = None,
        num_classes: int | None = None,
        mean: Tensor | float = 0.0,
        std: Tensor | float = 1.0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"inputs": inputs, "labels": labels}.items():
            require(isinstance(value, Tensor), f"{name} must be a tensor, got {type(value).__name__}")
        require_floating("inputs", inputs.dtype)
        require(
            inputs.ndim >= 2 and inputs.numel() > 0,
            f"inputs must have shape (n, ...) and not be empty, got {tuple(inputs.shape)}",
        )
        require_finite(inputs, "inputs must be finite, got NaN or infinity")
        self.num_classes = _checked_labels(labels, len(inputs), num_classes)
        self.inputs = nn.Parameter(inputs.detach().clone())
        if labels.dtype.is_floating_point:
            self.labels = nn.Parameter(labels.detach().clone())
        else:
            self.register_buffer("labels", labels.detach().to(torch.int64, copy=True))
        self.log_rates = None if rates is None else nn.Parameter(_logarithms(rates, inputs))
        self.register_buffer("mean", _channels("mean", mean, inputs))
        self.register_buffer("std", _channels("std", std, inputs))
        require_values((self.std > 0).all(), f"std must be positive, got {std}")
        require(
            metadata is None or isinstance(metadata, Mapping),
            f"metadata must be a dictionary, got {type(metadata).__name__}",
        )
        self.metadata = dict(metadata or {})

    @classmethod
    def from_noise(
        cls,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        per_class: int | None = None,
        labels: LabelKind = "hard",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> DistilledSet:
        """A set of standard normal inputs.

        Args:
            shape: of one input.
            num_classes: K.
            per_class: how many inputs of each class; the classes follow each other in turn. Its old name
                ``count`` goes with the next version.
            labels: ``"hard"`` class indices, or vectors to be learned that start ``"one-hot"``, or
                ``"centered"`` (one-hot minus 1/K, for regression).
            generator: of the noise.
            device: of the set.
            dtype: of the inputs.
            options: the other arguments of :class:`DistilledSet`.

        Returns:
            The set, with ``per_class * K`` inputs.

        Raises:
            InvalidArgumentError: arguments out of range.

        >>> DistilledSet.from_noise((4,), 3, per_class=2, labels="one-hot").labels.shape
        torch.Size([6, 3])
        """
        count = _per_class(per_class, options)
        num_classes = _checked_classes(num_classes)
        require(isinstance(shape, tuple | list), f"shape must be a tuple, such as (1, 28, 28), got {shape!r}")
        inputs = torch.randn(count * num_classes, *shape, generator=generator, device=device, dtype=dtype)
        classes = torch.arange(num_classes, device=device).repeat(count)
        return cls(inputs, _labels(classes, num_classes, labels, inputs), num_classes=num_classes, **options)

    @classmethod
    def from_data(
        cls,
        images: Tensor,
        targets: Tensor,
        *,
        per_class: int | None = None,
        representatives: Representatives = random_samples,
        labels: LabelKind = "hard",
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> DistilledSet:
        """A set that starts from real data: samples of it, class means or centers of k-means.

        Args:
            images: ``(N, ...)``, real ones as the network sees them (normalized).
            targets: ``(N,)``, integers in [0, K).
            per_class: how many inputs of each class; the classes follow each other in turn. Its old name
                ``count`` goes with the next version.
            representatives: :func:`random_samples`, :func:`partial_means` or :func:`kmeans_centers` of
                ``etflayers.distill``, or any function like them.
            labels: as in :meth:`from_noise`.
            num_classes: K; default the largest target plus 1.
            generator: on the CPU, for all that is random.
            options: the other arguments of :class:`DistilledSet`.

        Returns:
            The set, with ``per_class * K`` inputs.

        Raises:
            InvalidArgumentError: shapes, dtypes or values that do not fit, a class with less than
                ``per_class`` images.
            NonFiniteError: NaN or infinity in the images.

        >>> images, targets = torch.tensor([[5.0], [7.0], [6.0]]), torch.tensor([1, 0, 1])
        >>> DistilledSet.from_data(images, targets, per_class=1).labels
        tensor([0, 1])
        """
        count = _per_class(per_class, options)
        inputs, classes = images_per_class(
            images,
            targets,
            count=count,
            num_classes=num_classes,
            representatives=representatives,
            generator=generator,
        )
        num_classes = len(inputs) // count
        return cls(inputs, _labels(classes, num_classes, labels, inputs), num_classes=num_classes, **options)

    @property
    def rates(self) -> Tensor:
        """The learning rates, positive and differentiable, ``(T,)`` or ``()``. A set without has none."""
        if self.log_rates is None:
            raise NoRatesError(_NO_RATES)
        return self.log_rates.exp()

    def __getattr__(self, name: str) -> Any:
        if name == "rates":  # where Python goes on looking when the property has raised an AttributeError
            raise NoRatesError(_NO_RATES)
        return super().__getattr__(name)

    def batches(self, steps: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels split in order into equal batches, one for each step of an epoch.

        Classes follow each other in turn, so batches of a multiple of K inputs are balanced.

        Args:
            steps: S, a divisor of n.

        Returns:
            Inputs ``(S, n / S, ...)`` and labels ``(S, n / S)`` or ``(S, n / S, K)``, differentiable.

        Raises:
            InvalidArgumentError: the inputs cannot be split equally.

        >>> inputs, labels = DistilledSet.from_noise((4,), 2, per_class=3).batches(3)
        >>> inputs.shape, labels.tolist()
        (torch.Size([3, 2, 4]), [[0, 1], [0, 1], [0, 1]])
        """
        count = len(self.inputs)
        require(
            steps >= 1 and count % steps == 0,
            f"steps must divide the {count} inputs into equal batches, got {steps}",
        )
        shape = (steps, count // steps)
        inputs = self.inputs.view(*shape, *self.inputs.shape[1:])
        return inputs, self.labels.view(*shape, *self.labels.shape[1:])

    def denormalized(self) -> Tensor:
        """The inputs in the units of the real data, ``inputs * std + mean``."""
        shape = (-1, *[1] * (self.inputs.ndim - 2))
        return self.inputs * self.std.view(shape) + self.mean.view(shape)

    def images(self, *, columns: int | None = None, padding: int = 2) -> Tensor:
        """The inputs as one picture, see :func:`image_grid`; by default with a column for each class.

        Args:
            columns: images in a row; default K.
            padding: pixels between them and around.

        Returns:
            ``(C, height, width)``, uint8: :func:`write_png` makes a file of it.

        Raises:
            InvalidArgumentError: the inputs are not images.
        """
        return image_grid(
            self.denormalized(), columns=self.num_classes if columns is None else columns, padding=padding
        )

    def dataset(self) -> TensorDataset:
        """A copy of the inputs, as the network sees them, and their labels, as an ordinary data set."""
        return TensorDataset(self.inputs.detach().clone(), self.labels.detach().clone())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to a safetensors file, whole or not at all.

        Args:
            path: of the file; one that exists is replaced.

        Raises:
            InvalidArgumentError: metadata that JSON cannot hold.
            MissingDependencyError: safetensors is not installed.
            OSError: the file cannot be written, with its name.
        """
        write_tensors(path, self.state_dict(), {"num_classes": self.num_classes, "metadata": self.metadata})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> DistilledSet:
        """Read a set that :meth:`save` has written.

        Args:
            path: of the file.
            device: of the set; default the CPU.

        Returns:
            The set, with the same tensors to the bit.

        Raises:
            FileNotFoundError: there is no such file.
            InvalidArgumentError: the file holds something else, or is damaged, which a checksum tells.
            NonFiniteError: it was saved with NaN or infinity in it.
            MissingDependencyError: safetensors is not installed.
        """
        tensors, record = read_tensors(path)
        try:
            logarithms = tensors.pop("log_rates", None)
            num_classes = _checked_classes(record["num_classes"])
            loaded = cls(**tensors, num_classes=num_classes, metadata=record["metadata"])
            if logarithms is not None:
                require_floating("log_rates", logarithms.dtype)
                _require_rates(logarithms.double().exp())
        except NonFiniteError as error:
            raise NonFiniteError(f"{path} holds a distilled set that is no good: {error}") from error
        except (KeyError, TypeError, InvalidArgumentError) as error:
            raise InvalidArgumentError(f"{path} does not hold a distilled set: {error}") from error
        # Set as they are: through exp and log they would come back with another last digit.
        loaded.log_rates = None if logarithms is None else nn.Parameter(logarithms)
        return loaded.to(device)

    def extra_repr(self) -> str:
        """The shapes."""
        kind = "soft" if self.labels.dtype.is_floating_point else "hard"
        rates = None if self.log_rates is None else tuple(self.log_rates.shape)
        return (
            f"inputs={tuple(self.inputs.shape)}, num_classes={self.num_classes}, labels={kind}, rates={rates}"
        )


def _per_class(per_class: int | None, options: dict[str, Any]) -> int:
    """``per_class``, also under the name that it had before, which said nothing of classes."""
    if "count" in options:
        require(per_class is None, "count is the old name of per_class: give one of them")
        per_class = options.pop("count")
        warnings.warn(
            "count is now per_class, of which it is the number; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=3,
        )
    if not isinstance(per_class, Integral) or isinstance(per_class, bool) or per_class < 1:
        raise InvalidArgumentError(
            f"per_class, the number of inputs of each class, must be an integer >= 1, got {per_class!r}"
        )
    return int(per_class)


def _checked_classes(num_classes: object) -> int:
    count = int(num_classes) if isinstance(num_classes, Integral) and not isinstance(num_classes, bool) else 0
    require(1 <= count <= _MOST_CLASSES, f"num_classes must be an integer in [1, 2**31), got {num_classes!r}")
    return count


def _checked_labels(labels: Tensor, count: int, num_classes: int | None) -> int:
    """The number of classes, after checking the labels against it."""
    num_classes = None if num_classes is None else _checked_classes(num_classes)
    if labels.dtype.is_floating_point:
        require(
            labels.ndim == 2 and len(labels) == count and labels.shape[1] == (num_classes or labels.shape[1]),
            f"soft labels must have shape (n, num_classes) = ({count}, {num_classes or 'K'}), "
            f"got {tuple(labels.shape)}",
        )
        require_finite(labels, "labels must be finite, got NaN or infinity")
        return labels.shape[1]
    labels = class_indices("labels", labels)
    require(
        labels.shape == (count,),
        f"labels must be {count} class indices or soft labels ({count}, K), "
        f"got {labels.dtype} of shape {tuple(labels.shape)}",
    )
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    require(
        int(labels.min()) >= 0 and int(labels.max()) < num_classes,
        f"labels must lie in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}",
    )
    return num_classes


def _labels(classes: Tensor, num_classes: int, kind: LabelKind, inputs: Tensor) -> Tensor:
    require(
        kind in ("hard", "one-hot", "centered"),
        f"labels must be 'hard', 'one-hot' or 'centered', got {kind!r}",
    )
    if kind == "hard":
        return classes
    centered = centered_one_hot(classes, num_classes, dtype=inputs.dtype)
    return centered if kind == "centered" else (centered > 0).to(inputs.dtype)


def _logarithms(rates: Tensor | float, inputs: Tensor) -> Tensor:
    values = torch.as_tensor(rates, device=inputs.device).detach()
    values = values if values.dtype.is_floating_point else values.to(inputs.dtype)
    _require_rates(values)
    return values.log()


def _require_rates(rates: Tensor) -> None:
    require(rates.ndim <= 1, f"rates must be a number or have shape (T,), got {tuple(rates.shape)}")
    require_values(
        ((rates > 0) & rates.isfinite()).all(), "rates must be finite numbers > 0, one for each step"
    )


def _channels(name: str, value: Tensor | float, inputs: Tensor) -> Tensor:
    values = torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device).detach().clone()
    require(
        values.ndim == 0 or values.shape == inputs.shape[1:2],
        f"{name} must be a number or one for each channel, ({inputs.shape[1]},), got {tuple(values.shape)}",
    )
    require_finite(values, f"{name} must be finite, got NaN or infinity")
    return values
