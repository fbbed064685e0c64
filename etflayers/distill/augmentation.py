r"""Differentiable siamese augmentation: one random change of images, the same for a whole batch.

**The geometry.** With coordinates (u, v) that run from -1 to 1 over the width W and the height H, the pixel
at (u, v) of the new image takes the value that the old one has, by bilinear interpolation, at

    u' = (cos a u + (H/W) sin a v) / s_x - 2 d_x,      v' = (-(W/H) sin a u + cos a v) / s_y - 2 d_y,

which turns by the angle a, stretches by (s_x, s_y) and then moves by the shares (d_x, d_y) of the sides; the
ratios of the sides make the turn one of pixels. Beyond the border an image goes on as it ends. The result is
linear in the images, so that it has derivatives of every order, and no step branches on a random number, so
that networks trained side by side by vmap may each have their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from etflayers.checks import require, require_floating

__all__ = ["ImageTransform", "SiameseAugmentation"]


@dataclass(frozen=True)
class ImageTransform:
    """One change of images ``(B, C, H, W)``, the same for all of them; what is ``None`` is left out.

    Args:
        shift: ``(2,)``, the way to the right and down, as shares of the sides.
        scale: ``(2,)``, factors > 0 by which width and height are stretched about the middle.
        angle: ``()``, of the turn about the middle, in radians.
        brightness: ``()``, what is added to all pixels.
        cutout: ``(3,)``, a rectangle of zeros: the place of its middle across and down, and its sides, all as
            shares of the sides.

    Reference:
        Zhao, Bilen (2021), arXiv 2102.08259; cutout: DeVries, Taylor (2017), arXiv 1708.04552.

    >>> images = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]])
    >>> ImageTransform(shift=torch.tensor([0.5, 0.0]))(images)
    tensor([[[[0., 0.],
              [2., 2.]]]])
    >>> ImageTransform(cutout=torch.tensor([0.25, 0.25, 0.5]), brightness=torch.tensor(1.0))(images)
    tensor([[[[0., 2.],
              [3., 4.]]]])
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    angle: Tensor | None = None
    brightness: Tensor | None = None
    cutout: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The images changed.

        Args:
            images: ``(B, C, H, W)``.

        Returns:
            As many of the same size.

        Raises:
            InvalidArgumentError: another shape, or an integer dtype.
        """
        require_floating("images", images.dtype)
        require(
            images.ndim == 4,
            f"images must have shape (B, C, H, W), got {tuple(images.shape)}: a single one is image[None]",
        )
        if not (self.shift is None and self.scale is None and self.angle is None):
            images = _resampled(images, *self._sources(images))
        if self.brightness is not None:
            images = images + self.brightness.to(images)
        return images if self.cutout is None else images * self._left(images, self.cutout.to(images))

    def _sources(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Where each new pixel comes from, across and down from -1 to 1: (u', v'), ``(H, W)`` each."""
        height, width = images.shape[-2:]
        v, u = 2 * _centers(height, images)[:, None] - 1, 2 * _centers(width, images) - 1
        if self.angle is not None:
            cosine, sine = self.angle.to(images).cos(), self.angle.to(images).sin()
            ratio = height / width
            u, v = cosine * u + ratio * sine * v, cosine * v - sine / ratio * u
        if self.scale is not None:
            scale = self.scale.to(images)
            u, v = u / scale[0], v / scale[1]
        if self.shift is not None:
            shift = self.shift.to(images)
            u, v = u - 2 * shift[0], v - 2 * shift[1]
        return u, v

    @staticmethod
    def _left(images: Tensor, cutout: Tensor) -> Tensor:
        """One where pixels stay, zero where their centers lie in the rectangle: ``(H, W)``."""
        across, down, side = cutout.unbind()
        columns = (_centers(images.shape[-1], images) - across).abs() < side / 2
        rows = (_centers(images.shape[-2], images) - down).abs() < side / 2
        return (~(columns & rows[:, None])).to(images.dtype)


