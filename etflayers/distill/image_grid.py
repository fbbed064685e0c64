"""Images side by side, to look at."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from etflayers.checks import require, require_floating, require_module

__all__ = ["image_grid", "write_png"]


def image_grid(images: Tensor, *, columns: int = 10, padding: int = 2) -> Tensor:
    """Images in rows of ``columns``, with a white border.

    Args:
        images: ``(n, C, H, W)`` with C = 1 (grey) or 3 (RGB), or ``(n, H, W)``; values below 0 are shown
            black, above 1 white.
        columns: images in a row.
        padding: pixels between them and around.

    Returns:
        ``(C, rows * (H + padding) + padding, columns * (W + padding) + padding)``, uint8, with fewer columns
        if there are fewer images.

    Raises:
        InvalidArgumentError: anything but images, columns < 1 or padding < 0.

    >>> image_grid(torch.zeros(3, 1, 2, 2), columns=2, padding=1)[0]
    tensor([[255, 255, 255, 255, 255, 255, 255],
            [255,   0,   0, 255,   0,   0, 255],
            [255,   0,   0, 255,   0,   0, 255],
            [255, 255, 255, 255, 255, 255, 255],
            [255,   0,   0, 255, 255, 255, 255],
            [255,   0,   0, 255, 255, 255, 255],
            [255, 255, 255, 255, 255, 255, 255]], dtype=torch.uint8)
    """
    require_floating("images", images.dtype)
    require(columns >= 1, f"columns must be at least 1, got {columns}")
    require(padding >= 0, f"padding must not be negative, got {padding}")
    pictures = images.detach().unsqueeze(1) if images.ndim == 3 else images.detach()
    require(
        pictures.ndim == 4 and len(pictures) > 0 and pictures.shape[1] in (1, 3),
        f"images must have shape (n, C, H, W) with C = 1 or 3, or (n, H, W), got {tuple(images.shape)}",
    )
    count, channels, height, width = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    grid = torch.full(
        (channels, rows * (height + padding) + padding, columns * (width + padding) + padding),
        255,
        dtype=torch.uint8,
        device=images.device,
    )
    for index, picture in enumerate(pictures.mul(255).round().clamp(0, 255).to(torch.uint8)):
        top = padding + (index // columns) * (height + padding)
        left = padding + (index % columns) * (width + padding)
        grid[:, top : top + height, left : left + width] = picture
    return grid


def write_png(path: str | os.PathLike[str], grid: Tensor) -> None:
    """Write an image to a PNG file.

    Args:
        path: of the file.
        grid: ``(C, H, W)`` with C = 1 (grey) or 3 (RGB), uint8, as from :func:`image_grid`.

    Raises:
        InvalidArgumentError: another shape or dtype.
        MissingDependencyError: Pillow is not installed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_png(f"{folder}/images.png", image_grid(torch.zeros(1, 3, 2, 2)))
    ...     os.listdir(folder)
    ['images.png']
    """
    require(
        grid.dtype == torch.uint8 and grid.ndim == 3 and grid.shape[0] in (1, 3),
        "grid must be uint8 of shape (C, H, W) with C = 1 or 3, "
        f"got {grid.dtype} of shape {tuple(grid.shape)}",
    )
    image = require_module("PIL.Image", extra="distill")
    pixels = grid.cpu().squeeze(0) if grid.shape[0] == 1 else grid.cpu().permute(1, 2, 0)
    image.fromarray(pixels.contiguous().numpy()).save(path, format="PNG")
