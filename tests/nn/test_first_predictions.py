"""Which classes an untrained network with a fixed frame predicts: what docs/howto/rare-classes.md says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etflayers import FixedETFHead

D, K, SAMPLES = 512, 100, 2000


def positive_features(seed: int) -> Tensor:
    return torch.randn(SAMPLES, D, generator=torch.Generator().manual_seed(seed)).relu()


def copied_frame(seed: int, *, positive_diagonal: bool = False) -> Tensor:
    """A simplex ETF by QR of numbers that are uniform in [0, 1), as several code bases have it."""
    generator = torch.Generator().manual_seed(seed)
    columns, triangle = torch.linalg.qr(torch.rand(D, K, generator=generator))
    if positive_diagonal:
        columns = columns * triangle.diagonal().sign()
    return (K / (K - 1)) ** 0.5 * (columns - columns.mean(1, keepdim=True)).T


def shares(features: Tensor, frame: Tensor) -> Tensor:
    return torch.bincount((features @ frame.T).argmax(-1), minlength=K) / len(features)


def component(frame: Tensor) -> float:
    """Of the vector of class 0, along (1, ..., 1) of length 1."""
    return float(frame[0].sum() / D**0.5)


@pytest.mark.parametrize("seed", range(3))
def test_qr_of_uniform_numbers_gives_class_0_the_common_direction_of_positive_features(seed: int) -> None:
    features = positive_features(seed)
    negated, kept = copied_frame(seed), copied_frame(seed, positive_diagonal=True)
    # The first column has the cosine sqrt(3) / 2 with (1, ..., 1); the mean over the classes takes a little.
    assert abs(component(negated)) == pytest.approx(0.86, abs=0.03)
    assert abs(component(kept)) == pytest.approx(0.84, abs=0.03)
    assert component(negated) < 0 < component(kept)
    assert shares(features, negated)[0] == 0
    assert shares(features, kept)[0] > 0.99


def test_without_their_common_mean_features_have_no_preference() -> None:
    centered = torch.nn.BatchNorm1d(D)(positive_features(0)).detach()
    for frame in (copied_frame(0), copied_frame(0, positive_diagonal=True)):
        # 2000 / 100 = 20 predictions are expected, with a deviation of 4.5.
        assert 2 / SAMPLES < shares(centered, frame)[0] < 45 / SAMPLES
        assert shares(centered, frame).max() < 0.03


def test_over_many_haar_frames_every_class_is_predicted_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 16, generator=generator).relu()
    found, components = [], []
    for _ in range(400):
        frame = FixedETFHead(16, 8, rotation="haar", generator=generator).frame
        found.append(torch.bincount((features @ frame.T).argmax(-1), minlength=8) / 200)
        components.append(float(frame[0].sum() / 16**0.5))
    stacked = torch.stack(found)
    error = stacked.std(0) / 400**0.5
    assert bool(((stacked.mean(0) - 1 / 8).abs() < 4 * error).all())
    # A uniformly distributed unit vector has components of mean square 1 / d.
    assert torch.tensor(components).square().mean() == pytest.approx(1 / 16, rel=0.25)


@pytest.mark.parametrize("seed", range(3))
def test_a_haar_frame_has_no_such_component(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frame = FixedETFHead(D, K, rotation="haar", generator=generator).frame
    assert abs(component(frame)) < 4 / D**0.5
    assert shares(positive_features(seed), frame)[0] < 0.2
