"""Siamese augmentation against PyTorch's affine grids, whole-pixel moves and finite differences."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from etflayers import distill
from etflayers.distill import ImageTransform, InitialState, SiameseAugmentation, stack_states
from etflayers.errors import InvalidArgumentError

FAMILIES = ("shift", "scale", "rotate", "brightness", "cutout")


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_strength_is_the_identity() -> None:
    images = some_images(2, 3, 7, 5)
    none = SiameseAugmentation.of(*FAMILIES, strength=0.0)
    assert torch.equal(none(images, stream(0)), images)
    same = ImageTransform(numbers(0, 0), numbers(1, 1), numbers(0)[0], numbers(0)[0], numbers(0.5, 0.5, 0))
    torch.testing.assert_close(same(images), images, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [(6, 6), (5, 8)])
@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2])
def test_geometry_is_that_of_affine_grids(angle: float, size: tuple[int, int]) -> None:
    """PyTorch's grid of the matrix that the module derives, and its own sampling."""
    images, (height, width) = some_images(2, 3, *size), size
    shift, scale = (0.13, -0.31), (1.3, 0.8)
    cosine, sine, ratio = math.cos(angle), math.sin(angle), height / width
    matrix = numbers(cosine / scale[0], ratio * sine / scale[0], -2 * shift[0])
    below = numbers(-sine / ratio / scale[1], cosine / scale[1], -2 * shift[1])
    grid = F.affine_grid(torch.stack([matrix, below]).expand(2, 2, 3), [2, 3, *size], align_corners=False)
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    found = ImageTransform(numbers(*shift), numbers(*scale), numbers(angle)[0])(images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_whole_pixels_and_quarter_turns() -> None:
    images = some_images(2, 1, 6, 6)
    right = ImageTransform(shift=numbers(2 / 6, 0))(images)
    torch.testing.assert_close(right[..., 2:], images[..., :-2])
    torch.testing.assert_close(right[..., :2], images[..., :1].expand(-1, -1, -1, 2))
    turned = ImageTransform(angle=numbers(math.pi / 2)[0])(images)
    torch.testing.assert_close(turned, images.rot90(-1, (-2, -1)))
    longer = ImageTransform(scale=numbers(1, 3))(torch.arange(6.0).double().view(1, 1, 6, 1))
    torch.testing.assert_close(longer.flatten(), (torch.arange(6).double() - 2.5) / 3 + 2.5)


def test_cutout_is_a_rectangle_of_zeros() -> None:
    cut = ImageTransform(cutout=numbers(0.75, 0.25, 0.5))(torch.ones(1, 2, 4, 8).double())
    expected = torch.ones(4, 8).double()
    expected[:2, 4:] = 0
    assert torch.equal(cut[0, 1], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_finite_differences(family: str) -> None:
    """Of first and second order."""
    images = some_images(2, 1, 4, 5).requires_grad_()
    change = SiameseAugmentation.of(family).draw(stream(3))
    assert not torch.allclose(change(images), images)
    torch.autograd.gradcheck(change, (images,))
    torch.autograd.gradgradcheck(lambda x: change(x).square(), (images,))


def test_one_kind_at_a_time_and_each_as_often() -> None:
    neutral = {"shift": 0.0, "scale": 1.0, "angle": 0.0, "brightness": 0.0}
    kinds: Counter[str] = Counter()
    sizes: dict[str, list[float]] = {name: [] for name in neutral}
    generator, augmentation = stream(0), SiameseAugmentation()
    for _ in range(1000):
        change = augmentation.draw(generator)
        changed = [name for name, value in neutral.items() if (getattr(change, name) != value).any()]
        assert change.cutout is not None
        changed += ["cutout"] if change.cutout[2] > 0 else []
        (kind,) = changed
        kinds[kind] += 1
        if kind != "cutout":
            sizes[kind] += getattr(change, kind).flatten().tolist()
    # Binomial: 200 with a deviation of 12.6 each.
    assert all(150 < count < 250 for count in kinds.values())
    assert len(kinds) == 5
    bounds = {"shift": 0.125, "angle": math.radians(15), "brightness": 0.5}
    for name, bound in bounds.items():
        assert -bound <= min(sizes[name]) < -0.9 * bound
        assert 0.9 * bound < max(sizes[name]) <= bound
    assert 1 / 1.2 <= min(sizes["scale"]) < 0.85
    assert 1.18 < max(sizes["scale"]) <= 1.2


def test_all_images_of_a_batch_are_changed_alike() -> None:
    images = some_images(4, 2, 6, 6)
    for seed in range(10):
        together = SiameseAugmentation()(images, stream(seed))
        apart = [SiameseAugmentation()(image[None], stream(seed)) for image in images]
        torch.testing.assert_close(together, torch.cat(apart))


IMAGES, REAL = some_images(2, 3, 1, 5, 5), some_images(6, 1, 5, 5, seed=1)
LABELS = (torch.arange(6) % 3).view(2, 3)
ADJOINTS: dict[str, Any] = {
    "steps": distill.StepAdjoint(),
    "forward": distill.StepAdjoint(mode="forward"),
    "kept": distill.KeptGraph(),
}


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()


def outer(images: Tensor, copies: int | None, adjoint: str = "kept") -> Tensor:
    """Of networks trained with augmentation; the seed is that of the steps."""
    augmentation = SiameseAugmentation()

    def loss(model: Any, batch: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(augmentation(batch)), labels)

    model, states = network(0), [InitialState.of(network(seed)) for seed in range(copies or 1)]
    start = states[0] if copies is None else stack_states(states)
    options: dict[str, Any] = {"adjoint": ADJOINTS[adjoint], "initializations": copies, "epochs": 3}
    options |= {"loss": loss, "generator": stream(4), "lr": 0.3}
    trained = distill.unrolled_inner_loop(model, start.params, images, LABELS, **options)

    def judged(params: dict[str, Tensor]) -> Tensor:
        return functional_call(model, params, (REAL,)).square().mean()

    return judged(trained.params) if copies is None else vmap(judged)(trained.params).sum()


def hypergradient(copies: int | None, adjoint: str) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(outer(images, copies, adjoint), images)
    return gradient


@pytest.mark.parametrize("copies", [None, 3])
@pytest.mark.parametrize("adjoint", ["steps", "forward"])
def test_steps_that_are_rederived_see_the_same_change(adjoint: str, copies: int | None) -> None:
    """One network, or several side by side by vmap."""
    found, kept = hypergradient(copies, adjoint), hypergradient(copies, "kept")
    torch.testing.assert_close(found, kept, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("copies", [None, 3])
def test_hypergradient_is_that_of_finite_differences(copies: int | None) -> None:
    gradient, way, step = hypergradient(copies, "steps"), some_images(*IMAGES.shape, seed=2), 1e-5
    with torch.no_grad():
        ends = [outer(IMAGES + sign * step * way, copies) for sign in (1, -1)]
    torch.testing.assert_close((gradient * way).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 1.5}, r"shift must be in \[0, 1\], got 1.5"),
        ({"cutout": -0.1}, r"cutout must be in \[0, 1\], got -0.1"),
        ({"rotate": math.inf}, "rotate must be a finite number >= 0, got inf"),
        ({"scale": math.nan}, "scale must be a finite number >= 0, got nan"),
    ],
)
def test_bad_strengths_are_explained(change: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        replace(SiameseAugmentation(), **change)


def test_bad_input_is_explained() -> None:
    with pytest.raises(InvalidArgumentError, match=r"families must be among shift, .*, got \['flip'\]"):
        SiameseAugmentation.of("shift", "flip")
    with pytest.raises(InvalidArgumentError, match=r"\(B, C, H, W\), got \(1, 4, 4\)"):
        SiameseAugmentation()(torch.zeros(1, 4, 4))
    with pytest.raises(InvalidArgumentError, match="images"):
        SiameseAugmentation()(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