@dataclass(frozen=True)
class SiameseAugmentation:
    r"""A random change of one kind, drawn anew at each call, the same for all images of the batch.

    The kind is one of those with a strength above 0, each with the same probability. Inside the loss of
    :class:`~etflayers.distill.UnrolledInnerLoop` it draws on the stream of the step, so that a step that is
    re-derived sees the same change. The defaults are the published strengths.

    Args:
        shift: at most this share of the sides, each way, in [0, 1].
        scale: width and height are stretched or shrunk by at most ``1 + scale``, each by its own factor.
        rotate: at most so many degrees, either way.
        brightness: at most this much is added or taken away.
        cutout: sides of the square of zeros as a share of those of the image, in [0, 1].

    Raises:
        InvalidArgumentError: a strength that is negative, not finite, or above 1 where it is a share.

    Reference:
        Zhao, Bilen (2021), arXiv 2102.08259.

    >>> augmentation = SiameseAugmentation(shift=0.25)
    >>> images, generator = torch.randn(5, 3, 8, 8, requires_grad=True), torch.Generator().manual_seed(0)
    >>> augmentation(images, generator).shape
    torch.Size([5, 3, 8, 8])
    >>> same = augmentation.draw(generator)
    >>> torch.equal(same(images)[:2], same(images[:2]))
    True
    """

    shift: float = 0.125
    scale: float = 0.2
    rotate: float = 15.0
    brightness: float = 0.5
    cutout: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            strength = getattr(self, field.name)
            share = field.name in ("shift", "cutout")
            require(
                0 <= strength <= (1 if share else math.inf) and math.isfinite(strength),
                f"{field.name} must be {'in [0, 1]' if share else 'a finite number >= 0'}, got {strength}",
            )

    @classmethod
    def of(cls, *families: str, strength: float = 1.0) -> SiameseAugmentation:
        """Only these kinds, at the published strengths times a number.

        Args:
            families: names among ``shift``, ``scale``, ``rotate``, ``brightness`` and ``cutout``.
            strength: the number, at least 0.

        Raises:
            InvalidArgumentError: another name, or strengths that cannot be.

        >>> SiameseAugmentation.of("rotate", strength=2.0).rotate
        30.0
        """
        published = {field.name: float(field.default) for field in fields(cls)}  # type: ignore[arg-type]
        unknown = set(families) - set(published)
        require(not unknown, f"families must be among {', '.join(published)}, got {sorted(unknown)}")
        return cls(**{name: strength * value * (name in families) for name, value in published.items()})

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images ``(B, C, H, W)`` after a change drawn from a generator, or the global one for ``None``."""
        return self.draw(generator)(images)

    def draw(self, generator: torch.Generator | None = None) -> ImageTransform:
        """A change, to be made to more than one batch.

        Args:
            generator: source of the random numbers, of which it takes nine; ``None``: the global one.
        """
        active = [field.name for field in fields(self) if getattr(self, field.name) > 0]
        device = "cpu" if generator is None else generator.device
        drawn = torch.rand(9, dtype=torch.float64, generator=generator, device=device)
        number, numbers = (drawn[0] * len(active)).floor(), 2 * drawn[1:] - 1

        def size(name: str, factor: float = 1.0) -> Tensor:
            """The strength if this kind was drawn, else 0, at which a change is none."""
            strength: float = factor * getattr(self, name)
            return strength * (number == active.index(name)).to(drawn.dtype)

        change: dict[str, Tensor] = {}
        if "shift" in active:
            change["shift"] = size("shift") * numbers[:2]
        if "scale" in active:
            change["scale"] = (torch.log1p(size("scale")) * numbers[2:4]).exp()
        if "rotate" in active:
            change["angle"] = size("rotate", math.pi / 180) * numbers[4]
        if "brightness" in active:
            change["brightness"] = size("brightness") * numbers[5]
        if "cutout" in active:
            change["cutout"] = torch.cat([drawn[7:], size("cutout")[None]])
        return ImageTransform(**change)


def _centers(count: int, like: Tensor) -> Tensor:
    """The middles of so many pixels between 0 and 1."""
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


def _resampled(images: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The images at places (u, v), ``(H, W)`` each, from -1 to 1: bilinear, the border going on outside."""
    height, width = images.shape[-2:]
    columns = (((u + 1) * width - 1) / 2).clamp(0, width - 1)
    rows = (((v + 1) * height - 1) / 2).clamp(0, height - 1)
    left, top = columns.detach().floor(), rows.detach().floor()
    pixels = images.flatten(-2)
    found = torch.zeros_like(images)
    for down in (0, 1):
        for right in (0, 1):
            weight = (1 - (columns - left - right).abs()) * (1 - (rows - top - down).abs())
            place = (top + down).clamp(max=height - 1) * width + (left + right).clamp(max=width - 1)
            found = found + weight * pixels[..., place.long()]
    return found
